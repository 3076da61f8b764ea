# SPDX-License-Identifier: Apache-2.0
"""Files as the source: shunt.yaml and services.d/*.yaml to one checked Configuration, or none."""

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from msgspec import UnsetType
from yaml.nodes import SequenceNode

from shunt.lb.model import Configuration, Mode, Settings

from . import plain
from .document import Document, compose, name_of, read, read_text
from .problems import ConfigError, ConfigErrors, Place, Problems
from .rules import check_limits, check_services
from .services import Written, build_service
from .settings import build_settings
from .shape import ServiceEntry, ServicesFile, SettingsFile
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
    written: list[Written]


Kept = dict[Path, _Read]


def load(config: Path, services: Path, kept: Kept | None = None) -> Configuration:
    """Read and check everything.

    `kept` has what was read before, and is brought up to date: files that are as they were are
    not read again.

    Shape:  equal files give equal configurations; services are sorted by name.
    Raises: ConfigErrors with all errors of all files. What was loaded before stays in force.
    """
    problems = Problems()
    settings, default_mode, reader = _load_settings(config, problems)
    written: list[Written] = []
    before = {} if kept is None else kept.copy()
    now: Kept = {}
    for path in _listed(services, problems):
        known = before.get(path)
        stamp = _stamp(path)
        if known is None or stamp != known.stamp or default_mode != known.default_mode:
            noted = len(problems)
            known = _Read(stamp, default_mode, _read_services(path, default_mode, problems))
            lasting = len(problems) == noted and stamp == _stamp(path) and _is_old(stamp)
        else:
            lasting = True
        written += known.written
        if lasting:
            now[path] = known
    if kept is not None:
        kept.clear()
        kept.update(now)
    check_services(written, problems)
    if settings is not None and reader.trusts(("limits",)):
        check_limits(
            written, settings.limits, lambda name: reader.place(("limits", name)), problems
        )
    problems.raise_any()
    assert settings is not None  # else a problem was noted
    ordered = sorted((item.service for item in written), key=lambda service: service.name)
    return Configuration(settings, tuple(ordered))


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


def _read_services(path: Path, default_mode: Mode | None, problems: Problems) -> list[Written]:
    text = read_text(path, problems)
    if text is None:
        return []
    try:
        return plain.read_services(name_of(path), text, default_mode)
    except plain.NotPlain:
        document = compose(name_of(path), text, problems)
        return [] if document is None else load_services(document, default_mode, problems)


def _load_settings(config: Path, problems: Problems) -> tuple[Settings | None, Mode | None, Reader]:
    reader = Reader(name_of(config), problems)
    document = read(config, problems)
    if document is None:
        return None, None, reader
    if document.root is None:
        what, why = "the file is empty", "the file wants interfaces"
        problems.add(Place(document.file, 1), what, why, 'add "interfaces: [eth0]"')
        return None, None, reader
    found = reader.read(document.root, SettingsFile)
    if not isinstance(found, SettingsFile):
        return None, None, reader
    default_mode = Mode(found.mode) if reader.trusts(("mode",)) else None
    return build_settings(reader, found), default_mode, reader


def load_services(
    document: Document, default_mode: Mode | None, problems: Problems
) -> list[Written]:
    """The services of one file, by its nodes; a file with only comments has none."""
    if document.root is None:
        return []
    reader = Reader(document.file, problems)
    root: KeyPath = ("services",) if isinstance(document.root, SequenceNode) else ()
    found = reader.read(document.root, ServicesFile, root)
    entries: list[tuple[KeyPath, ServiceEntry | UnsetType]] = [(root, found)]
    if isinstance(document.root, SequenceNode):
        entries = [((*root, at), entry) for at, entry in enumerate(found)]
    return [
        build_service(reader, path, entry, default_mode)
        for path, entry in entries
        if isinstance(entry, ServiceEntry)
    ]


class FileSource:
    """The two places where an operator writes, as something to load and to watch."""

    def __init__(self, config: Path, services: Path) -> None:
        self._config = config
        self._services = services
        self._kept: Kept = {}

    def load(self) -> Configuration:
        """As the module's `load`. Raises: ConfigErrors."""
        return load(self._config, self._services, self._kept)

    def paths(self) -> list[Path]:
        """What to give to `shunt.kern.inotify.Watch`, which watches directories for it."""
        places = (self._config, self._config.resolve(), self._services)
        return list(dict.fromkeys(path.absolute() for path in places))

    def concerns(self, changed: Iterable[str | Path]) -> bool:
        """Whether loading could give something else now that these paths changed.

        An editor's swap file beside the services is no reason to load.
        """
        watched = self.paths()
        services = self._services.absolute()
        return any(
            path in watched or (path.parent == services and _is_read(path.name))
            for path in map(Path, changed)
        )
