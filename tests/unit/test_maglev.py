# SPDX-License-Identifier: Apache-2.0
"""Maglev: against a naive reference, and what it is for: balance, and few slots that move."""

import hashlib
import random
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shunt.lb import maglev
from shunt.lb.errors import ShuntError

Table = NDArray[np.uint32]
Fill = Callable[[Sequence[str], Sequence[int], int], Table]

DEFAULT_SIZES = (1, 2, 3, 5, 10, 30, 100, 300, 1000)
SETS = 50  # random sets a mean is taken over
BEYOND = 0.03  # of all slots: what may change beyond the removed backend's own share

SLOTS = st.sampled_from((1, 2, 3, 4, 7, 8, 16, 31, 32, 64, 101, 128, 251, 256))
WEIGHTS = st.one_of(
    st.integers(1, 10), st.integers(1, maglev.WEIGHT_MAX), st.just(maglev.WEIGHT_MAX)
)
BACKENDS = st.dictionaries(st.text(max_size=8), WEIGHTS, min_size=1, max_size=20)


def reference_quotas(order: Sequence[str], weights: dict[str, int], slots: int) -> dict[str, int]:
    """Largest remainder, at least one each; `order` decides ties."""
    raised: set[str] = set()
    while True:
        sharers = [name for name in order if name not in raised]
        left = slots - len(raised)
        total = sum(weights[name] for name in sharers)
        share = {name: Fraction(left * weights[name], total) for name in sharers}
        below = {name for name in sharers if share[name] < 1}
        if not below:
            break
        raised |= below
    quota = dict.fromkeys(raised, 1) | {name: int(share[name]) for name in sharers}
    spare = slots - sum(quota.values())
    for name in sorted(sharers, key=lambda name: quota[name] - share[name])[:spare]:
        quota[name] += 1
    return quota


def reference_preferences(name: str, slots: int) -> list[int]:
    digest = maglev.hash_identity(name)
    start, steps = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
    if slots & (slots - 1):
        step, stretch = steps % (slots - 1) + 1, 0
    else:
        step, stretch = steps % 2**32 | 1, (steps >> 32) // 4 * 4
    return [(start + step * j + stretch * (j * (j - 1) // 2)) % slots for j in range(slots)]


def reference(weights: dict[str, int], slots: int, rule: str) -> list[str]:
    """Owners by the definition, turn by turn; no heap, no classes, no wrap-around tricks."""

    def by_hash(name: str) -> tuple[int, int]:
        digest = maglev.hash_identity(name)
        return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")

    order = sorted(weights, key=by_hash)
    quota = reference_quotas(order, weights, slots)
    preferences = {name: iter(reference_preferences(name, slots)) for name in order}
    owners: list[str | None] = [None] * slots
    turns = sorted(
        (Fraction(turn, weights[name]), -weights[name], place, name)
        for place, name in enumerate(order)
        for turn in range(1, slots + 1)
    )
    for _, _, _, name in turns:
        if not quota[name]:
            continue
        slot = next(preferences[name])
        while rule == "claim" and owners[slot] is not None:
            slot = next(preferences[name])
        if owners[slot] is None:
            owners[slot] = name
            quota[name] -= 1
    return [owner for owner in owners if owner is not None]


@settings(max_examples=150, deadline=None)
@given(BACKENDS, SLOTS, st.sampled_from(("try", "claim")))
def test_equals_the_definition(weights: dict[str, int], slots: int, rule: str) -> None:
    weights = dict(list(weights.items())[:slots])
    names = list(weights)
    table = maglev.fill(
        names, list(weights.values()), slots, rule="claim" if rule == "claim" else "try"
    )
    assert [names[i] for i in table] == reference(weights, slots, rule)


@pytest.mark.parametrize("slots", [1, 2, 4, 8, 64, 1024, 3, 5, 7, 251])
def test_preferences_visit_every_slot(slots: int) -> None:
    for seed in range(50):
        assert sorted(reference_preferences(f"backend {seed}", slots)) == list(range(slots))


@settings(max_examples=100, deadline=None)
@given(BACKENDS, SLOTS, st.randoms(use_true_random=False))
def test_order_of_arrival_is_nothing(
    weights: dict[str, int], slots: int, chance: random.Random
) -> None:
    names = list(weights)[:slots]
    shuffled = chance.sample(names, len(names))
    one = maglev.fill(names, [weights[name] for name in names], slots)
    other = maglev.fill(shuffled, [weights[name] for name in shuffled], slots)
    assert [names[i] for i in one] == [shuffled[i] for i in other]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=20), st.integers(1, 1000))
def test_only_ratios_of_weights_matter(weights: list[int], factor: int) -> None:
    names = [str(i) for i in range(len(weights))]
    scaled = [weight * factor for weight in weights]
    assert np.array_equal(maglev.fill(names, weights, 256), maglev.fill(names, scaled, 256))


@settings(max_examples=100, deadline=None)
@given(BACKENDS, SLOTS)
def test_a_backend_is_within_one_slot_of_its_share(weights: dict[str, int], slots: int) -> None:
    names = list(weights)[:slots]
    values = [weights[name] for name in names]
    counts = np.bincount(maglev.fill(names, values, slots), minlength=len(names))
    share = [Fraction(slots * value, sum(values)) for value in values]
    assert counts.sum() == slots
    assert counts.min() >= 1
    if min(share) >= 1:  # otherwise the others pay for those that got their one slot
        assert all(abs(count - want) < 1 for count, want in zip(counts, share, strict=True))


def test_tables_are_the_same_in_every_version() -> None:
    """Nodes of two versions share a VIP during an upgrade. A new table needs a new _HASH_KEY."""
    names = [f"10.0.0.{i}:80" for i in range(10)]
    tables = (
        maglev.fill(names, [1] * 10, 1024),
        maglev.fill(names, list(range(1, 11)), 1024),
        maglev.fill(names, [1] * 10, 1021),
    )
    digest = hashlib.sha256(b"".join(table.astype("<u4").tobytes() for table in tables))
    assert digest.hexdigest() == (
        "0ca83f00da7dc24d7fa40ee2976ca78624b84a07a3e8076394803f615c1815d1"
    )


# --- what a table is for -------------------------------------------------------------------


def addresses(chance: random.Random, count: int) -> list[str]:
    return [
        f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}:80" for n in chance.sample(range(1 << 22), count)
    ]


def imbalance(fill: Fill, backends: int) -> float:
    """By how much the backend that is farthest from its share is off, as a part of the share."""
    slots = 1 << maglev.log2_slots(backends)
    names = addresses(random.Random(backends), backends)
    counts = np.bincount(fill(names, [1] * backends, slots), minlength=backends)
    return float(np.abs(counts * backends / slots - 1).max())


def disruption(fill: Fill, backends: int, heaviest: int) -> float:
    """Slots that change when one backend goes, beyond its share; of all, mean of random sets."""
    slots = 1 << maglev.log2_slots(backends)
    chance = random.Random(backends)
    beyond = []
    for _ in range(SETS):
        names = addresses(chance, backends)
        weights = [chance.randint(1, heaviest) for _ in names]
        before = fill(names, weights, slots)
        gone = chance.randrange(backends)
        after = fill(names[:gone] + names[gone + 1 :], weights[:gone] + weights[gone + 1 :], slots)
        after = after + (after >= gone)  # back to places in `names`
        changed = np.count_nonzero(before != after) / slots
        beyond.append(changed - weights[gone] / sum(weights))
    return float(np.mean(beyond))


@pytest.mark.parametrize("backends", DEFAULT_SIZES)
def test_balance_at_the_default_sizes(backends: int) -> None:
    assert imbalance(maglev.fill, backends) <= 0.01


@pytest.mark.parametrize("heaviest", [1, 10, 100])
@pytest.mark.parametrize("backends", DEFAULT_SIZES[1:])
def test_few_slots_move_when_a_backend_goes(backends: int, heaviest: int) -> None:
    assert disruption(maglev.fill, backends, heaviest) <= BEYOND


def modulo(names: Sequence[str], weights: Sequence[int], slots: int) -> Table:
    order = sorted(range(len(names)), key=names.__getitem__)
    return np.array([order[slot % len(order)] for slot in range(slots)], dtype=np.uint32)


def ring(names: Sequence[str], weights: Sequence[int], slots: int) -> Table:
    """Consistent hashing on a ring, 100 points a backend: moves little, balances badly."""
    points = sorted(
        (int.from_bytes(maglev.hash_identity(f"{name}#{point}")[:4], "little"), i)
        for i, name in enumerate(names)
        for point in range(100)
    )
    ends = [end for end, _ in points]
    return np.array(
        [points[bisect(ends, (slot << 32) // slots) % len(points)][1] for slot in range(slots)],
        dtype=np.uint32,
    )


def by_arrival(names: Sequence[str], weights: Sequence[int], slots: int) -> Table:
    """Maglev, but preferences come from a backend's place instead of its identity."""
    return maglev.fill([str(i) for i in range(len(names))], weights, slots)


def test_those_checks_can_fail() -> None:
    assert imbalance(modulo, 10) <= 0.01 < imbalance(ring, 10)
    assert disruption(ring, 10, 1) <= BEYOND < disruption(modulo, 10, 1)
    assert disruption(by_arrival, 10, 1) > BEYOND


def test_a_turn_that_is_a_try_moves_less_than_the_papers() -> None:
    def claim(names: Sequence[str], weights: Sequence[int], slots: int) -> Table:
        return maglev.fill(names, weights, slots, rule="claim")

    assert disruption(maglev.fill, 10, 1) < 0.75 * disruption(claim, 10, 1)


# --- the rest of the interface --------------------------------------------------------------


def test_log2_slots() -> None:
    assert [1 << maglev.log2_slots(n) for n in (0, 1, 2, 10, 1000)] == [1, 128, 256, 1024, 131072]
    assert maglev.log2_slots(4, per_backend=1) == 2
    assert maglev.log2_slots(5, per_backend=1) == 3
    for backends, per_backend in ((-1, 100), (1, 0)):
        with pytest.raises(maglev.TableError, match="no table for"):
            maglev.log2_slots(backends, per_backend)


def test_str_and_bytes_are_the_same_identity() -> None:
    as_text, as_bytes = ["a", "b", "ü"], [b"a", b"b", "ü".encode()]
    assert np.array_equal(maglev.fill(as_text, [1] * 3, 64), maglev.fill(as_bytes, [1] * 3, 64))


def test_fill_hashed_equals_fill_and_writes_in_place() -> None:
    names, weights = ["a", "b", "c"], np.array([1, 2, 3], dtype=np.uint32)
    hashes = maglev.hash_array([maglev.hash_identity(name) for name in names])
    tables = np.full(4 * 256, 77, dtype=np.uint32)
    maglev.fill_hashed(hashes, weights, tables[256:512])
    assert np.array_equal(tables[256:512], maglev.fill(names, [1, 2, 3], 256))
    assert (tables[:256] == 77).all()
    assert (tables[512:] == 77).all()


def refusals() -> Iterator[tuple[Callable[[], object], str]]:
    yield lambda: maglev.fill(["a"], [1], 0), "can't have 0 slots"
    yield lambda: maglev.fill(["a"], [1], -8), "can't have -8 slots"
    yield lambda: maglev.fill(["a"], [1], 2**31), "can't have 2147483648 slots"
    yield lambda: maglev.fill(["a"], [1], 12), "can't have 12 slots"
    yield lambda: maglev.fill(["a"], [1], 65537 * 3), "can't have 196611 slots"
    yield lambda: maglev.fill([], [], 8), "has no backend"
    yield lambda: maglev.fill(["a", "b", "c"], [1, 1, 1], 2), "more backends than slots"
    yield lambda: maglev.fill(["a", "b"], [1, 0], 8), "b has weight 0"
    yield lambda: maglev.fill(["a", "b"], [1, -1], 8), "b has weight -1"
    yield lambda: maglev.fill(["a"], [2**32], 8), "a has weight 4294967296"
    yield lambda: maglev.fill(["a", "b"], [1], 8), "2 backends with 1 weights"
    yield lambda: maglev.fill(["a", "b", b"a"], [1, 1, 2], 8), "b'a' is there twice"


@pytest.mark.parametrize(("call", "what"), list(refusals()))
def test_refusals_say_what_why_and_fix(call: Callable[[], object], what: str) -> None:
    with pytest.raises(ValueError, match=what) as caught:
        call()
    assert isinstance(caught.value, ShuntError)
    assert what in caught.value.what
    assert caught.value.why
    assert caught.value.fix


def test_fill_hashed_refuses_before_it_writes() -> None:
    hashes = maglev.hash_array([maglev.hash_identity(name) for name in "abc"])
    twice, ones = hashes[[0, 1, 0]], np.ones(3, dtype=np.uint32)
    out = np.full(8, 77, dtype=np.uint32)
    refused = (
        (twice, ones, "backend [02] is there twice"),
        (hashes, ones * np.array([1, 0, 1], dtype=np.uint32), "backend 1 has weight 0"),
        (hashes[:0], ones[:0], "has no backend"),
    )
    for some, weights, what in refused:
        with pytest.raises(maglev.TableError, match=what):
            maglev.fill_hashed(some, weights, out)
    with pytest.raises(maglev.TableError, match="more backends than slots"):
        maglev.fill_hashed(hashes, ones, out[:2])
    assert (out == 77).all()


def test_fill_hashed_refuses_other_arrays() -> None:
    hashes = maglev.hash_array([maglev.hash_identity(name) for name in "abc"])
    ones, out = np.ones(3, dtype=np.uint32), np.full(8, 77, dtype=np.uint32)
    fixed = out.copy()
    fixed.flags.writeable = False
    others: list[tuple[object, object, object]] = [
        (hashes.view(np.int64), ones, out),
        (hashes, ones.astype(np.uint64), out),
        (hashes, ones, out.view(np.float32)),
        (hashes[:2], ones, out),
        (hashes, ones[:2], out),
    ]
    for arrays in others:
        with pytest.raises(TypeError, match="wants"):
            maglev.fill_hashed(*arrays)  # type: ignore[arg-type]
    for target in (fixed, np.full(16, 77, dtype=np.uint32)[::2]):
        with pytest.raises(ValueError, match=r"contiguous|read-only"):
            maglev.fill_hashed(hashes, ones, target)
    with pytest.raises(TypeError):
        maglev.fill(["a"], [1.5], 8)  # type: ignore[list-item]
    assert (out == 77).all()
