# SPDX-License-Identifier: Apache-2.0
"""Files as the source: shunt.yaml and services.d/*.yaml to one checked Configuration, or none."""

import os
from collections.abc import Collection, Iterable
from pathlib import Path

from msgspec import UnsetType
from yaml.nodes import SequenceNode

from shunt.lb.model import Configuration, Mode

from .document import Document, name_of, read
from .merge import Draft, Files, Loaded, merge
from .pools import build_pools
from .problems import ConfigError, ConfigErrors, Place, Problems
from .settings import build_settings
from .shape import ServiceEntry, ServicesFile, SettingsFile
from .store import State
from .typed import Path as KeyPath
from .typed import Reader

__all__ = ["ConfigError", "ConfigErrors", "FileSource", "Place", "load", "service_files"]

SUFFIX = ".yaml"


def load(config: Path, services: Path, state: State | None = None) -> Configuration:
    """Read and check everything; with a state, also services of the API.

    Shape:  equal files give equal configurations; services are sorted by name.
    Raises: ConfigErrors with all errors of all files. What was loaded before stays in force.
    """
    return merge(read_files(config, services), state or State()).configuration


def read_files(config: Path, services: Path) -> Files:
    """What all files say, and their errors; nothing is raised yet."""
    problems = Problems()
    files = _load_settings(config, problems)
    for path in _listed(services, problems):
        document = read(path, problems)
        if document is not None:
            files.drafts += _load_services(document, problems)
    return files


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


def _load_services(document: Document, problems: Problems) -> list[Draft]:
    """The services of one file; a file with only comments has none."""
    if document.root is None:
        return []
    reader = Reader(document.file, problems)
    root: KeyPath = ("services",) if isinstance(document.root, SequenceNode) else ()
    found = reader.read(document.root, ServicesFile, root)
    entries: list[tuple[KeyPath, ServiceEntry | UnsetType]] = [(root, found)]
    if isinstance(document.root, SequenceNode):
        entries = [((*root, at), entry) for at, entry in enumerate(found)]
    return [
        Draft(reader, path, entry) for path, entry in entries if isinstance(entry, ServiceEntry)
    ]


class FileSource:
    """The two places where an operator writes, as something to load and to watch."""

    def __init__(self, config: Path, services: Path) -> None:
        self._config = config
        self._services = services

    def load(self) -> Configuration:
        """As the module's `load`. Raises: ConfigErrors."""
        return load(self._config, self._services)

    def merged(
        self, state: State, must: Collection[str] = (), newest: tuple[Draft, Problems] | None = None
    ) -> Loaded:
        """The files with services of the API, as `merge`. Raises: ConfigErrors."""
        return merge(read_files(self._config, self._services), state, must, newest)

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
