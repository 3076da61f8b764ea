# SPDX-License-Identifier: Apache-2.0
"""Configuration and logs without their secrets, for people who are to see no more than they need.

Pure. When in doubt it hides too much: a value is hidden by the name it stands under, with all that
is in it, and a file that cannot be understood loses all of its values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import yaml

HIDDEN = "(hidden)"
# Parts of names under which secrets stand. The seed is one: who has it can aim flows at one slot.
SECRET = (
    r"pass(?:word|wd|phrase)?|secret|token|credential|private|auth(?:orization)?|cookie|seed|"
    r"api[-_]?key|key"
)
# What a check sends, or runs: headers and arguments often carry secrets under harmless names.
WHOLE = r"headers?|exec|argv|args|command|body|send|payload"
_NAME = re.compile(rf"(?:^|.*[-_.])?(?:(?:{SECRET})s?|{WHOLE})(?:[-_.].*)?$", re.IGNORECASE)
_ASSIGNED = re.compile(
    rf"(?i)((?<![a-z])[\w.-]*(?:{SECRET})s?[\"']?\s*[:=]\s*)(?!\s|{re.escape(HIDDEN)}).+"
)
_URL = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/@\"']+@")
_SCHEME = re.compile(r"(?i)\b(bearer|basic|digest)\s+[\w+/=.~-]{6,}")
_PEM = re.compile(r"-----BEGIN [^-]+-----.*?(?:-----END [^-]+-----|\Z)", re.DOTALL)
_KEY_OF_LINE = re.compile(r"^(\s*(?:- +)*[\w./-]+:)(?:\s.*)?$")


def hides(name: str) -> bool:
    """Whether what stands under a name is hidden."""
    return _NAME.match(name) is not None


def redact_text(text: str) -> str:
    """Any text: what looks like a secret is hidden, to the end of its line."""
    text = _PEM.sub(HIDDEN, text)
    text = _URL.sub(rf"\1{HIDDEN}@", text)
    text = _SCHEME.sub(rf"\1 {HIDDEN}", text)
    return "\n".join(_ASSIGNED.sub(rf"\1{HIDDEN}", line) for line in text.split("\n"))


def redact_yaml(text: str) -> str:
    """A configuration file: what stands under a secret's name is hidden, the rest as written."""
    try:
        spans = sorted(set(_spans(text)), key=lambda span: (span[0], -span[1]))
    except (yaml.YAMLError, RecursionError, ValueError):
        return _names_alone(text)
    parts, at = [], 0
    for start, end in spans:
        if start < at:  # inside one that is hidden already
            continue
        parts += [text[at:start], HIDDEN if text[start - 1 : start] != ":" else f" {HIDDEN}"]
        at = start + len(text[start:end].rstrip())  # a block ends where the next one begins
    return _comments("".join([*parts, text[at:]]))


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """Where hidden values stand. An alias leads to where its anchor is."""
    seen: set[int] = set()
    waiting = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and hides(key.value):
                    start, end = value.start_mark.index, value.end_mark.index
                    between = text[key.end_mark.index : start]
                    if "\n" in between:  # it begins on a line of its own
                        start = key.end_mark.index + between.index(":") + 1
                    yield start, end
                    yield from _all_in(value)
                else:
                    waiting += [key, value]


def _all_in(node: yaml.Node) -> Iterator[tuple[int, int]]:
    """A value's place, and those of anchors elsewhere that it names."""
    waiting, seen = [node], set()
    while waiting:
        found = waiting.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        yield found.start_mark.index, found.end_mark.index
        if isinstance(found, yaml.SequenceNode):
            waiting += found.value
        elif isinstance(found, yaml.MappingNode):
            waiting += [part for pair in found.value for part in pair]


def _comments(text: str) -> str:
    """Comments are text like any other."""
    lines = []
    for line in text.split("\n"):
        before, mark, comment = line.partition("#")
        lines.append(
            before + mark + redact_text(comment) if mark else _URL.sub(rf"\1{HIDDEN}@", line)
        )
    return "\n".join(lines)


def _names_alone(text: str) -> str:
    lines = [_KEY_OF_LINE.match(line) for line in text.split("\n")]
    kept = [f"{line[1]} {HIDDEN}" if line else HIDDEN for line in lines]
    return "\n".join(["# not valid YAML; only names are shown", *kept]) + "\n"
