# SPDX-License-Identifier: Apache-2.0
"""What the demo excuses, and above all what it does not."""

from collections import Counter

import pytest

from shunt.lab.reports import Failure, Kind, Opened, Reason
from shunt.lab.verdict import Excuse, Step, judge, nat_through, sent_to_killed

NAT = frozenset({"nat-v4"})
FLOWS = {
    1: Opened(1, "nat-v4", Kind.TCP_FLOW, "be1", "10.0.0.11", "192.0.2.2", 40001),
    2: Opened(2, "nat-v4", Kind.TCP_FLOW, "be4", "10.0.0.12", "192.0.2.2", 40002),
    3: Opened(3, "l2-v4", Kind.TCP_FLOW, "be4", "192.0.2.2", "192.0.2.2", 40003),
    4: Opened(4, "l2-v4", Kind.UDP_FLOW, "be1", "192.0.2.2", "192.0.2.2", 40004),
}


def lost_flow(number: int, at_s: float, reason: Reason = Reason.RESET) -> Failure:
    flow = FLOWS[number]
    return Failure(flow.target, flow.kind, reason, at_s, at_s + 0.1, number)


def lost_request(
    target: str, at_s: float, reason: Reason = Reason.REFUSED, kind: Kind = Kind.HTTP
) -> Failure:
    return Failure(target, kind, reason, at_s, at_s + 0.1)


def steps(*excuses: Excuse) -> list[Step]:
    """Three steps of ten seconds each; the second has the excuses."""
    made = [Step(f"step {n}", 10.0 * n, Counter(), 4) for n in range(3)]
    for step in made:
        step.end(step.started_s + 10, Counter())
    made[1].excuses += excuses
    return made


def judged(failure: Failure, *excuses: Excuse) -> tuple[list[int], list[int]]:
    """How many were lost, and how many counted apart, in each step."""
    made = steps(*excuses)
    judge(made, [failure], FLOWS)
    return [len(s.lost) for s in made], [s.excused.total() for s in made]


NAT_THROUGH_LB1 = nat_through("lb1", {1}, NAT, until_s=10.2)
BE4_KILLED = sent_to_killed("be4", since_s=10.1, until_s=12.0)


def test_without_an_excuse_everything_is_lost_where_it_was_sent() -> None:
    assert judged(lost_flow(1, 5)) == ([1, 0, 0], [0, 0, 0])
    assert judged(lost_request("l2-v4", 25)) == ([0, 0, 1], [0, 0, 0])


@pytest.mark.parametrize(
    "failure",
    [lost_flow(1, 11), lost_flow(1, 9.95), lost_flow(1, 12), lost_request("nat-v4", 10.1)],
)
def test_nat_through_a_stopped_node_is_counted_apart(failure: Failure) -> None:
    lost, apart = judged(failure, NAT_THROUGH_LB1)
    assert (sum(lost), sum(apart)) == (0, 1)


@pytest.mark.parametrize(
    "failure",
    [
        lost_flow(2, 11),  # through the other node
        lost_flow(3, 11),  # not nat
        lost_request("nat-v4", 10.3),  # after the node was withdrawn
        lost_request("l2-v4", 10.1),
        lost_flow(1, 5),  # before anything happened
        lost_flow(1, 25),  # it went on through another node
    ],
)
def test_nothing_else_is_excused_by_a_stopped_node(failure: Failure) -> None:
    lost, apart = judged(failure, NAT_THROUGH_LB1)
    assert (sum(lost), sum(apart)) == (1, 0)


@pytest.mark.parametrize(
    "failure",
    [
        lost_flow(2, 11),
        lost_flow(3, 10.05, Reason.CLOSED),
        lost_request("l2-v4", 11),
        lost_request("l2-v4", 11, Reason.STALLED, Kind.UDP),
    ],
)
def test_what_was_sent_to_a_killed_backend_is_counted_apart(failure: Failure) -> None:
    lost, apart = judged(failure, BE4_KILLED)
    assert (sum(lost), sum(apart)) == (0, 1)


@pytest.mark.parametrize(
    "failure",
    [
        lost_flow(4, 11),  # of another backend
        lost_request("l2-v4", 12.1),  # the health checks knew
        lost_request("l2-v4", 11, Reason.STALLED),  # a dead server's host refuses; this vanished
        lost_request("l2-v4", 9),
    ],
)
def test_nothing_else_is_excused_by_a_killed_backend(failure: Failure) -> None:
    lost, apart = judged(failure, BE4_KILLED)
    assert (sum(lost), sum(apart)) == (1, 0)


def test_a_step_is_bad_if_something_was_lost_or_an_expectation_failed() -> None:
    made = steps()
    assert all(step.good for step in made)
    judge(made, [lost_request("l2-v4", 15)], FLOWS)
    made[2].broken.append("be2 answered")
    assert [step.good for step in made] == [True, False, False]
    assert made[1].lost_requests == 1
