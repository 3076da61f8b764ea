# SPDX-License-Identifier: Apache-2.0
"""Mode nat: ports, full tables, and what a flow's entries say of it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from scapy.packet import Packet

from shunt.kern.libbpf import XDP_DROP, XDP_PASS
from tests.packets.balancer import TCP, UDP, Balancer, Event, Flag, Flow, Reason, Service
from tests.packets.frames import either, network, tcp, transport, udp
from tests.packets.test_nat import BACKENDS, ENDS, answer_to, forwarded, returned, versions

FIN_CLIENT, FIN_BACKEND, RST = 1, 2, 4
MakeLb = Callable[..., Balancer]


def nat(lb: Balancer, version: int = 4, proto: int = TCP) -> Service:
    """A service of two backends, all its slots the first one's."""
    vip = ENDS[version][1]
    service = lb.add_service(vip, proto=proto, mode="nat", backends=BACKENDS[version])
    service.set_slots(service.backends[0])
    return service


def port_of(lb: Balancer, packet: Packet) -> int:
    return int(transport(forwarded(lb.run(packet))).sport)


# Ports ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "count"), [(10000, 20000), (65000, 536), (1024, 7)])
def test_ports_are_in_the_range(first: int, count: int, make_lb: MakeLb) -> None:
    lb = make_lb(nat_port_min=first, nat_port_count=count)
    service = nat(lb)
    ports = set()
    for sport in range(2000, 2100):
        service.set_slots(lb.add_backend(service.id, f"10.0.1.{sport - 1999}"))
        ports.add(port_of(lb, tcp(*ENDS[4], sport=sport)))
    assert ports <= set(range(first, first + count))
    assert len(ports) > min(count, 100) * 0.8


@versions
def test_ports_cannot_be_told_without_the_key(version: int, make_lb: MakeLb) -> None:
    def ports(*key: int) -> list[int]:
        lb = make_lb(nat_key=key)
        nat(lb, version)
        return [port_of(lb, tcp(*ENDS[version], sport=s)) for s in range(3000, 3100)]

    one, again, other, third = ports(1, 2), ports(1, 2), ports(1, 3), ports(0, 2)
    assert one == again
    for different in (other, third):
        assert sum(a == b for a, b in zip(one, different, strict=True)) <= 2
    # Neighbours' ports tell nothing: no step between them is common.
    steps = [(b - a) % 20000 for a, b in pairwise(one)]
    assert len(set(steps)) > 90


@versions
def test_a_taken_port_is_probed_past_until_none_is_left(version: int, make_lb: MakeLb) -> None:
    lb = make_lb(nat_port_count=4)
    service = nat(lb, version)
    outs = [lb.run(tcp(*ENDS[version], sport=s)) for s in range(1, 5)]
    assert {transport(forwarded(out)).sport for out in outs} == set(range(10000, 10004))
    assert sum(out.events.get(Event.NAT_COLLISION, 0) for out in outs) > 0
    out = lb.run(tcp(*ENDS[version], sport=5))
    assert out.said == (XDP_DROP, {Reason.DROP_NAT_NO_PORT: 1})
    assert out.events == {Event.NAT_COLLISION: 32}
    assert len(lb.entries("nat_fwd")) == len(lb.entries("nat_rev")) == 4
    # Towards another backend the same ports are free.
    service.set_slots(service.backends[1])
    assert port_of(lb, tcp(*ENDS[version], sport=5)) in range(10000, 10004)


@versions
@pytest.mark.parametrize("proto", [TCP, UDP])
def test_ports_of_others_are_left_out(version: int, proto: int, make_lb: MakeLb) -> None:
    """Of the same protocol; and of what has such a port already nothing is taken away."""
    lb = make_lb(nat_port_count=8)
    nat(lb, version, proto)
    first = forwarded(lb.run(either(proto, *ENDS[version], sport=1)))
    others = {10000, 10003, 10007} | {first.payload.sport}
    lb.exclude_ports(proto, *others)
    lb.exclude_ports(UDP if proto == TCP else TCP, *range(10000, 10008))
    outs = [lb.run(either(proto, *ENDS[version], sport=s)) for s in range(2, 50)]
    sent = [forwarded(out) for out in outs if Reason.SENT_TO_BACKEND in out.reasons]
    assert {transport(packet).sport for packet in sent} == set(range(10000, 10008)) - others
    assert Reason.DROP_NAT_NO_PORT in outs[-1].reasons
    returned(lb.run(answer_to(first)))
    again = forwarded(lb.run(either(proto, *ENDS[version], sport=1)))
    assert again.sport == first.sport


@versions
def test_two_backends_have_the_same_port_at_the_same_time(version: int, make_lb: MakeLb) -> None:
    """A port is taken towards one destination, not for the node: each reply finds its client."""
    lb = make_lb(nat_port_count=1)
    service = nat(lb, version)
    both = []
    for sport, backend in enumerate(service.backends, 1):
        service.set_slots(backend)
        both.append(forwarded(lb.run(tcp(*ENDS[version], sport=sport))))
    assert [transport(sent).sport for sent in both] == [10000, 10000]
    assert [network(sent).dst for sent in both] == list(BACKENDS[version])
    for sport, sent in enumerate(both, 1):
        back = returned(lb.run(answer_to(sent)))
        assert (network(back).dst, transport(back).dport) == (ENDS[version][0], sport)


@versions
def test_flows_without_a_port_are_counted_for_their_backend(version: int, make_lb: MakeLb) -> None:
    lb = make_lb(nat_port_count=2)
    service = nat(lb, version)
    for sport in range(1, 6):
        lb.run(tcp(*ENDS[version], sport=sport))
    counted = lb.map("nat_refused").mapped()["flows"]
    assert [int(counted[backend]) for backend in service.backends] == [3, 0]
    assert int(counted.sum()) == 3


@versions
@pytest.mark.parametrize("proto", [TCP, UDP])
def test_a_budget_of_new_flows(version: int, proto: int, make_lb: MakeLb) -> None:
    lb = make_lb(inserts_per_s=3)
    nat(lb, version, proto)
    for sport in range(1, 4):
        forwarded(lb.run(either(proto, *ENDS[version], sport=sport)))
    for sport in (4, 5):
        out = lb.run(either(proto, *ENDS[version], sport=sport))
        assert out.said == (XDP_DROP, {Reason.DROP_NAT_OVER_BUDGET: 1})
    assert len(lb.entries("nat_fwd")) == len(lb.entries("nat_rev")) == 3
    forwarded(lb.run(either(proto, *ENDS[version], sport=1)))  # a flow that there is
    lb.advance(1)
    forwarded(lb.run(either(proto, *ENDS[version], sport=4)))


# Full tables ------------------------------------------------------------------------------------


@versions
@pytest.mark.parametrize("full", ["nat_fwd", "nat_rev"])
def test_a_full_table_refuses_new_flows_and_keeps_the_old(
    full: str, version: int, make_lb: MakeLb
) -> None:
    lb = make_lb({full: 1})
    nat(lb, version)
    port = port_of(lb, tcp(*ENDS[version], sport=1))
    for _ in range(3):
        out = lb.run(tcp(*ENDS[version], sport=2))
        assert out.said == (XDP_DROP, {Reason.DROP_NAT_TABLE_FULL: 1})
    assert len(lb.entries("nat_fwd")) == len(lb.entries("nat_rev")) == 1, "a claim was kept"
    assert port_of(lb, tcp(*ENDS[version], "A", sport=1)) == port


@versions
def test_who_loses_the_race_uses_the_winners_port(version: int, lb: Balancer) -> None:
    nat(lb, version)
    port = port_of(lb, tcp(*ENDS[version]))
    ((key, value),) = lb.entries("nat_fwd")
    value["word"] ^= np.uint64(1 << 63)  # so it is not found, and then in the way
    value["sport"] = port + 1
    lb.map("nat_fwd").update(key, value)
    out = lb.run(tcp(*ENDS[version]))
    assert out.events.get(Event.NAT_ADOPTED) == 1
    assert Event.NAT_CREATED not in out.events
    assert transport(forwarded(out)).sport == port + 1
    assert len(lb.entries("nat_rev")) == 1, "the loser's claim was kept"


# What the entries say ---------------------------------------------------------------------------


def state(lb: Balancer) -> tuple[int, int, int]:
    """(state, what the client closed, what the backend closed) of the one flow there is."""
    ((_, fwd),) = lb.entries("nat_fwd")
    ((_, rev),) = lb.entries("nat_rev")
    return int(fwd["state"]), int(fwd["closed"]), int(rev["closed"])


@versions
def test_a_connection_from_open_to_closed(version: int, lb: Balancer) -> None:
    nat(lb, version)
    sent = forwarded(lb.run(tcp(*ENDS[version], "S")))
    assert state(lb) == (Flow.OPENING, 0, 0)
    returned(lb.run(answer_to(sent, flags="SA")))
    assert state(lb) == (Flow.OPENING, 0, 0)
    lb.run(tcp(*ENDS[version], "A"))
    assert state(lb) == (Flow.CONFIRMED, 0, 0)
    lb.run(tcp(*ENDS[version], "FA"))
    assert state(lb) == (Flow.CLOSING, FIN_CLIENT, 0)
    returned(lb.run(answer_to(sent, flags="FA")))
    assert state(lb) == (Flow.CLOSING, FIN_CLIENT, FIN_BACKEND)
    assert forwarded(lb.run(tcp(*ENDS[version], "A"))).sport == sent.sport


@versions
def test_a_reset_closes(version: int, lb: Balancer) -> None:
    nat(lb, version)
    sent = forwarded(lb.run(tcp(*ENDS[version])))
    returned(lb.run(answer_to(sent, flags="RA")))
    assert state(lb)[1:] == (0, RST)
    forwarded(lb.run(tcp(*ENDS[version], "R")))
    assert state(lb) == (Flow.CLOSING, RST, RST)


@versions
def test_a_reset_does_not_count_if_the_same_side_goes_on(version: int, lb: Balancer) -> None:
    nat(lb, version)
    sent = forwarded(lb.run(tcp(*ENDS[version])))
    returned(lb.run(answer_to(sent, flags="SA")))
    lb.run(tcp(*ENDS[version], "R"))
    returned(lb.run(answer_to(sent, flags="R")))
    assert state(lb) == (Flow.CLOSING, RST, RST)
    for flags in ("S", "SA"):  # no data: it may be another connection's
        returned(lb.run(answer_to(sent, flags=flags)))
    assert state(lb) == (Flow.CLOSING, RST, RST)
    returned(lb.run(answer_to(sent, flags="PA")))
    assert state(lb) == (Flow.CLOSING, RST, 0)
    forwarded(lb.run(tcp(*ENDS[version], "A")))
    assert state(lb) == (Flow.CONFIRMED, 0, 0)
    lb.run(tcp(*ENDS[version], "FA"))
    lb.run(tcp(*ENDS[version], "R"))
    forwarded(lb.run(tcp(*ENDS[version], "A")))
    assert state(lb) == (Flow.CLOSING, FIN_CLIENT, 0)


@versions
@pytest.mark.parametrize(
    ("client", "backend", "over"),
    [
        (("FA",), ("FA",), True),
        (("R",), (), True),
        ((), ("RA",), True),
        (("FA",), (), False),  # the answer may be a long one
        ((), ("FA",), False),
        (("R", "FA"), (), False),  # the reset did not count
    ],
)
def test_the_tuple_of_an_ended_flow_opens_a_new_one(
    version: int, client: tuple[str, ...], backend: tuple[str, ...], over: bool, lb: Balancer
) -> None:
    service = nat(lb, version)
    sent = forwarded(lb.run(tcp(*ENDS[version])))
    for flags in client:
        lb.run(tcp(*ENDS[version], flags))
    for flags in backend:
        returned(lb.run(answer_to(sent, flags=flags)))
    service.set_slots(service.backends[1])
    out = lb.run(tcp(*ENDS[version]))
    assert network(forwarded(out)).dst == BACKENDS[version][over]
    assert out.events == ({Event.NAT_CREATED: 1} if over else {})
    if over:
        assert state(lb) == (Flow.OPENING, 0, 0)


@versions
def test_a_repeated_syn_is_no_new_flow(version: int, lb: Balancer) -> None:
    nat(lb, version)
    port = port_of(lb, tcp(*ENDS[version]))
    out = lb.run(tcp(*ENDS[version]))
    assert out.events == {}
    assert transport(forwarded(out)).sport == port


def test_a_failing_backend_keeps_connections_and_loses_what_can_begin_anew(lb: Balancer) -> None:
    services = {proto: nat(lb, proto=proto) for proto in (TCP, UDP)}
    for proto, service in services.items():
        lb.run(either(proto, *ENDS[4]))
        lb.set_flags(service.backends[0], Flag.KNOWN)
        service.set_slots(service.backends[1])
    assert network(forwarded(lb.run(tcp(*ENDS[4], "A")))).dst == BACKENDS[4][0]
    assert network(forwarded(lb.run(udp(*ENDS[4])))).dst == BACKENDS[4][1]
    assert network(forwarded(lb.run(tcp(*ENDS[4])))).dst == BACKENDS[4][1]
    assert len(lb.entries("nat_fwd")) == len(lb.entries("nat_rev")) == 2


def test_a_backend_that_is_gone_ends_its_flows(lb: Balancer) -> None:
    service = nat(lb)
    lb.run(tcp(*ENDS[4]))
    lb.set_flags(service.backends[0], 0)
    service.set_slots(service.backends[1])
    assert lb.run(tcp(*ENDS[4], "A")).reasons == {Reason.SENT_RST_NO_FLOW: 1}
    assert network(forwarded(lb.run(tcp(*ENDS[4])))).dst == BACKENDS[4][1]
    assert len(lb.entries("nat_rev")) == 1


def test_a_draining_backend_keeps_its_flows(lb: Balancer) -> None:
    service = nat(lb)
    lb.run(tcp(*ENDS[4]))
    lb.set_flags(service.backends[0], Flag.KNOWN | Flag.UP | Flag.DRAINED | Flag.REMOVED)
    service.set_slots(service.backends[1])
    assert network(forwarded(lb.run(tcp(*ENDS[4], "A")))).dst == BACKENDS[4][0]


def test_entries_are_touched_at_most_once_a_second(lb: Balancer) -> None:
    nat(lb)
    sent = forwarded(lb.run(tcp(*ENDS[4])))
    born = int(lb.clock)

    def seen() -> tuple[int, int]:
        return tuple(int(lb.entries(m)[0][1]["seen_ns"]) for m in ("nat_fwd", "nat_rev"))  # type: ignore[return-value]

    lb.advance(1)
    lb.run(tcp(*ENDS[4], "A"))
    lb.run(answer_to(sent))
    assert seen() == (born, born)
    lb.advance(0.5)
    lb.run(tcp(*ENDS[4], "A"))
    assert seen() == (int(lb.clock), born)
    lb.run(answer_to(sent))
    assert seen() == (int(lb.clock), int(lb.clock))


@versions
def test_a_reverse_entry_recycled_under_us_translates_nothing(version: int, lb: Balancer) -> None:
    nat(lb, version)
    sent = forwarded(lb.run(tcp(*ENDS[version])))
    ((key, value),) = lb.entries("nat_rev")
    value["word"] ^= np.uint64(1 << 40)
    lb.map("nat_rev").update(key, value)
    out = lb.run(answer_to(sent))
    assert out.said == (XDP_PASS, {Reason.PASS_NOT_OURS: 1})
