# SPDX-License-Identifier: Apache-2.0
"""What a type of `shape` lets a value be written as, and how to say so to a person."""

from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import Meta, Struct, UnsetType


@dataclass(frozen=True)
class Kinds:
    """At most one type for each kind of node, and the words for all of them."""

    scalar: Any = None
    item: Any = None
    mapping: type[Struct] | None = None
    entries: tuple[Any, Any] | None = None  # of a mapping with names of the operator's own
    fewest: int = 0
    wants: str = ""
    example: str = ""
    fix: str = ""
    plain: frozenset[Any] = frozenset()
    choices: tuple[str, ...] = ()


@cache
def kinds_of(hint: Any) -> Kinds:
    """The kinds of a type, taken apart once."""
    scalars: list[Any] = []
    found: dict[str, Any] = {}
    forms: list[str] = []
    for member in _members(hint):
        bare, meta = _bare(member)
        if get_origin(bare) is list:
            found["item"] = get_args(bare)[0]
            found["fewest"] = meta.min_length or 0
            forms.append("a list")
        elif get_origin(bare) is dict:
            found["entries"] = get_args(bare)
            forms.append("a mapping")
        elif isinstance(bare, type) and issubclass(bare, Struct):
            found["mapping"] = bare
            forms.append("a mapping")
        elif bare is not UnsetType:
            scalars.append(member)
            forms += get_args(bare) if get_origin(bare) is Literal else [_form(bare, meta)]
        found["fix"] = found.get("fix") or str((meta.extra or {}).get("fix", ""))
        found["example"] = found.get("example") or _example(meta)
    if scalars:
        found["scalar"] = Union[tuple(scalars)]  # noqa: UP007  # known only now
    bares = [_bare(scalar)[0] for scalar in scalars]
    literals = [bare for bare in bares if get_origin(bare) is Literal]
    return Kinds(
        wants=any_of(forms),
        plain=frozenset(bare for bare in bares if isinstance(bare, type)),
        choices=tuple(value for literal in literals for value in get_args(literal)),
        **found,
    )


@cache
def fields_of(shape: type[Struct]) -> dict[str, msgspec.structs.FieldInfo]:
    """The fields of a Struct by the key that stands for them."""
    return {field.encode_name: field for field in msgspec.structs.fields(shape)}


def any_of(forms: list[str], word: str = "or") -> str:
    """An enumeration: a, b or c."""
    return f" {word} ".join(filter(None, [", ".join(forms[:-1]), forms[-1]]))


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _bare(hint: Any) -> tuple[Any, Meta]:
    if get_origin(hint) is Annotated:
        bare, meta = get_args(hint)[:2]
        return bare, meta
    return hint, Meta()


def _example(meta: Meta) -> str:
    if not meta.examples:
        return ""
    example = meta.examples[0]
    return f"[{', '.join(map(str, example))}]" if isinstance(example, list) else str(example)


def _form(bare: Any, meta: Meta) -> str:
    if meta.description:
        return meta.description
    most = (meta.extra_json_schema or {}).get("maximum", meta.le)
    return f"an integer from {meta.ge} to {most}"
