# SPDX-License-Identifier: Apache-2.0
"""Decoded JSON as the tree that a file's reader reads. It has no lines."""

from typing import Any

from yaml.error import Mark
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from .document import MOST_DEPTH, NULL_TAG

_TAG = "tag:yaml.org,2002:"
# One before the first: errors name the document alone.
_NOWHERE = Mark("", 0, -1, 0, None, 0)


class TooDeep(ValueError):
    """Nested deeper than any configuration is."""


def node_of(value: Any, depth: int = 0) -> Node:
    """The tree of a value.

    Raises: TooDeep.
    """
    if depth >= MOST_DEPTH:
        raise TooDeep(f"nested deeper than {MOST_DEPTH} levels")
    if isinstance(value, dict):
        pairs = [(_scalar("str", key), node_of(item, depth + 1)) for key, item in value.items()]
        return MappingNode(f"{_TAG}map", pairs, _NOWHERE, _NOWHERE)
    if isinstance(value, list):
        items = [node_of(item, depth + 1) for item in value]
        return SequenceNode(f"{_TAG}seq", items, _NOWHERE, _NOWHERE)
    if value is None:
        return ScalarNode(NULL_TAG, "", _NOWHERE, _NOWHERE)
    if isinstance(value, bool):
        return _scalar("bool", str(value).lower())
    if isinstance(value, int | float):
        return _scalar(type(value).__name__, str(value))
    return ScalarNode(f"{_TAG}str", value, _NOWHERE, _NOWHERE, style='"')


def _scalar(kind: str, text: str) -> ScalarNode:
    return ScalarNode(_TAG + kind, text, _NOWHERE, _NOWHERE)
