# SPDX-License-Identifier: Apache-2.0
"""Which translations are new and which have ended, of two looks at the table."""

from __future__ import annotations

from typing import Any

import numpy as np

from shunt.agent.nat_changes import differ

ROW = np.dtype([("key", [("saddr", "16u1"), ("sport", ">u2")]), ("word", "<u8"), ("sport", ">u2")])


def rows(*ports: tuple[int, int]) -> Any:
    found = np.zeros(len(ports), ROW)
    for row, (client, own) in zip(found, ports, strict=True):
        row["key"]["sport"], row["sport"], row["word"] = client, own, 7
    return found


def ports(found: Any) -> set[tuple[int, int]]:
    return {(int(r["key"]["sport"]), int(r["sport"])) for r in found}


def test_differences() -> None:
    begun, ended = differ(rows((1, 10), (2, 20), (3, 30)), rows((3, 30), (2, 21), (4, 0)))
    assert ports(begun) == {(2, 21), (4, 0)}
    assert ports(ended) == {(1, 10), (2, 20)}


def test_nothing_and_all() -> None:
    some = rows((1, 10), (256, 0))
    assert [len(part) for part in differ(some, some)] == [0, 0]
    assert [len(part) for part in differ(rows(), some)] == [2, 0]
    assert [len(part) for part in differ(some, rows())] == [0, 2]
