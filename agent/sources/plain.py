# SPDX-License-Identifier: Apache-2.0
"""The fast way to read a file of services: for one that is plain and has no error.

`document` and `typed` make a node of each value, so that every error has its line. Of 10,000
services without an error that is most of what reading takes. Here libyaml's events are put together
at once, and msgspec converts all services in one call. What is out of the ordinary (anchors, tags,
keys that merge or stand twice) and any error at all raise NotPlain: then the slow way reads the
file anew, and it alone says what is wrong. Both give equal services; a test compares.
"""

import re
from typing import Any, NoReturn

import msgspec
from yaml._yaml import CParser
from yaml.error import YAMLError
from yaml.events import (
    AliasEvent,
    DocumentEndEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
    StreamStartEvent,
)

from shunt.lb.model import Mode

from .document import MOST_NODES
from .pools import NO_POOLS, asks_pools
from .problems import Place
from .services import Written, build_service
from .shape import ServiceEntry, ServicesFile
from .typed import Path

MOST_DEPTH = 8  # no shape has more
# Decimal numbers, as they are written by people; any other form of one is left to the slow way.
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")
_NULLS = frozenset(("", "~", "null", "Null", "NULL"))
_MERGE = "<<"


class NotPlain(Exception):
    """The slow way is to read this file."""


class _Sequence(list[Any]):
    """A list that knows where its items begin."""

    __slots__ = ("lines",)

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[int] = []


class _Mapping(dict[str, Any]):
    """A mapping that knows where its keys stand."""

    __slots__ = ("lines",)

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[str, int] = {}


class _Lines:
    """Stands for `typed.Reader` where nothing is wrong: says where values are, and no more."""

    def __init__(self, file: str, root: Any) -> None:
        self._file, self._root = file, root

    def place(self, path: Path) -> Place:
        """Where a value stands: its key, or itself in a list."""
        value, line = self._root, 1
        part: Any
        for part in path[1:] if path and path[0] == "services" else path:
            if not isinstance(value, _Sequence | _Mapping) or (
                isinstance(value, _Mapping) and part not in value
            ):
                raise NotPlain("a place of what is not written")  # wanted for an error
            line, value = value.lines[part], value[part]
        return Place(self._file, line)

    def written(self, path: Path) -> bool:
        try:
            self.place(path)
        except NotPlain:
            return False
        return True

    def trusts(self, _path: Path) -> bool:
        return True

    def refuse(self, _path: Path, what: str, _wants: str, _fix: str) -> NoReturn:
        raise NotPlain(what)

    def error(self, _path: Path, what: str, _why: str, _fix: str) -> NoReturn:
        raise NotPlain(what)


def read_services(file: str, text: str, default_mode: Mode | None) -> list[Written]:
    """The services of a file.

    Raises: NotPlain if it cannot be read in this way, has an error, or asks a pool.
    """
    try:
        root = _compose(CParser(text))
        found = msgspec.convert(root, ServicesFile)
    except (YAMLError, msgspec.ValidationError) as error:
        raise NotPlain(str(error)) from error
    lines: Any = _Lines(file, root)
    if isinstance(found, ServiceEntry):
        entries: list[tuple[Path, ServiceEntry]] = [((), found)]
    else:
        entries = [(("services", at), entry) for at, entry in enumerate(found)]
    if any(asks_pools(entry) for _, entry in entries):
        raise NotPlain("an address of a pool, which is given later")
    return [build_service(lines, path, entry, default_mode, NO_POOLS) for path, entry in entries]


def _compose(parser: Any) -> Any:
    """The one document, as lists, mappings, text and numbers. Raises: NotPlain, YAMLError."""
    next_event = parser.get_event
    _expect(next_event(), StreamStartEvent)
    _expect(next_event(), DocumentStartEvent)
    event = next_event()
    if not isinstance(event, SequenceStartEvent | MappingStartEvent):
        raise NotPlain("a single value")
    root = _collection(event)
    open_ones: list[tuple[Any, Any]] = []
    here: Any = root
    key: Any = None
    count = 1
    while True:
        event = next_event()
        kind = type(event)
        count += 1
        if kind is ScalarEvent:
            if event.tag is not None or event.anchor is not None:
                raise NotPlain("a tag or an anchor")
            value = event.value
            if type(here) is _Mapping and key is None:
                if value in here or value == _MERGE:
                    raise NotPlain("a key twice, or one that merges")
                here.lines[value] = event.start_mark.line + 1
                key = value
                continue
            if not event.style:  # plain: neither in quotes nor a block
                if value in _NULLS:
                    raise NotPlain("no value")
                # An address begins with a digit, too, and is no number.
                if value.isdecimal() and _NUMBER.fullmatch(value):
                    value = int(value)
        elif kind is SequenceStartEvent or kind is MappingStartEvent:
            value = _collection(event)
            if type(here) is _Mapping and key is None:
                raise NotPlain("a key that is no word")
        elif kind is SequenceEndEvent or kind is MappingEndEvent:
            if not open_ones:
                break
            here, key = open_ones.pop()
            continue
        else:
            raise NotPlain("an alias" if kind is AliasEvent else str(kind))
        if type(here) is _Mapping:
            here[key] = value
            key = None
        else:
            here.lines.append(event.start_mark.line + 1)
            here.append(value)
        if kind is not ScalarEvent:
            open_ones.append((here, key))
            here, key = value, None
            if len(open_ones) > MOST_DEPTH:
                raise NotPlain("deep")
        if count > MOST_NODES:
            raise NotPlain("large")
    _expect(next_event(), DocumentEndEvent)
    _expect(next_event(), StreamEndEvent)
    return root


def _collection(event: Any) -> Any:
    if event.tag is not None or event.anchor is not None:
        raise NotPlain("a tag or an anchor")
    return _Mapping() if type(event) is MappingStartEvent else _Sequence()


def _expect(event: Any, kind: type) -> None:
    if not isinstance(event, kind):
        raise NotPlain(f"{event} where {kind.__name__} is due")
