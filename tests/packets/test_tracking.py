# SPDX-License-Identifier: Apache-2.0
"""Adaptive tracking, one case after the other: whose a packet on a changing slot is.

Ages and limits are test_tracking_limits.py's; whole histories against an oracle,
test_flow_keeping.py's.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shunt.kern._flows import TICK_SHIFT
from shunt.kern.flows import states
from tests.packets.balancer import UDP, UP, Balancer, Event, Flag, Flow, Slot
from tests.packets.frames import udp
from tests.packets.tracking import ADDRESSES, ENDS, IDLE_S, NEW, NOBODY, OLD, TOUCH_S, Case

REMEMBERED = {Event.FLOW_REMEMBERED: 1}


# Moving -----------------------------------------------------------------------------------------


def test_a_syn_goes_to_cur_and_is_remembered(case: Case) -> None:
    assert case.to("S", seq=77) == NEW
    assert case.events == REMEMBERED
    (flow,) = case.lb.flows()
    assert case.entry() == (case.new, Flow.OPENING)
    assert flow["isn"] == 77
    assert case.seen() == int(case.lb.clock) >> TICK_SHIFT
    assert (flow["key"]["sport"], flow["key"]["dport"], flow["key"]["proto"]) == (40000, 80, 6)


@pytest.mark.parametrize("flags", ["A", "PA", "SA", ""])
def test_any_other_packet_is_an_old_flow(flags: str, case: Case) -> None:
    assert case.to(flags) == OLD
    assert case.events == REMEMBERED
    assert case.entry() == (case.old, Flow.CONFIRMED)


@pytest.mark.parametrize("flags", ["FA", "RA", "R", "F"])
def test_an_old_flow_that_ends_is_remembered_as_ending(flags: str, case: Case) -> None:
    assert case.to(flags) == OLD
    assert case.entry() == (case.old, Flow.CLOSING)


def test_a_handshake_confirms(case: Case) -> None:
    assert case.to("S", seq=1000) == NEW
    assert case.to("A", seq=1001) == NEW
    assert case.events == {}
    assert case.entry() == (case.new, Flow.CONFIRMED)


def test_a_repeated_syn_stays_whatever_becomes_of_the_slot(case: Case) -> None:
    assert case.to("S", seq=1) == NEW
    case.service.set_slots(case.old, case.new, Slot.MOVING)
    assert case.to("S", seq=2) == NEW
    assert case.events == {}
    assert case.entry() == (case.new, Flow.OPENING)
    assert case.lb.flows()["isn"] == [2], "the later SYN's number counts"


def test_a_syn_on_a_confirmed_flow_stays_and_does_not_unconfirm(case: Case) -> None:
    assert case.to("A") == OLD
    assert case.to("S") == OLD
    assert case.entry() == (case.old, Flow.CONFIRMED)


@pytest.mark.parametrize("end", ["FA", "R"])
def test_after_the_end_a_syn_chooses_anew_and_others_follow(end: str, case: Case) -> None:
    assert case.to("A") == OLD
    assert case.to(end) == OLD
    assert case.entry() == (case.old, Flow.CLOSING)
    assert case.to("A") == OLD, "a half-closed client still acknowledges"
    assert case.entry() == (case.old, Flow.CLOSING)
    assert case.to("S") == NEW
    assert case.entry() == (case.new, Flow.OPENING)


@pytest.mark.parametrize(
    ("isn", "seq", "belongs"),
    [
        (1000, 1000, True),
        (1000, 1000 + 2**20, True),
        (1000, 1001 + 2**20, False),
        (1000, 999, False),
        (1000, 1000 + 2**31, False),
        (2**32 - 10, 5, True),
        (2**32 - 10, 2**32 - 11, False),
    ],
)
def test_a_segment_far_from_the_syn_is_an_older_flows(
    isn: int, seq: int, belongs: bool, case: Case
) -> None:
    assert case.to("S", seq=isn) == NEW
    assert case.to("A", seq=seq) == (NEW if belongs else OLD)
    assert case.entry() == ((case.new if belongs else case.old), Flow.CONFIRMED)
    # Once confirmed, numbers do not matter.
    assert case.to("A", seq=(seq + 2**24) % 2**32) == (NEW if belongs else OLD)


def test_udp_stays_with_prev(make_lb: Callable[..., Balancer]) -> None:
    """No packet of it opens anything: each may be of a flow that is there already."""
    lb = make_lb()
    service = lb.add_service(ENDS[4][1], proto=UDP, backends=ADDRESSES[4], idle_s=60)
    service.move()
    for _ in range(2):
        assert lb.backend_of(udp(*ENDS[4])) == ADDRESSES[4][0]
    assert states(lb.flows()["word"]) == [Flow.CONFIRMED]
    lb.set_flags(service.backends[0], Flag.KNOWN)
    assert lb.backend_of(udp(*ENDS[4], sport=1)) == ADDRESSES[4][1]


def test_two_flows_are_two_entries(case: Case) -> None:
    assert case.to("A", sport=1) == OLD
    assert case.to("S", sport=2) == NEW
    assert case.to("A", sport=1) == OLD
    assert case.to("A", sport=2, seq=1001) == NEW
    assert len(case.lb.flows()) == 2


def test_an_unchanged_quiet_window_is_left_alone(case: Case) -> None:
    case.to("A")
    case.to("S", sport=2)
    assert case.service.restarted() == 0


# Backends that fail, drain, go ------------------------------------------------------------------


def test_a_failing_prev_gets_no_unknown_flows(case: Case) -> None:
    case.fail(case.old)
    assert case.to("A") == NEW
    assert case.entry() == (case.new, Flow.CONFIRMED)


def test_a_failing_backend_gets_no_packets_but_forgets_nothing(case: Case) -> None:
    assert case.to("A") == OLD
    case.fail(case.old)
    assert case.to("A") == NEW
    assert case.entry() == (case.old, Flow.CONFIRMED)
    case.lb.set_flags(case.old, UP)
    assert case.to("A") == OLD


@pytest.mark.parametrize("flag", [Flag.DRAINED, Flag.REMOVED, Flag.DRAINED | Flag.REMOVED])
def test_a_draining_prev_is_up(flag: int, case: Case) -> None:
    case.lb.set_flags(case.old, UP | flag)
    assert case.to("A") == OLD
    assert case.to("A") == OLD
    assert case.to("S", sport=2) == NEW


def test_an_entry_of_a_backend_that_is_gone_says_nothing(case: Case) -> None:
    assert case.to("A") == OLD
    case.gone(case.old)
    assert case.to("A") == NEW
    assert case.events == REMEMBERED
    assert case.entry() == (case.new, Flow.CONFIRMED)


def test_nobody_left_refuses(case: Case) -> None:
    case.service.set_slots(0, case.old, Slot.MOVING)
    assert case.to("A") == OLD
    case.fail(case.old)
    assert case.to("A") == NOBODY
    assert case.to("A", sport=2) == NOBODY
    assert case.to("S", sport=3) == NOBODY
    assert case.entry() == (case.old, Flow.CONFIRMED), "nobody is not remembered"


def test_without_an_owner_a_syn_is_refused_also_while_prev_is_up(case: Case) -> None:
    """Whoever is left only drains: what it has it keeps, and it gets nothing new."""
    case.service.set_slots(0, case.old, Slot.MOVING)
    assert case.to("S") == NOBODY
    assert case.entry() is None
    assert case.service.restarted() == 0
    assert case.to("A") == OLD


def test_a_slot_that_had_no_owner_before(case: Case) -> None:
    case.service.set_slots(case.new, 0, Slot.MOVING)
    assert case.to("S", sport=1) == NEW
    assert case.to("A", sport=2) == NEW


# Lingering --------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", ["S", "A", "FA"])
def test_lingering_sends_unknown_packets_to_cur_and_remembers_none(flags: str, case: Case) -> None:
    case.service.linger()
    assert case.to(flags) == NEW
    assert case.events == {}
    assert case.entry() is None
    assert case.service.restarted() == 0


def test_lingering_keeps_its_exceptions(case: Case) -> None:
    assert case.to("A") == OLD
    case.service.linger()
    assert case.to("A") == OLD
    assert case.to("S") == OLD
    assert case.to("FA") == OLD
    assert case.to("A") == OLD
    assert case.entry() == (case.old, Flow.CLOSING)


def test_lingering_forgets_an_ended_flow_whose_tuple_opens_a_new_one(case: Case) -> None:
    assert case.to("FA") == OLD
    case.service.linger()
    assert case.to("S") == NEW
    assert case.entry() is None
    assert case.to("A") == NEW, "the next packet goes where its SYN went"


def test_lingering_forgets_an_expired_flow_whose_tuple_opens_a_new_one(case: Case) -> None:
    assert case.to("A") == OLD
    case.service.linger()
    case.lb.advance(IDLE_S + TOUCH_S + 1)
    assert case.to("S") == NEW
    assert case.entry() is None


def test_lingering_with_a_failing_exception_goes_to_cur(case: Case) -> None:
    assert case.to("A") == OLD
    case.service.linger()
    case.fail(case.old)
    assert case.to("A") == NEW
    assert case.entry() == (case.old, Flow.CONFIRMED)
