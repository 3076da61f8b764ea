# SPDX-License-Identifier: Apache-2.0
"""What a service may ask for beyond balancing: affinity, hashing by client, sources, rates.

The same in every mode, and where TC translates instead of XDP.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from typing import Any

import numpy as np
import pytest

from shunt.kern.libbpf import XDP_DROP
from shunt.lb.model import RateLimit
from shunt.policy.sources import compile_rules
from tests.packets.balancer import TCP, UDP, UP, Balancer, Event, Flag, Reason, Service, Slot
from tests.packets.frames import either, tcp, udp
from tests.packets.translator import SHOT, answer, returned

VIPS = {4: "203.0.113.1", 6: "2001:db8:a::1"}
CLIENTS = {4: "192.0.2.", 6: "2001:db8:c::"}
BACKENDS = {
    4: [f"10.0.0.{n}" for n in range(1, 9)],
    6: [f"fd00::{n}" for n in range(1, 9)],
}
AFFINITY_S = 10_800  # S50: the default of Kubernetes
MakeLb = Callable[..., Balancer]
versions = pytest.mark.parametrize("version", [4, 6])
protos = pytest.mark.parametrize("proto", [TCP, UDP], ids=["tcp", "udp"])
modes = pytest.mark.parametrize("mode", ["dsr-ipip", "nat"])
# Which program a packet meets, and the service's mode.
everywhere = pytest.mark.parametrize(
    ("hook", "mode"), [("xdp", "dsr-ipip"), ("xdp", "nat"), ("tc", "local"), ("tc", "nat")]
)


def serve(lb: Balancer, version: int, mode: str = "dsr-ipip", proto: int = TCP) -> Service:
    return lb.add_service(VIPS[version], proto=proto, mode=mode, backends=BACKENDS[version])


def spread(service: Service, shift: int = 0) -> None:
    """Slots change hands by `shift` backends, each settled."""
    ids = np.roll(np.array(service.backends), shift)
    service.set_slots(ids.tolist())


def sent_to(lb: Balancer, version: int, host: int, sport: int, flags: str = "S") -> str:
    return lb.backend_of(tcp(f"{CLIENTS[version]}{host}", VIPS[version], flags, sport=sport))


def begun(lb: Balancer, version: int, proto: int, host: int, sport: int) -> str:
    """Where a new connection goes."""
    return lb.backend_of(either(proto, f"{CLIENTS[version]}{host}", VIPS[version], sport=sport))


# Affinity ---------------------------------------------------------------------------------------


@versions
@protos
@everywhere
def test_a_clients_new_connections_go_where_its_last_one_went(
    version: int, proto: int, mode: str, program: Balancer
) -> None:
    """S49, S54: the client's address is the key, whatever its port."""
    serve(program, version, mode, proto).ask(affinity_ns=AFFINITY_S * 10**9)
    first = {host: begun(program, version, proto, host, 1000) for host in range(1, 30)}
    assert len(set(first.values())) > 4, "clients are spread"
    for host, backend in first.items():
        found = {begun(program, version, proto, host, sport) for sport in range(1001, 1006)}
        assert found == {backend}


@versions
@everywhere
def test_without_affinity_they_spread(version: int, mode: str, program: Balancer) -> None:
    serve(program, version, mode)
    assert len({sent_to(program, version, 1, sport) for sport in range(1000, 1030)}) > 4


@versions
def test_all_vips_and_ports_of_a_service_are_one(version: int, lb: Balancer) -> None:
    """S49: client address and service, whichever VIP was used."""
    service = serve(lb, version)
    service.ask(affinity_ns=AFFINITY_S * 10**9)
    other = {4: "203.0.113.99", 6: "2001:db8:a::99"}[version]
    lb.add_frontend(service, other, 443)
    for host in range(1, 10):
        client = f"{CLIENTS[version]}{host}"
        there = lb.backend_of(tcp(client, VIPS[version], sport=1))
        assert lb.backend_of(tcp(client, other, sport=2, dport=443)) == there


@versions
@everywhere
def test_it_expires_and_each_new_connection_refreshes_it(
    version: int, mode: str, program: Balancer
) -> None:
    """S50, S51."""
    service = serve(program, version, mode)
    service.ask(affinity_ns=100 * 10**9)
    first = {host: sent_to(program, version, host, 1000) for host in range(1, 20)}
    for sport in range(1001, 1004):
        program.advance(90)
        spread(service, sport)
        assert {h: sent_to(program, version, h, sport) for h in first} == first
    program.advance(102)
    assert {h: sent_to(program, version, h, 2000) for h in first} != first


@versions
@everywhere
@pytest.mark.parametrize(
    "flags",
    [Flag.KNOWN, 0, UP | Flag.DRAINED, UP | Flag.REMOVED],
    ids=["fails", "gone", "drains", "removed"],
)
def test_a_backend_that_takes_no_new_ones_is_left_for_another(
    version: int, mode: str, flags: int, program: Balancer
) -> None:
    """S52: another is selected, and remembered."""
    service = serve(program, version, mode)
    service.ask(affinity_ns=AFFINITY_S * 10**9)
    was = sent_to(program, version, 1, 1000)
    left = service.backends[BACKENDS[version].index(was)]
    program.set_flags(left, flags)
    service.set_slots([b for b in service.backends if b != left])
    then = sent_to(program, version, 1, 1001)
    assert then != was
    program.set_flags(left, UP)
    spread(service, 5)
    assert {sent_to(program, version, 1, sport) for sport in range(1002, 1010)} == {then}


def test_a_failing_backend_keeps_its_connections_when_it_recovers(lb: Balancer) -> None:
    service = serve(lb, 4)
    service.ask(affinity_ns=AFFINITY_S * 10**9)
    was = sent_to(lb, 4, 1, 1000)
    spread(service, 1)
    held = sent_to(lb, 4, 1, 1001)
    assert held == was
    lb.set_flags(service.backends[BACKENDS[4].index(was)], Flag.KNOWN)
    assert sent_to(lb, 4, 1, 1001, "A") != was
    lb.set_flags(service.backends[BACKENDS[4].index(was)], UP)
    assert sent_to(lb, 4, 1, 1001, "A") == was


@versions
def test_udp_has_affinity_too(version: int, lb: Balancer) -> None:
    """S54."""
    service = serve(lb, version, proto=UDP)
    service.ask(affinity_ns=100 * 10**9)

    def to(host: int, sport: int) -> str:
        return lb.backend_of(udp(f"{CLIENTS[version]}{host}", VIPS[version], sport=sport))

    first = {host: to(host, 1000) for host in range(1, 20)}
    spread(service, 3)
    assert {host: to(host, 1001) for host in first} == first
    assert {host: to(host, 1000) for host in first} == first


def test_affinity_can_be_switched_on_and_off(lb: Balancer) -> None:
    """S53: what is open stays; switching off is the agent's part, in test_flow_keeping.py."""
    service = serve(lb, 4)
    open_ones = {sport: sent_to(lb, 4, 1, sport) for sport in range(1000, 1020)}
    service.ask(affinity_ns=AFFINITY_S * 10**9)
    assert {s: sent_to(lb, 4, 1, s, "A") for s in open_ones} == open_ones
    assert len({sent_to(lb, 4, 1, sport) for sport in range(2000, 2010)}) == 1


def test_only_what_differs_from_its_slot_is_remembered(lb: Balancer) -> None:
    service = serve(lb, 4)
    service.ask(affinity_ns=AFFINITY_S * 10**9, hash_client=True)
    for host in range(1, 10):
        for sport in range(1000, 1005):
            sent_to(lb, 4, host, sport)
    kinds = Counter(lb.flows()["key"]["kind"].tolist())
    assert kinds == {1: 9}, "nine clients, and no flow"


# Hashing by client ------------------------------------------------------------------------------


@versions
@protos
@everywhere
def test_hashing_by_client_sends_all_of_a_client_to_one_backend(
    version: int, proto: int, mode: str, program: Balancer
) -> None:
    serve(program, version, mode, proto).ask(hash_client=True)
    seen = set()
    for host in range(1, 60):
        (backend,) = {begun(program, version, proto, host, sport) for sport in (1, 2, 30000)}
        seen.add(backend)
    assert len(seen) == 8
    assert not len(program.flows())


def test_flows_of_one_client_have_many_homes(lb: Balancer) -> None:
    """A busy client's flows all find room while its slot moves."""
    service = serve(lb, 4)
    service.ask(hash_client=True)
    service.move()
    for sport in range(1000, 1500):
        assert Event.FLOW_TABLE_FULL not in lb.run(tcp("192.0.2.1", VIPS[4], sport=sport)).events
    assert len(lb.flows()) == 500
    slots = lb.flows()["hash"] >> 26
    assert len(set(slots.tolist())) == 1, "and one slot"


# Source ranges ----------------------------------------------------------------------------------


@versions
@protos
@everywhere
def test_the_longest_source_range_decides(
    version: int, proto: int, mode: str, program: Balancer
) -> None:
    """S62: dropped before anything else, and by reason."""
    base = {4: "192.0.2.0", 6: "2001:db8:c::"}[version]
    bits = {4: (24, 26, 28), 6: (64, 122, 124)}[version]
    wide, middle, narrow = (ip_network(f"{base}/{b}") for b in bits)
    rules = compile_rules([wide, narrow], [middle])
    serve(program, version, mode, proto).ask(sources=rules)
    for host, served in ((1, True), (15, True), (16, False), (63, False), (64, True)):
        client = str(ip_address(base) + host)
        out = program.run(either(proto, client, VIPS[version]))
        wanted = Reason.SENT_TO_BACKEND if served else Reason.DROP_SOURCE_DENIED
        assert out.reasons == {wanted: 1}, client
        assert (out.verdict in {XDP_DROP, SHOT}) is not served
    outside = {4: "198.51.100.1", 6: "2001:db8:d::1"}[version]
    out = program.run(either(proto, outside, VIPS[version]))
    assert out.reasons == {Reason.DROP_SOURCE_DENIED: 1}
    translated = 0 if mode == "dsr-ipip" else 3
    assert len(program.entries("nat_fwd")) == translated, "nothing is kept of the others"


@versions
def test_denied_alone_leaves_all_others(version: int, lb: Balancer) -> None:
    denied = ip_network({4: "192.0.2.1", 6: "2001:db8:c::1"}[version])
    serve(lb, version).ask(sources=compile_rules([], [denied]))
    assert lb.run(tcp(f"{CLIENTS[version]}1", VIPS[version])).reasons == {
        Reason.DROP_SOURCE_DENIED: 1
    }
    assert sent_to(lb, version, 2, 1)


@versions
@everywhere
def test_an_established_connection_that_is_denied_ends(
    version: int, mode: str, program: Balancer
) -> None:
    service = serve(program, version, mode)
    client = f"{CLIENTS[version]}1"
    assert sent_to(program, version, 1, 1)
    service.ask(sources=compile_rules([], [ip_network(client)]))
    out = program.run(tcp(client, VIPS[version], "A", sport=1))
    assert out.reasons == {Reason.DROP_SOURCE_DENIED: 1}
    assert sent_to(program, version, 2, 1)


# Rates ------------------------------------------------------------------------------------------


def connections(lb: Balancer, version: int, host: int, number: int, first: int) -> int:
    """How many of so many new connections are let through."""
    client = str(ip_address(CLIENTS[version] + "0") + host)
    return sum(
        lb.run(tcp(client, VIPS[version], sport=sport)).reasons == {Reason.SENT_TO_BACKEND: 1}
        for sport in range(first, first + number)
    )


@versions
@everywhere
def test_new_connections_are_limited_for_each_network(
    version: int, mode: str, program: Balancer
) -> None:
    service = serve(program, version, mode)
    service.ask(rate=RateLimit(10, 5, prefix4=30, prefix6=126))
    assert connections(program, version, 0, 10, 1000) == 5, "the burst"
    assert connections(program, version, 1, 10, 1000) == 0, "of the same network"
    assert connections(program, version, 4, 10, 1000) == 5, "of another"
    program.advance(0.3)
    assert connections(program, version, 0, 10, 2000) == 3
    program.advance(1000)
    assert connections(program, version, 0, 10, 3000) == 5, "what is not used is not saved up"
    out = program.run(tcp(f"{CLIENTS[version]}0", VIPS[version], sport=9))
    assert out.reasons == {Reason.DROP_RATE_LIMITED: 1}


@versions
@everywhere
def test_established_connections_are_not_limited(
    version: int, mode: str, program: Balancer
) -> None:
    serve(program, version, mode).ask(rate=RateLimit(1, 1))
    sent = program.run(tcp(f"{CLIENTS[version]}1", VIPS[version], sport=1))
    if mode != "dsr-ipip":  # whose answers go past it
        assert returned(program, mode, answer(sent)).reasons == {Reason.SENT_TO_CLIENT: 1}
    was = {sent.packet.payload.dst}
    assert {sent_to(program, version, 1, 1, flags) for flags in ("A", "PA") * 5} == was


def test_services_are_limited_apart(lb: Balancer) -> None:
    for vip in ("203.0.113.1", "203.0.113.2"):
        lb.add_service(vip, backends=["10.0.0.1"]).ask(rate=RateLimit(1, 2))
    for vip in ("203.0.113.1", "203.0.113.2"):
        let = [lb.run(tcp("192.0.2.1", vip, sport=s)).reasons for s in range(4)]
        assert let.count({Reason.SENT_TO_BACKEND: 1}) == 2


# Every port -------------------------------------------------------------------------------------


@versions
@pytest.mark.parametrize("proto", [TCP, UDP])
@modes
def test_a_frontend_of_every_port(version: int, proto: int, mode: str, lb: Balancer) -> None:
    lb.add_service(VIPS[version], 0, proto, mode, BACKENDS[version][:1])
    lb.add_service(VIPS[version], 443, proto, mode, BACKENDS[version][1:2])
    for port, backend in ((1, 0), (80, 0), (442, 0), (443, 1), (65535, 0)):
        client = f"{CLIENTS[version]}1"
        out = lb.run(either(proto, client, VIPS[version], dport=port))
        assert out.reasons == {Reason.SENT_TO_BACKEND: 1}
        assert out.packet.payload.dst == BACKENDS[version][backend]
        if mode == "nat":
            assert out.packet.payload.payload.dport == port
    other = {TCP: UDP, UDP: TCP}[proto]
    out = lb.run(either(other, f"{CLIENTS[version]}1", VIPS[version]))
    assert out.reasons == {Reason.PASS_NOT_OURS: 1}
    elsewhere = {4: "203.0.113.77", 6: "2001:db8:a::77"}[version]
    out = lb.run(either(proto, f"{CLIENTS[version]}1", elsewhere))
    assert out.reasons == {Reason.PASS_NOT_OURS: 1}


def test_options_hold_for_moving_slots_too(make_lb: MakeLb) -> None:
    """S53: a client that is remembered goes there, moving or not; others follow the slot."""
    lb = make_lb()
    service = serve(lb, 4)
    service.ask(affinity_ns=AFFINITY_S * 10**9)
    first = {host: sent_to(lb, 4, host, 1000) for host in range(1, 20)}
    service.set_slots(service.backends[0], service.backends[1], Slot.MOVING)
    assert {host: sent_to(lb, 4, host, 1001) for host in first} == first
    assert {host: sent_to(lb, 4, host, 1001, "A") for host in first} == first
    new: Any = {sent_to(lb, 4, host, 1) for host in range(100, 120)}
    assert new == {BACKENDS[4][0]}
