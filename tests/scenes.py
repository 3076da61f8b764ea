# SPDX-License-Identifier: Apache-2.0
"""Labs with everything up, and the traffic through them that must not suffer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager

from shunt.lab.reports import FLOWS, Kind, Opened
from shunt.lab.scenario import SERVICES, LabService, dsr_vips
from shunt.lab.servers import Servers, running
from shunt.lab.shuntd import Shuntd, attach_decap, daemons
from shunt.lab.topology import Lab
from shunt.lab.traffic import Traffic


@contextmanager
def lab_with_servers(
    services: Sequence[LabService] = SERVICES, balancer_count: int = 2, backend_count: int = 4
) -> Iterator[tuple[Lab, dict[str, Servers]]]:
    """A lab whose backends can serve these, by every mode; its load balancers run nothing."""
    with Lab(balancer_count, backend_count) as lab:
        lab.add_vips(dsr_vips(services))
        with running(lab.backends, lab.directory) as servers:
            for host in lab.backends:
                attach_decap(lab, host)
            yield lab, servers


@contextmanager
def balanced_lab(
    services: Sequence[LabService] = SERVICES, balancer_count: int = 2, backend_count: int = 4
) -> Iterator[tuple[Lab, dict[str, Shuntd]]]:
    """The same with daemons, by role, that have found every backend up."""
    with lab_with_servers(services, balancer_count, backend_count) as (lab, _):
        documents = [s.document(lab.backends) for s in services]
        with daemons(lab, documents) as started:
            for daemon in started.values():
                daemon.wait_up(30)
            yield lab, started


@contextmanager
def nothing_lost(
    traffic: Traffic,
    of: Set[str] | None = None,
    kinds: Set[Kind] = frozenset(Kind),
    timeout_s: float = 15.0,
) -> Iterator[dict[int, Opened]]:
    """Gives the flows that are up, by number: all of the plan. On leaving, all that must not
    suffer were answered anew, and no request was lost.

    Shape: what must not suffer: these kinds of traffic to these targets, or to all.
    """
    flows = {f.flow: f for f in traffic.live()}
    wanted = Counter[tuple[str, Kind]]()
    for t in traffic.plan.targets:
        wanted.update({(t.name, Kind.TCP_FLOW): t.tcp_flows, (t.name, Kind.UDP_FLOW): t.udp_flows})
    assert Counter((f.target, f.kind) for f in flows.values()) == +wanted
    before = len(traffic.failures())
    yield flows
    traffic.wait_answered(timeout_s)
    concerned = {t.name for t in traffic.plan.targets} if of is None else of
    lost = [f for f in traffic.failures()[before:] if f.target in concerned and f.kind in kinds]
    who = {number: f"at {flow.backend}" for number, flow in flows.items()}
    told = (f"{f.target} {f.kind} {who.get(f.flow, '')}: {f.reason} {f.detail}" for f in lost)
    assert Counter(told) == {}
    live = {f.flow for f in traffic.live()}
    kept = [f.flow for f in flows.values() if f.target in concerned and f.kind in kinds & FLOWS]
    assert live.issuperset(kept)
