# SPDX-License-Identifier: Apache-2.0
"""Adaptive tracking: entries that are too old or not the packet's, and flows with no room."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from shunt.kern._flows import TICK_SHIFT
from tests.packets.balancer import Event, Flow, Slot
from tests.packets.tracking import IDLE_S, NEW, OLD, SHORT_S, TICK_S, TOUCH_S, Case

MakeCase = Callable[..., Case]
REMEMBERED = {Event.FLOW_REMEMBERED: 1}


# Age --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "later", "limit_s"),
    [(["A"], "A", IDLE_S), (["S"], "A", SHORT_S), (["FA"], "A", SHORT_S), (["S"], "S", SHORT_S)],
    ids=["confirmed", "opening", "closing", "opening, SYN again"],
)
def test_an_entry_counts_up_to_its_age_limit(
    first: list[str], later: str, limit_s: int, case: Case
) -> None:
    """`seen_ns` may lag by a second, which the limit allows for."""
    for flags in first:
        case.to(flags)
    entry = case.entry()
    assert entry is not None
    seen = case.seen()
    swap = {case.old: case.new, case.new: case.old}[entry[0]]
    case.service.set_slots(swap, swap, Slot.MOVING)  # only the entry speaks for its backend
    owner = {case.old: OLD, case.new: NEW}[entry[0]]
    case.lb.advance(limit_s + TOUCH_S)
    assert case.to(later) == owner
    case.rewrite(entry[1], seen)
    case.lb.advance(3 * TICK_S)
    assert case.to(later) != owner
    assert case.entry() == (swap, Flow.OPENING if later == "S" else Flow.CONFIRMED)


def test_a_short_idle_time_holds_for_all_states(make_case: MakeCase) -> None:
    case = make_case()
    case.lb.map("svc").mapped()["idle_ns"][case.service.id] = 10 * 10**9
    assert case.to("S") == NEW
    case.lb.advance(10 + TOUCH_S + 1)
    assert case.to("A", seq=1001) == OLD


def test_a_busy_flow_is_written_once_a_second(case: Case) -> None:
    case.to("A")
    born = case.seen()
    case.lb.advance(TOUCH_S - TICK_S)
    case.to("A")
    assert case.seen() == born
    case.lb.advance(2 * TICK_S)
    case.to("A")
    assert case.seen() == int(case.lb.clock) >> TICK_SHIFT > born


def test_another_processors_clock_may_be_ahead(case: Case) -> None:
    case.to("A")
    case.rewrite(Flow.CONFIRMED, case.seen() + 15)
    ahead = case.seen()
    assert case.to("A") == OLD
    assert case.events == {}
    assert case.seen() == ahead


# What cannot be remembered ----------------------------------------------------------------------

LIMITS = [
    (({"flows": 1},), {}, Event.FLOW_TABLE_FULL),
    ((), {"inserts_per_s": 1}, Event.FLOW_OVER_BUDGET),
]
limits = pytest.mark.parametrize(("args", "config", "event"), LIMITS, ids=["full", "budget"])


def full(make_case: MakeCase, args: Any, config: Any) -> Case:
    """A case in which no second flow can be remembered."""
    case = make_case(*args, **config)
    assert case.to("S", sport=1) == NEW
    assert case.service.restarted() == 0
    return case


@limits
@pytest.mark.parametrize("flags", ["S", "A", "FA"])
def test_it_goes_where_its_next_packet_will(
    flags: str, args: Any, config: Any, event: Any, make_case: MakeCase
) -> None:
    case = full(make_case, args, config)
    for again in (flags, "A"):
        assert case.to(again, sport=2) == OLD
        assert case.events == {event: 1}
    assert case.service.restarted() == 1
    assert len(case.lb.flows()) == 1
    assert case.to("A", seq=1001, sport=1) == NEW, "who is remembered stays"


@limits
@pytest.mark.parametrize("flags", ["S", "A"])
def test_with_prev_down_it_goes_to_cur_unprotected(
    flags: str, args: Any, config: Any, event: Any, make_case: MakeCase
) -> None:
    case = full(make_case, args, config)
    case.fail(case.old)
    assert case.to(flags, sport=2) == NEW
    assert case.events == {event: 1, Event.FLOW_UNPROTECTED: 1}
    assert case.service.restarted() == 1


@limits
def test_an_ended_flows_entry_does_not_divert_the_flow_after_it(
    args: Any, config: Any, event: Any, make_case: MakeCase
) -> None:
    case = full(make_case, args, config)
    case.to("FA", seq=1001, sport=1)
    if event == Event.FLOW_TABLE_FULL:  # its own place is free for it
        assert case.to("S", sport=1) == NEW
        assert case.entry() == (case.new, Flow.OPENING)
        return
    assert case.to("S", sport=1) == OLD
    assert case.entry() is None
    assert case.to("A", sport=1) == OLD


def test_only_the_slot_of_the_forgotten_flow_begins_anew(make_case: MakeCase) -> None:
    case = make_case(inserts_per_s=0)
    for sport in range(1, 9):
        case.to("A", sport=sport)
    assert 4 <= case.service.restarted() <= 8


def test_insertions_are_rationed_by_the_second(make_case: MakeCase) -> None:
    case = make_case(inserts_per_s=2)

    def remembered(first: int) -> int:
        return sum(case.to("S", sport=sport) == NEW for sport in range(first, first + 5))

    assert remembered(100) == 2
    case.lb.advance(0.5)
    assert remembered(200) == 0
    case.lb.advance(0.5)
    assert remembered(300) == 2


def test_looking_up_costs_no_budget(make_case: MakeCase) -> None:
    case = make_case(inserts_per_s=1)
    for _ in range(5):
        assert case.to("S") == NEW
