# SPDX-License-Identifier: Apache-2.0
"""The docs and bpf/abi_streams.h name the same events of redirected streams."""

import re
from pathlib import Path

from shunt.kern.objects import Object
from shunt.sockops.streams import OBJECT

OPERATIONS = Path(__file__).resolve().parents[2] / "docs/operations.md"


def documented(text: str) -> set[str]:
    """The first column of the table of events."""
    section = text.partition("### Streams between two sockets of this node")[2]
    table = section.partition("| Event | |")[2].partition("\n\n")[0]
    return set(re.findall(r"^\| `([a-z-]+)` \|", table, re.MULTILINE))


def test_each_event_is_explained() -> None:
    with Object(OBJECT) as obj:
        names = {e.name.lower().replace("_", "-") for e in obj.btf.enum("stream_event", "STREAM_")}
    assert documented(OPERATIONS.read_text()) == names - {"none", "events"}


def test_that_an_event_can_be_missed() -> None:
    text = OPERATIONS.read_text().replace("| `gone` |", "| gone |")
    assert "gone" not in documented(text)
