# SPDX-License-Identifier: Apache-2.0
"""The lines of the packet benchmark: what is measured, and what it should come to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from perf.driver import SYN, Stream
from perf.tables import Layout
from shunt.lb.model import Mode
from shunt.lb.slots import State

MANY = 10_000  # services
KI64, MI = 1 << 16, 1 << 20
FLOWS = {1: "1", KI64: "64Ki", MI: "1Mi"}

SENT, NOT_OURS = "SENT_TO_BACKEND", "PASS_NOT_OURS"


@dataclass(frozen=True)
class Subject:
    """One line of the results: which program runs, over which tables and packets."""

    case: str
    mode: str
    state: str
    stream: Stream
    layout: Layout | None = None  # None: a reference
    program: str = "lb"  # or what follows ref_
    reason: str = SENT

    @property
    def new(self) -> bool:
        """Whether each packet begins a flow."""
        return self.state == "new"

    @property
    def remembers(self) -> bool:
        """Whether a flow leaves something in a table."""
        if self.layout is None:
            return self.program.startswith("lru")
        return self.layout.mode == Mode.NAT or self.layout.state == State.MOVING

    @property
    def wrapper(self) -> str:
        """The case of the same packets into a program that does nothing."""
        return _wrapper(self.stream)


def _wrapper(stream: Stream) -> str:
    return f"nothing{6 if stream.ipv6 else ''}" + "-10k" * (stream.services > 1)


def subjects() -> list[Subject]:
    """All of them, in the order of the table."""
    found = [*_references(), *_ipip(), *_others(), *_nat(), *_new_flows(), *_nobodys()]
    assert len({s.case for s in found}) == len(found)
    return found


def _crowds() -> Iterator[tuple[int, int]]:
    """(services, flows): one flow of 10,000 services would be one service's."""
    for services, flows in product((1, MANY), FLOWS):
        if flows >= services:
            yield services, flows


def _named(name: str, state: str, stream: Stream, layout: Layout) -> Subject:
    case = f"{name}-{state}-{FLOWS[stream.flows]}" + "-10k" * (stream.services > 1)
    return Subject(case, layout.mode.value, state, stream, layout)


def _references() -> Iterator[Subject]:
    for ipv6, services in product((False, True), (1, MANY)):
        stream = Stream(MI, services, ipv6=ipv6)
        yield Subject(_wrapper(stream), "reference", "nothing", stream, program="nothing")
    yield Subject("rewrite", "reference", "rewrite", Stream(MI), program="rewrite")
    for program, (services, flows) in product(("lru", "lru_full"), _crowds()):
        case = f"{program}-{FLOWS[flows]}" + "-10k" * (services > 1)
        stream = Stream(flows, services)
        yield Subject(case, "reference", "existing", stream, program=program)


def _ipip() -> Iterator[Subject]:
    for state, (services, flows) in product((State.SETTLED, State.MOVING), _crowds()):
        layout = Layout(Mode.DSR_IPIP, state, services)
        yield _named("ipip", state.name.lower(), Stream(flows, services), layout)


def _others() -> Iterator[Subject]:
    for state, flows in product((State.SETTLED, State.MOVING), (1, MI)):
        layout = Layout(Mode.DSR_IPIP, state, ipv6=True)
        yield _named("ipip6", state.name.lower(), Stream(flows, ipv6=True), layout)
    layout = Layout(Mode.DSR_IPIP, services=MANY, ipv6=True)
    yield _named("ipip6", "settled", Stream(MI, MANY, ipv6=True), layout)
    for flows in (1, MI):
        yield _named("l2", "settled", Stream(flows), Layout(Mode.DSR_L2))


def _nat() -> Iterator[Subject]:
    # 20,000 ports towards each backend: those of ten would not do for a million flows.
    for flows in FLOWS:
        yield _named("nat", "existing", Stream(flows), Layout(Mode.NAT, backends=100))
    yield _named("nat", "existing", Stream(MI, MANY), Layout(Mode.NAT, services=MANY))
    yield _named("nat6", "existing", Stream(ipv6=True), Layout(Mode.NAT, ipv6=True))


def _new_flows() -> Iterator[Subject]:
    syn = Stream(flags=SYN)
    yield Subject("lru-new", "reference", "new", syn, program="lru")
    for state in (State.SETTLED, State.MOVING):
        layout = Layout(Mode.DSR_IPIP, state)
        yield Subject(f"ipip-{state.name.lower()}-new", layout.mode.value, "new", syn, layout)
    yield Subject("nat-new", "nat", "new", syn, Layout(Mode.NAT, backends=100))


def _nobodys() -> Iterator[Subject]:
    layout = Layout(Mode.DSR_IPIP, services=MANY)
    port, address = Stream(MI, port=9), Stream(MI, first_service=MANY)
    yield Subject("nobody-port", "none", "nobody's", port, layout, reason=NOT_OURS)
    yield Subject("nobody-address", "none", "nobody's", address, layout, reason=NOT_OURS)


@dataclass(frozen=True)
class Target:
    """One case's cost is at most `times` another's, or at most `limit_ns`. Medians decide."""

    claim: str
    case: str
    than: str = ""
    times: float = 1.0
    limit_ns: float = 0.0
    net: bool = False  # above the wrapper's own cost


TARGETS = (
    Target("settled, one flow: 45 net", "ipip-settled-1", limit_ns=45, net=True),
    Target(
        "settled, 1Mi: 1.5 x one flow, net", "ipip-settled-1Mi", "ipip-settled-1", 1.5, net=True
    ),
    Target("settled, 1Mi: 1/5 x the LRU, net", "ipip-settled-1Mi", "lru-1Mi", 0.2, net=True),
    *(
        Target(f"{state}, {crowd}: the LRU", f"ipip-{state}-{crowd}", f"lru-{crowd}")
        for state, crowds in (
            ("settled", ("64Ki-10k", "1Mi-10k")),
            ("moving", ("1", "64Ki", "1Mi", "64Ki-10k", "1Mi-10k")),
        )
        for crowd in crowds
    ),
    Target("nat, one existing flow: 150 gross", "nat-existing-1", limit_ns=150),
)


@dataclass(frozen=True)
class Outcome:
    """A target, and what was measured. Units: ns a packet."""

    target: Target
    measured: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.measured <= self.limit


def outcomes(medians: Mapping[str, float]) -> list[Outcome]:
    """Of the targets whose cases were measured, by the cases' names."""
    wrapper = {s.case: s.wrapper for s in subjects()}
    found = []
    for target in TARGETS:
        cases = {target.case, target.than or target.case}
        if not cases | {wrapper[c] for c in cases} <= set(medians):
            continue
        cost = {c: medians[c] - target.net * medians[wrapper[c]] for c in cases}
        limit = target.limit_ns or target.times * cost[target.than]
        found.append(Outcome(target, cost[target.case], limit))
    return found
