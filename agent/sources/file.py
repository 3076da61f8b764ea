# SPDX-License-Identifier: Apache-2.0
"""Files as the source: shunt.yaml and services.d/*.yaml to one checked Configuration, or none."""

import os
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from msgspec import UnsetType
from yaml.nodes import SequenceNode

from shunt.lb.model import Configuration, Mode

from . import plain
from .document import Document, compose, name_of, read, read_text
from .merge import Built, Draft, Files, Loaded, Stale, merge
from .pools import NO_POOLS, build_pools
from .problems import ConfigError, ConfigErrors, Place, Problems
from .settings import build_settings
from .shape import ServiceEntry, ServicesFile, SettingsFile
from .store import State
from .typed import Path as KeyPath
from .typed import Reader

__all__ = ["ConfigError", "ConfigErrors", "FileSource", "Place", "load", "service_files"]

SUFFIX = ".yaml"
SURE_NS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class _Read:
    """What was read in a file without an error, and how it was then."""

    stamp: tuple[int, ...]
    default_mode: Mode | None
    drafts: list[Draft | Built]

    def holds(self, stamp: tuple[int, ...], default_mode: Mode | None) -> bool:
        """Whether it is what reading the file would give now."""
        same = (stamp, default_mode) == (self.stamp, self.default_mode)
        return same and all(isinstance(draft, Built) for draft in self.drafts)

    def asks_pools(self) -> bool:
        return any(draft.requests() for draft in self.drafts)


Kept = dict[Path, _Read]


def load(config: Path, services: Path, state: State | None = None) -> Configuration:
    """Read and check everything; with a state, also services of the API.

    Shape:  equal files give equal configurations; services are sorted by name.
    Raises: ConfigErrors with all errors of all files. What was loaded before stays in force.
    """
    return merge(read_files(config, services), state or State()).configuration


def read_files(config: Path, services: Path, kept: Kept | None = None) -> Files:
    """What all files say, and their errors; nothing is raised yet.

    `kept` has what was read before, and is brought up to date: files that are as they were, and
    whose services could be built, are not read again.
    """
    problems = Problems()
    files = _load_settings(config, problems)
    mode = files.default_mode
    before = {} if kept is None else kept.copy()
    now: Kept = {}
    for path in _listed(services, problems):
        known = before.get(path)
        stamp = _stamp(path)
        if known is None or not known.holds(stamp, mode):
            noted = len(problems)
            known = _Read(stamp, mode, _read_services(path, mode, problems))
            lasting = len(problems) == noted and stamp == _stamp(path) and _is_old(stamp)
        else:
            lasting = True
        files.of_each.append(known.drafts)
        if lasting:
            now[path] = known
    if kept is not None:
        kept.clear()
        kept.update(now)
    return files


def _stamp(path: Path) -> tuple[int, ...]:
    """What differs if a file does; empty if there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _is_old(stamp: tuple[int, ...]) -> bool:
    """Whether a change from now on would show: the kernel's time of one is some ms coarse."""
    return bool(stamp) and abs(time.time_ns() - stamp[-1]) > SURE_NS


def service_files(services: Path) -> list[Path]:
    """The files of a directory that are read, by name: *.yaml, not hidden.

    Raises: OSError if the directory cannot be listed.
    """
    # Editors and package managers leave .web.yaml.swp, web.yaml~ and web.yaml.dpkg-new.
    return sorted(path for path in services.iterdir() if _is_read(path.name))


def _is_read(name: str) -> bool:
    return name.endswith(SUFFIX) and not name.startswith(".")


def _listed(services: Path, problems: Problems) -> list[Path]:
    try:
        return service_files(services)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        fix = "create the directory (it may be empty), or name another one with --services"
        problems.add(Place(name_of(services)), "the directory cannot be listed", why, fix)
        return []


def _load_settings(config: Path, problems: Problems) -> Files:
    reader = Reader(name_of(config), problems)
    files = Files(problems, reader)
    document = read(config, problems)
    if document is None:
        return files
    if document.root is None:
        what, why = "the file is empty", "the file wants interfaces"
        problems.add(Place(document.file, 1), what, why, 'add "interfaces: [eth0]"')
        return files
    found = reader.read(document.root, SettingsFile)
    if not isinstance(found, SettingsFile):
        return files
    files.default_mode = Mode(found.mode) if reader.trusts(("mode",)) else None
    files.settings = build_settings(reader, found)
    files.pools = build_pools(reader, found)
    return files


def _read_services(
    path: Path, default_mode: Mode | None, problems: Problems
) -> list[Draft | Built]:
    text = read_text(path, problems)
    if text is None:
        return []
    try:
        return [Built(w) for w in plain.read_services(name_of(path), text, default_mode)]
    except plain.NotPlain:
        document = compose(name_of(path), text, problems)
        return [] if document is None else load_services(document, default_mode, problems)


def load_services(
    document: Document, default_mode: Mode | None, problems: Problems
) -> list[Draft | Built]:
    """The services of one file, by its nodes; a file with only comments has none."""
    if document.root is None:
        return []
    reader = Reader(document.file, problems)
    root: KeyPath = ("services",) if isinstance(document.root, SequenceNode) else ()
    found = reader.read(document.root, ServicesFile, root)
    entries: list[tuple[KeyPath, ServiceEntry | UnsetType]] = [(root, found)]
    if isinstance(document.root, SequenceNode):
        entries = [((*root, at), entry) for at, entry in enumerate(found)]
    drafts = [Draft(reader, path, e) for path, e in entries if isinstance(e, ServiceEntry)]
    return [
        draft if draft.requests() else Built(draft.build(default_mode, NO_POOLS))
        for draft in drafts
    ]


class FileSource:
    """The two places where an operator writes, as something to load and to watch."""

    def __init__(self, config: Path, services: Path) -> None:
        self.config = config
        self.services = services
        self._kept: Kept = {}

    def load(self) -> Configuration:
        """As the module's `load`. Raises: ConfigErrors."""
        return self.merged(State()).configuration

    def merged(
        self, state: State, must: Collection[str] = (), newest: tuple[Draft, Problems] | None = None
    ) -> Loaded:
        """The files with services of the API, as `merge`. Raises: ConfigErrors."""
        try:
            files = read_files(self.config, self.services, self._kept)
            return merge(files, state, must, newest)
        except Stale:  # rare: a pool lost an address, say
            self._kept = {path: r for path, r in self._kept.items() if not r.asks_pools()}
            files = read_files(self.config, self.services, self._kept)
            return merge(files, state, must, newest)

    def paths(self) -> list[Path]:
        """What to give to `shunt.kern.inotify.Watch`, which watches directories for it."""
        places = (self.config, self.config.resolve(), self.services)
        return list(dict.fromkeys(path.absolute() for path in places))

    def concerns(self, changed: Iterable[str | Path]) -> bool:
        """Whether loading could give something else now that these paths changed.

        An editor's swap file beside the services is no reason to load.
        """
        watched = self.paths()
        services = self.services.absolute()
        return any(
            path in watched or (path.parent == services and _is_read(path.name))
            for path in map(Path, changed)
        )
