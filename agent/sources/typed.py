# SPDX-License-Identifier: Apache-2.0
"""From nodes to the Structs of `shape`, one leaf at a time, so that every error keeps its line.

msgspec alone would stop at the first error and knows no lines. Here it converts each scalar by
itself; what fails is noted, UNSET stands in its place, and reading goes on.
"""

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import UNSET, Struct, ValidationError
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from .document import MERGE_TAG, NULL_TAG, place_of
from .kinds import Kinds, any_of, fields_of, kinds_of
from .problems import Place, Problems, nearest, shown

Path = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
# Plain text that YAML 1.1 takes for something else (2001:10:20, yes, =) is text where text is due.
_SCALAR_TAGS = {_TAG + kind for kind in ("str", "int", "float", "bool", "timestamp", "value")}
_SCALAR_TAGS.add(MERGE_TAG)


def path_text(path: Path) -> str:
    """A path as people write it: services[2].backends[0]."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".") or "the file"


def noun(path: Path) -> str:
    """What to call the value at a path: its key, or of a list's item the key's singular."""
    if not path:
        return "the file"
    if isinstance(path[-1], int):
        return str(path[-2]).removesuffix("s")
    return path[-1]


def each(path: Path, value: Any) -> Iterator[tuple[Path, Any]]:
    """The items of a list, or the value that stands for one; not what was refused."""
    items = [(path, value)]
    if isinstance(value, list):
        items = [((*path, at), item) for at, item in enumerate(value)]
    return ((where, item) for where, item in items if item is not UNSET)


class Reader:
    """Reads one file's tree; remembers where each value stands."""

    def __init__(self, file: str, problems: Problems) -> None:
        self.file = file
        self._problems = problems
        self._lines: dict[Path, int] = {}
        self._refused: set[Path] = set()  # and everything above what was refused

    def place(self, path: Path) -> Place:
        """Where a value stands; of one that is not written, where its mapping begins."""
        while path and path not in self._lines:
            path = path[:-1]
        return Place(self.file, self._lines.get(path, 1))

    def written(self, path: Path) -> bool:
        """Whether the file has a value at `path`."""
        return path in self._lines

    def trusts(self, path: Path) -> bool:
        """Whether nothing at `path` or below it was refused."""
        return path not in self._refused

    def refuse(self, path: Path, what: str, wants: str, fix: str) -> None:
        """Note that the value at `path` is not what is wanted there."""
        self.error(path, what, f"{path_text(path)} wants {wants}", fix)

    def error(self, path: Path, what: str, why: str, fix: str) -> None:
        """Note any other error at `path`."""
        self._refused.update(path[:end] for end in range(len(path) + 1))
        self._problems.add(self.place(path), what, why, fix)

    def read(self, node: Node, hint: Any, path: Path = ()) -> Any:
        """The value of `node` as the type `hint`; UNSET, with errors noted, where it is none."""
        self._lines.setdefault(path, place_of(self.file, node).line)
        kinds = kinds_of(hint)
        if isinstance(node, MappingNode) and kinds.mapping is not None:
            return self._struct(node, kinds.mapping, path)
        if isinstance(node, MappingNode) and kinds.entries is not None:
            return self._entries(node, *kinds.entries, path)
        if isinstance(node, SequenceNode) and kinds.item is not None:
            return self._list(node, kinds, path)
        if isinstance(node, ScalarNode) and kinds.scalar is not None and not _is_null(node):
            return self._scalar(node, kinds, path)
        if isinstance(node, ScalarNode):
            form = "has no value" if _is_null(node) else f"is the single value {shown(node.value)}"
        else:
            form = "is a mapping" if isinstance(node, MappingNode) else "is a list"
        fix = _fix(kinds)
        if form == "has no value":
            fix = f"give it one, such as {kinds.example}" if kinds.example else "remove the key"
        self.refuse(path, f"{noun(path)} {form}", kinds.wants, fix)
        return UNSET

    def _list(self, node: SequenceNode, kinds: Kinds, path: Path) -> list[Any]:
        if len(node.value) < kinds.fewest:
            wants = f"at least {kinds.fewest}"
            self.refuse(path, f"{noun(path)} is empty", wants, _fix(kinds))
        # What fails stays as UNSET, so that an item's number is that of the file.
        return [self.read(item, kinds.item, (*path, at)) for at, item in enumerate(node.value)]

    def _entries(self, node: MappingNode, names: Any, hint: Any, path: Path) -> dict[str, Any]:
        """A mapping of the operator's own names; what was refused is left out."""
        found: dict[str, Any] = {}
        for key, key_node, value in self._pairs(node, path):
            where = (*path, key)
            self._lines[where] = place_of(self.file, key_node).line
            try:
                msgspec.convert(key, names)
            except ValidationError:
                kinds = kinds_of(names)
                wants = f"{path_text(path)} wants names of {kinds.wants}"
                what = f"{noun(path).removesuffix('s')} {shown(key)} is no name"
                self.error(where, what, wants, _fix(kinds))
                continue
            entry = self.read(value, hint, where)
            if entry is not UNSET:
                found[key] = entry
        return found

    def _struct(self, node: MappingNode, shape: type[Struct], path: Path) -> Struct:
        fields = fields_of(shape)
        values: dict[str, Any] = {}
        for key, key_node, value in self._pairs(node, path):
            if key not in fields:
                self._refuse_key(key_node, key, list(fields), path)
                continue
            self._lines[(*path, key)] = place_of(self.file, key_node).line
            values[key] = self.read(value, fields[key].type, (*path, key))
        required = [key for key, field in fields.items() if field.required]
        for key in required:
            if key not in values:
                what = f'{noun(path)} has no "{key}"'
                example = kinds_of(fields[key].type).example
                self.refuse(path, what, any_of(required, "and"), f'add "{key}: {example}"')
                values[key] = UNSET
        # An optional value that failed stands as its default; its error is noted already.
        return shape(
            **{
                fields[key].name: value
                for key, value in values.items()
                if value is not UNSET or fields[key].required
            }
        )

    def _pairs(self, node: MappingNode, path: Path) -> Iterator[tuple[str, Node, Node]]:
        """Own keys first; then those that `<<` merges, where not given already."""
        given = set()
        merged: list[Node] = []
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                why = f"{path_text(path)} wants keys that are single words"
                self._add(key, "a key is a list or a mapping", why, "write it as KEY: VALUE")
            elif key.tag == MERGE_TAG:
                merged += value.value if isinstance(value, SequenceNode) else [value]
            else:
                given.add(key.value)
                yield key.value, key, value
        for other in merged:
            if not isinstance(other, MappingNode):
                why = f"{path_text(path)}.<< wants an alias of a mapping"
                self._add(other, "<< merges what is not a mapping", why, "write <<: *ANCHOR")
                continue
            for name, key, value in self._pairs(other, path):
                if name not in given:
                    given.add(name)
                    yield name, key, value

    def _refuse_key(self, node: Node, key: str, known: list[str], path: Path) -> None:
        meant = nearest(key, known)
        fix = f'perhaps "{meant}" is meant' if meant else "remove it"
        why = f"{path_text(path)} knows {', '.join(known)}"
        self._add(node, f'unknown key "{shown(key)}"', why, fix)

    def _add(self, node: Node, what: str, why: str, fix: str) -> None:
        self._problems.add(place_of(self.file, node), what, why, fix)

    def _scalar(self, node: ScalarNode, kinds: Kinds, path: Path) -> Any:
        if node.tag not in _SCALAR_TAGS:
            what = f"{noun(path)} has the tag {shown(node.tag)}"
            self.refuse(path, what, kinds.wants, "remove the tag")
            return UNSET
        try:
            return msgspec.convert(_plain(node, kinds), kinds.scalar)
        except ValidationError as error:
            failure = str(error)
        out_of_range = "`int` >=" in failure or "`int` <=" in failure
        form = "is out of range" if out_of_range else "is not accepted"
        fix = _fix(kinds)
        if meant := nearest(node.value.lower(), kinds.choices):
            fix = f'perhaps "{meant}" is meant'
        elif node.style in ("'", '"') and node.value.isdecimal() and str not in kinds.plain:
            fix = "write it without quotes"
        self.refuse(path, f"{noun(path)} {shown(node.value)} {form}", kinds.wants, fix)
        return UNSET


def _is_null(node: ScalarNode) -> bool:
    return node.tag == NULL_TAG


def _fix(kinds: Kinds) -> str:
    if kinds.fix:
        return kinds.fix
    return f"correct the value; an example is {kinds.example}" if kinds.example else "correct it"


def _plain(node: ScalarNode, kinds: Kinds) -> int | float | str:
    """The value as a number where YAML and the shape both have one here, else as its text."""
    try:
        if node.tag == _TAG + "int" and kinds.plain & {int, float}:
            # Base 0 refuses 010, which is 8 in YAML 1.1 and 10 in 1.2.
            return int(node.value, 0)
        if node.tag == _TAG + "float" and float in kinds.plain:
            return float(node.value)
    except ValueError:
        pass
    return str(node.value)
