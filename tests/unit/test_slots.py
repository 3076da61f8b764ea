# SPDX-License-Identifier: Apache-2.0
"""Slot words, and that Python's numbers are the programs'."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shunt.agent import apply, nat_expiry, options, tables
from shunt.lb import slots as slot
from shunt.lb.slots import State

HEADERS = Path(__file__).resolve().parents[2] / "bpf"

ids = st.integers(0, (1 << slot.BACKEND_BITS) - 1)


def constant(header: str, name: str) -> str:
    """What a #define says."""
    found = re.search(rf"#define {name}\s+(.+?)\s*(/\*|$)", (HEADERS / header).read_text(), re.M)
    assert found is not None, f"{name} is not in {header}"
    return found[1]


def test_numbers_are_those_of_the_programs() -> None:
    assert int(constant("abi.h", "SLOT_BACKEND_BITS")) == slot.BACKEND_BITS
    assert int(constant("abi.h", "SLOT_STATE_SHIFT")) == slot.STATE_SHIFT
    assert int(constant("abi.h", "REGION_LOG2_BITS")) == tables.REGION_LOG2_BITS
    assert constant("flow.h", "SHORT_IDLE_NS") == "(60 * NS_PER_S)"
    assert int(constant("abi.h", "SOURCE_SET_BITS")) == options.SET_BITS
    for protocol, bit in apply.ANY_PORT_BIT.items():
        assert int(constant("abi.h", f"ANY_PORT_{protocol.name}")) == bit
    assert nat_expiry.SHORT_IDLE_NS == 60 * 10**9
    for state in State:
        names = re.findall(r"SLOT_(SETTLED|MOVING|LINGERING),", (HEADERS / "abi.h").read_text())
        assert names[state] == state.name


@given(ids, ids, st.sampled_from(State))
def test_a_word_keeps_its_parts(cur: int, prev: int, state: State) -> None:
    words = slot.pack(np.array([cur]), np.array([prev]), state)
    parts = (slot.cur(words)[0], slot.prev(words)[0], slot.state(words)[0])
    assert parts == (cur, prev, state)


def test_prev_is_the_owner_from_before_the_first_change() -> None:
    words = slot.settled(np.array([1, 1]))
    words, moved = slot.retable(words, np.array([2, 1]))
    assert moved.tolist() == [True, False]
    words, _ = slot.retable(words, np.array([3, 1]))
    assert (slot.cur(words)[0], slot.prev(words)[0]) == (3, 1)
    words = slot.linger(words)
    words, _ = slot.retable(words, np.array([4, 1]))
    assert (slot.cur(words)[0], slot.prev(words)[0]) == (4, 3)


@given(st.lists(ids, min_size=1, max_size=8), st.integers(0, 4))
def test_growing_and_shrinking_are_inverse(owners: list[int], log2: int) -> None:
    size = 1 << (len(owners) - 1).bit_length()
    words = slot.settled(np.resize(np.array(owners), size))
    base = size.bit_length() - 1
    grown = slot.resize(words, base + log2)
    assert len(grown) == size << log2
    assert slot.may_shrink(grown, log2)
    assert slot.resize(grown, base).tolist() == words.tolist()


def test_what_moves_or_differs_does_not_shrink() -> None:
    words = slot.resize(slot.settled(np.array([1, 2])), 2)
    assert not slot.may_shrink(slot.retable(words, np.array([1, 1, 2, 3]))[0], 1)
    assert not slot.may_shrink(slot.settled(np.array([1, 2, 2, 2])), 1)


def test_quiet_after_a_window_or_without_prev() -> None:
    words = slot.pack(np.array([2, 2, 2]), np.array([1, 1, 3]), State.MOVING)
    changed = np.array([100, 50, 100], np.uint64)
    known = np.array([False, True, True, False])
    assert slot.quiet(words, changed, 150, 60, known).tolist() == [False, True, True]
