# SPDX-License-Identifier: Apache-2.0
"""What was lost in each step of the demo, and which losses have a name. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field

from shunt.lab.reports import FLOWS, Failure, Kind, Opened, Reason
from shunt.lab.traffic import Counts, requests_of

# What a client sees of a server that was killed with -9 while its host lives on. A request that
# got no answer at all is something else, and no excuse.
DEAD_SERVER = frozenset({Reason.REFUSED, Reason.RESET, Reason.CLOSED})


@dataclass(frozen=True)
class Excuse:
    """A kind of loss that is no fault of the load balancer, with the name it is counted under."""

    name: str
    covers: Callable[[Failure, Opened | None], bool]


# A flow through a lost node is lost with its next message, which it sends within this time.
NEXT_MESSAGE_S = 2.0


def nat_through(role: str, flows: Set[int], nat: Set[str], until_s: float) -> Excuse:
    """Translations end with their node: these flows, and nat requests under way at `until_s`.

    A flow that outlives its next message has a translation on another node (UDP may go on like
    that), and no excuse any more.
    """

    def covers(failure: Failure, flow: Opened | None) -> bool:
        if flow:
            return failure.flow in flows and failure.started_s <= until_s + NEXT_MESSAGE_S
        return failure.target in nat and failure.started_s <= until_s

    return Excuse(f"with nat through {role}", covers)


def sent_to_killed(backend: str, since_s: float, until_s: float) -> Excuse:
    """Flows of a killed backend, and what was sent to it before the health checks knew.

    Requests have no witness of the backend they were sent to. So they must have been started
    before `until_s`, and must have failed as they do at a dead server; for UDP that includes
    silence, since its refusals (ICMP) are rate-limited.
    """

    def covers(failure: Failure, flow: Opened | None) -> bool:
        if flow:
            return flow.backend == backend and failure.ended_s >= since_s
        udp = failure.kind in {Kind.UDP, Kind.UDP_FLOW}
        as_dead = failure.reason in DEAD_SERVER or (udp and failure.reason is Reason.STALLED)
        return as_dead and failure.ended_s >= since_s and failure.started_s <= until_s

    return Excuse(f"to {backend} as it died", covers)


@dataclass
class Step:
    """One step of the script and what it cost. Times are CLOCK_MONOTONIC."""

    title: str
    started_s: float
    before: Counts
    flows_before: int
    ended_s: float = float("inf")
    excuses: list[Excuse] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # expectations that were not met
    requests: int = 0
    shares: Counter[str] = field(default_factory=Counter)  # HTTP requests by backend
    lost: list[Failure] = field(default_factory=list)
    excused: Counter[str] = field(default_factory=Counter)

    def end(self, at_s: float, counts: Counts) -> None:
        self.ended_s = at_s
        recent = counts - self.before
        self.requests = requests_of(recent)
        for (_, kind, backend), number in recent.items():
            if kind is Kind.HTTP:
                self.shares[backend] += number

    @property
    def lost_requests(self) -> int:
        return sum(1 for f in self.lost if not f.flow)

    @property
    def lost_flows(self) -> int:
        return sum(1 for f in self.lost if f.flow)

    @property
    def good(self) -> bool:
        return not self.lost and not self.broken


def judge(steps: Iterable[Step], failures: Iterable[Failure], flows: Mapping[int, Opened]) -> None:
    """Enter every failure in the step in which the lost thing was sent, under a name or as lost.

    An excuse holds from its step on: the last flow of a killed backend may notice late.
    """
    steps = list(steps)
    for step in steps:
        step.lost, step.excused = [], Counter()
    for failure in failures:
        so_far = [s for s in steps if s.started_s <= failure.started_s] or steps[:1]
        step, flow = so_far[-1], flows.get(failure.flow)
        # What was sent just before a step may fail because of it.
        known = [e for s in steps if s.started_s <= failure.ended_s for e in s.excuses]
        name = next((e.name for e in known if e.covers(failure, flow)), None)
        if name is None:
            step.lost.append(failure)
        else:
            step.excused[f"{_plural(failure)} {name}"] += 1


def _plural(failure: Failure) -> str:
    if failure.kind in FLOWS and failure.flow:
        return f"{failure.kind}s"
    return "requests"
