# SPDX-License-Identifier: Apache-2.0
"""What a simulation says is what happens: compared with tables that are really computed."""

from __future__ import annotations

from ipaddress import ip_address

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shunt.lb.compile import Condition, Endpoint, Target, compile_target, owners
from shunt.lb.errors import ShuntError
from shunt.lb.model import Backend, Mode, Port, Protocol, Service
from shunt.lb.simulate import Change, Outcome, changed, due, simulate

VIP = ip_address("203.0.113.10")
PER_BACKEND = 100


def endpoint(n: int) -> Endpoint:
    return Endpoint(ip_address(f"10.0.{n >> 8}.{n & 255}"), 0)


def target(n: int, drained: frozenset[int] = frozenset()) -> Target:
    backends = tuple(Backend(endpoint(i).address) for i in range(1, n + 1))
    service = Service("web", (VIP,), (Port(80, Protocol.TCP),), Mode.DSR_IPIP, backends)
    gone = {endpoint(i) for i in drained}
    return compile_target(service, Protocol.TCP, lambda _, e: Condition(drained=e in gone))


def ids(of: Target) -> dict[Endpoint, int]:
    return {member.endpoint: n for n, member in enumerate(of.members, 1)}


def ask(before: Target, change: Change) -> Outcome:
    known = ids(before)
    return simulate(known, owners(before, known), changed(before, change, PER_BACKEND))


def test_no_change_moves_nothing() -> None:
    found = ask(target(4), Change())
    assert (found.slots, found.moved, found.least) == (512, 0, 0)
    assert all(row.before == row.after == 128 for row in found.rows)


def test_a_removed_backend_loses_all_and_hardly_more_moves() -> None:
    found = ask(target(10), Change(remove=frozenset({endpoint(3)})))
    (row,) = (row for row in found.rows if row.endpoint == endpoint(3))
    assert (row.after, row.lost, row.gained) == (0, row.before, 0)
    assert found.least == row.before
    assert found.least <= found.moved < found.least + 0.05 * found.slots


def test_draining_moves_what_removing_does() -> None:
    drained = ask(target(10), Change(drain=frozenset({endpoint(3)})))
    removed = ask(target(10), Change(remove=frozenset({endpoint(3)})))
    assert (drained.moved, drained.rows) == (removed.moved, removed.rows)
    back = ask(target(10, frozenset({3})), Change(undrain=frozenset({endpoint(3)})))
    assert back.moved == drained.moved


def test_one_that_grows_the_table_is_compared_in_the_larger() -> None:
    found = ask(target(10), Change(add={endpoint(11): 1}))
    assert (found.slots_before, found.slots_after, found.slots) == (1024, 2048, 2048)
    (row,) = (row for row in found.rows if row.endpoint == endpoint(11))
    assert row.before == 0
    assert row.after == row.gained == pytest.approx(2048 / 11, abs=1)


def test_a_weight_changes_shares() -> None:
    found = ask(target(4), Change(weights={endpoint(1): 5}))
    after = {row.endpoint: row.after for row in found.rows}
    assert after == {endpoint(1): 320, **{endpoint(n): 64 for n in (2, 3, 4)}}


def test_the_last_one_leaves_nobody() -> None:
    found = ask(target(1), Change(drain=frozenset({endpoint(1)})))
    assert found.moved == found.slots == found.rows[0].lost


@given(
    n=st.integers(1, 20),
    removed=st.sets(st.integers(1, 20), max_size=5),
    added=st.sets(st.integers(21, 30), max_size=5),
    weight=st.integers(1, 9),
)
def test_rows_add_up(n: int, removed: set[int], added: set[int], weight: int) -> None:
    before = target(n)
    change = Change(
        add={endpoint(i): weight for i in added},
        remove=frozenset(endpoint(i) for i in removed if i <= n),
    )
    found = ask(before, change)
    after = changed(before, change, PER_BACKEND)
    wanted = owners(after, everyone := {**ids(before), **{endpoint(i): 99 + i for i in added}})
    scale = found.slots // len(wanted)
    for row in found.rows:
        assert row.after == scale * np.count_nonzero(wanted == everyone[row.endpoint])
        assert row.after - row.before == row.gained - row.lost
    assert found.least <= found.moved <= found.slots


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (Change(add={endpoint(1): 1}), "web/tcp has a backend 10.0.0.1 already"),
        (Change(remove=frozenset({endpoint(9)})), "web/tcp has no backend 10.0.0.9"),
        (Change(weights={endpoint(9): 2}), "web/tcp has no backend 10.0.0.9"),
    ],
)
def test_what_makes_no_sense_is_refused(change: Change, what: str) -> None:
    with pytest.raises(ShuntError) as caught:
        ask(target(2), change)
    assert caught.value.what == what
    assert caught.value.fix


def test_what_weights_are_worth() -> None:
    assert due({endpoint(1): 1, endpoint(2): 3}, 256) == {endpoint(1): 64, endpoint(2): 192}
    assert due({}, 256) == {}
