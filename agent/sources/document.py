# SPDX-License-Identifier: Apache-2.0
"""YAML text as a tree of nodes that know their line; nothing is constructed from it here.

A file is input from outside: its size, its depth and what its aliases expand to are limited, so
that no file can take the agent down.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import yaml
from yaml.composer import Composer, ComposerError
from yaml.cyaml import CSafeLoader
from yaml.error import MarkedYAMLError, YAMLError
from yaml.events import AliasEvent
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.reader import ReaderError
from yaml.scanner import ScannerError

from .problems import Place, Problems, shown

MOST_BYTES = 16 << 20
MOST_NODES = 2_000_000  # 131,072 backends written as mappings are some 900,000
MOST_DEPTH = 32

NULL_TAG = "tag:yaml.org,2002:null"
MERGE_TAG = "tag:yaml.org,2002:merge"


def place_of(file: str, node: Node) -> Place:
    """Where a node begins."""
    return Place(file, node.start_mark.line + 1)


@dataclass(frozen=True, slots=True)
class Document:
    """A file that is YAML. Without a root it has only comments."""

    file: str
    root: Node | None


def name_of(path: Path) -> str:
    """A path as text that can be printed, whatever bytes its name has."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def read(path: Path, problems: Problems) -> Document | None:
    """The document in a file; None, with errors noted, if it has none that can be read."""
    text = _read_text(path, problems)
    return None if text is None else compose(name_of(path), text, problems)


def _read_text(path: Path, problems: Problems) -> str | None:
    place = Place(name_of(path))
    try:
        # O_NONBLOCK: a FIFO of this name must not stop the agent.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as stream:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                why = "a configuration is read from regular files"
                problems.add(place, "not a regular file", why, "remove or rename it")
                return None
            data = stream.read(MOST_BYTES + 1)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        problems.add(place, "cannot be read", why, "let shuntd read this file, or remove it")
        return None
    if not data:
        # Whoever writes a file in place empties it first: its services must not go for that.
        why = "so does one look that is just being written, and its services would be removed"
        fix = "finish writing it; to have no services, remove the file or leave a comment in it"
        problems.add(Place(place.file, 1), "the file is empty", why, fix)
        return None
    if len(data) > MOST_BYTES:
        why = f"a file may have {MOST_BYTES >> 20} MiB"
        problems.add(place, "too large", why, "spread its services over several files")
        return None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = Place(place.file, data.count(b"\n", 0, error.start) + 1)
        why = f"byte 0x{data[error.start]:02x} at offset {error.start} is not part of a character"
        problems.add(where, "not UTF-8 text", why, "save the file as UTF-8")
        return None


class _TooMuch(ComposerError):
    """Valid YAML that no configuration needs."""

    def __init__(self, problem: str, mark: yaml.Mark) -> None:
        super().__init__(None, None, problem, mark)


class _Limited:
    """Composing that counts: goes before a PyYAML composer."""

    def __init__(self) -> None:
        self._depth = 0
        self._nodes = 0
        # Of each finished node: its height and its size with aliases expanded.
        self._extent: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: Node | None, index: object) -> Node:
        event = self.peek_event()  # type: ignore[attr-defined]
        mark = event.start_mark
        if isinstance(event, AliasEvent):
            node: Node = super().compose_node(parent, index)  # type: ignore[misc]
            if id(node) not in self._extent:
                raise _TooMuch("an alias stands inside its own anchor", mark)
            return node
        self._depth += 1
        self._nodes += 1
        self._check(self._depth, self._nodes, mark)
        node = super().compose_node(parent, index)  # type: ignore[misc]
        self._depth -= 1
        height, size = 0, 1
        for child in _children(node):
            child_height, child_size = self._extent[id(child)]
            height, size = max(height, child_height), size + child_size
        self._extent[id(node)] = height + 1, size
        self._check(height + 1, size, mark)
        return node

    @staticmethod
    def _check(depth: int, size: int, mark: yaml.Mark) -> None:
        if depth > MOST_DEPTH:
            raise _TooMuch(f"nested deeper than {MOST_DEPTH} levels", mark)
        if size > MOST_NODES:
            raise _TooMuch(f"more than {MOST_NODES} values", mark)


class _Loader(_Limited, Composer, CSafeLoader):
    """Composer goes before libyaml's parser, whose own composing cannot be limited."""

    def __init__(self, text: str) -> None:
        _Limited.__init__(self)
        Composer.__init__(self)
        CSafeLoader.__init__(self, text)


def _children(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, SequenceNode) else []


def compose(file: str, text: str, problems: Problems) -> Document | None:
    """The one document in `text`; None, with an error noted, if it is not YAML.

    Duplicate keys are noted too, and the first one stays.
    """
    try:
        loader = _Loader(text)
        try:
            node: Node | None = loader.get_single_node()
        finally:
            loader.dispose()
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        # What is missing at the end is reported after the last line.
        line = min(mark.line + 1 if mark else 1, max(1, len(text.splitlines())))
        _note_syntax(problems, Place(file, line), error)
        return None
    except ReaderError as error:
        # libyaml counts bytes and gives the character's number; the types know only PyYAML's own.
        line = text.encode().count(b"\n", 0, error.position) + 1
        character: object = error.character
        number = character if isinstance(character, int) else ord(str(character))
        why = f"character U+{number:04X} may not stand in YAML"
        problems.add(Place(file, line), "not valid YAML", why, "remove the character")
        return None
    except YAMLError as error:
        problems.add(Place(file, 1), "not valid YAML", shown(str(error)), "correct the file")
        return None
    if node is None or node.tag == NULL_TAG:
        return Document(file, None)
    _drop_duplicate_keys(file, node, problems, set())
    return Document(file, node)


def _note_syntax(problems: Problems, place: Place, error: MarkedYAMLError) -> None:
    why = error.problem or "the text cannot be parsed"
    if error.context:
        why = f"{why} ({error.context})"
    fix = "correct the indentation or quotes here or just above"
    if isinstance(error, _TooMuch):
        fix = "write the values out plainly, in several files if need be"
    elif isinstance(error, ComposerError) and "undefined alias" in why:
        fix = "define the anchor above its use, or quote a value that begins with *"
    elif "expected a single document" in why:
        why, fix = "a second document begins here", "write several services as one list"
    elif not isinstance(error, ScannerError) or "mapping values" in why:
        fix += "; IPv6 addresses in [ ], and values with ': ' in them, need quotes"
    problems.add(place, "not valid YAML", why, fix)


def _drop_duplicate_keys(file: str, node: Node, problems: Problems, seen: set[int]) -> None:
    """Recursion is bounded by MOST_DEPTH; `seen` keeps what aliases share from being told twice."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, MappingNode):
        first: dict[str, ScalarNode] = {}
        pairs = []
        for key, value in node.value:
            if isinstance(key, ScalarNode) and key.tag != MERGE_TAG:
                if key.value in first:
                    where = place_of(file, first[key.value])
                    what = f'key "{shown(key.value)}" stands twice'
                    why = f"the first one is at {where}"
                    problems.add(place_of(file, key), what, why, "keep one of the two")
                    continue
                first[key.value] = key
            pairs.append((key, value))
        node.value = pairs
    for child in _children(node):
        _drop_duplicate_keys(file, child, problems, seen)
