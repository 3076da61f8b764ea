# SPDX-License-Identifier: Apache-2.0
"""Ids and regions: never handed out twice, never overlapping, all there again in the end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shunt.lb.errors import ShuntError
from shunt.lb.pools import Ids, Regions


@given(st.lists(st.one_of(st.just(-1), st.integers(0, 30)), max_size=60))
def test_ids_are_never_in_two_hands(actions: list[int]) -> None:
    ids = Ids("services", 12)
    held: list[int] = []
    for action in actions:
        if action < 0:
            if len(held) == 11:
                with pytest.raises(ShuntError, match="table services is full"):
                    ids.take()
                continue
            new = ids.take()
            assert new not in held
            assert 0 < new < 12
            held.append(new)
        elif held:
            ids.release([held.pop(action % len(held))])
    assert ids.available() == 11 - len(held)


def test_ids_found_in_use_are_left_alone() -> None:
    ids = Ids("backends", 6, used=[1, 3])
    assert [ids.take() for _ in range(3)] == [2, 4, 5]
    ids.release([3])
    assert ids.take() == 3


@given(st.integers(1, 300), st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=60))
def test_regions_never_overlap(size: int, actions: list[tuple[bool, int]]) -> None:
    regions = Regions(size)
    held: list[tuple[int, int]] = []
    owner: list[int | None] = [None] * size
    for take, n in actions:
        if take:
            try:
                first = regions.take(n)
            except ShuntError:
                continue
            assert first % (1 << n) == 0
            assert owner[first : first + (1 << n)] == [None] * (1 << n)
            owner[first : first + (1 << n)] = [first] * (1 << n)
            held.append((first, n))
        elif held:
            first, log2 = held.pop(n % len(held))
            owner[first : first + (1 << log2)] = [None] * (1 << log2)
            regions.give(first, log2)
        assert regions.free_slots() == owner.count(None)
    for first, log2 in held:
        regions.give(first, log2)
    assert regions.free_slots() == size


@given(st.lists(st.integers(0, 4), max_size=20))
def test_regions_found_in_the_maps_are_claimed(sizes: list[int]) -> None:
    before, after = Regions(64), Regions(64)
    taken = []
    for log2 in sizes:
        try:
            taken.append((before.take(log2), log2))
        except ShuntError:
            break
    for first, log2 in reversed(taken):
        after.claim(first, log2)
    assert after.free_slots() == before.free_slots()
    if taken:
        with pytest.raises(ShuntError, match="share slots"):
            after.claim(*taken[0])
