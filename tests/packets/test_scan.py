# SPDX-License-Identifier: Apache-2.0
"""The scan and the planner on real maps: what ends, what is kept, and what a full table refuses."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from shunt.agent.apply import sync_ports
from shunt.agent.writes import Write
from shunt.kern.testrun import run_xdp
from shunt.lb import slots as slot
from shunt.lb.errors import ShuntError
from shunt.lb.model import Frontend, Mode, Protocol
from tests.packets.histories import ACK, FIN, SYN, VIP, Lab, packet

LB = Path(__file__).resolve().parents[2] / "xdp" / "lb.bpf.o"
OWN = IPv4Address("10.0.0.250")
RST = 0x04
A, B = IPv4Address("10.0.0.1"), IPv4Address("10.0.0.2")


@contextmanager
def lab(backends: int = 2, **fields: Any) -> Iterator[Lab]:
    found = Lab(LB, **fields)
    try:
        found.obj.maps["nexthops"].mapped()["saddr"][1] = np.frombuffer(
            bytes(10) + b"\xff\xff" + OWN.packed, np.uint8
        )
        found.configured = {A + n for n in range(backends)}
        found.reconcile()
        found.tick()
        yield found
    finally:
        found.close()


def datagram(flow: int) -> bytes:
    udp = struct.pack("!HHHH", 1024 + flow, 80, 12, 0) + b"ping"
    addresses = IPv4Address("192.0.2.1").packed + VIP.packed
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 32, 0, 0, 64, 17, 0) + addresses
    return bytes(12) + b"\x08\x00" + ip + udp


def send(lab: Lab, frame: bytes) -> bytes:
    lab.tick()
    return run_xdp(lab.fd, frame).data


def backend_of_datagram(lab: Lab, flow: int) -> IPv4Address:
    return IPv4Address(send(lab, datagram(flow))[30:34])


def states(lab: Lab) -> set[int]:
    (place,) = lab.tables.placed.values()
    return set(slot.state(lab.tables.words[place.slots()]).tolist())


# UDP ---------------------------------------------------------------------------------------


def test_udp_flows_that_speak_within_the_grace_period_stay() -> None:
    """S71, S75: the same backend for a flow that goes on, the new one for flows that begin."""
    with lab(protocol=Protocol.UDP) as udp:
        before = {flow: backend_of_datagram(udp, flow) for flow in range(200)}
        udp.configured.add(A + 2)
        udp.reconcile()
        for _ in range(4):
            udp.now_s += 3
            assert {flow: backend_of_datagram(udp, flow) for flow in range(100)} == {
                flow: before[flow] for flow in range(100)
            }
            udp.scan()
        udp.now_s += 3
        udp.scan()  # the window of 10 s has passed: moving slots linger
        assert int(slot.State.MOVING) not in states(udp)
        for flow in range(100):
            assert backend_of_datagram(udp, flow) == before[flow]
        later = {flow: backend_of_datagram(udp, flow) for flow in range(300, 600)}
        assert A + 2 in later.values()
        udp.now_s += 70  # idle for more than 60 s, and the margin
        udp.scan()
        udp.now_s += 1
        udp.scan()
        assert states(udp) == {int(slot.State.SETTLED)}
        assert not len(udp.tables.flows.flows())


def test_udp_flows_of_a_removed_backend_move_at_once() -> None:
    with lab(protocol=Protocol.UDP) as udp:
        before = {flow: backend_of_datagram(udp, flow) for flow in range(100)}
        udp.configured.discard(B)
        udp.reconcile()
        assert {backend_of_datagram(udp, flow) for flow in before} == {A}


# nat ---------------------------------------------------------------------------------------


def reply(frame: bytes, flags: int) -> bytes:
    """The backend's answer to a translated segment."""
    sport, dport = struct.unpack("!HH", frame[34:38])
    tcp = struct.pack("!HHIIBBHHH", dport, sport, 1, 1, 5 << 4, flags, 8192, 0, 0)
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0, 64, 6, 0) + frame[30:34] + frame[26:30]
    return bytes(12) + b"\x08\x00" + ip + tcp


def pairs(lab: Lab) -> tuple[int, int]:
    maps = lab.obj.maps
    return len(maps["nat_fwd"].items()[0]), len(maps["nat_rev"].items()[0])


@contextmanager
def nat(**fields: Any) -> Iterator[Lab]:
    with lab(mode=Mode.NAT, **fields) as found:
        sync_ports(found.tables, range(10000, 30000))
        yield found


def established(lab: Lab, flow: int) -> bytes:
    out = send(lab, packet(flow, SYN, 7))
    send(lab, reply(out, SYN | ACK))
    return send(lab, packet(flow, ACK, 8))


def test_a_translated_flow_lives_while_either_side_speaks() -> None:
    with nat() as lb:
        out = established(lb, 1)
        for _ in range(5):
            lb.now_s += 40  # the idle window is 50 s
            send(lb, reply(out, ACK))  # the client is silent
            lb.scan()
        assert pairs(lb) == (1, 1)
        lb.now_s += 56
        lb.scan()
        assert pairs(lb) == (0, 0)


@pytest.mark.parametrize(("client", "backend"), [(FIN, FIN), (RST, 0), (0, RST)])
def test_a_closed_pair_ends_after_a_short_time(client: int, backend: int) -> None:
    with nat(idle_s=8000) as lb:
        established(lb, 1)
        out = established(lb, 2)
        if client:
            send(lb, packet(2, client | ACK, 9))
        if backend:
            send(lb, reply(out, backend | ACK))
        lb.now_s += 70
        lb.scan()
        assert pairs(lb) == (1, 1)


def test_a_half_closed_pair_lives_on() -> None:
    with nat(idle_s=8000) as lb:
        established(lb, 1)
        send(lb, packet(1, FIN | ACK, 9))
        lb.now_s += 70
        lb.scan()
        assert pairs(lb) == (1, 1)


def test_pairs_of_a_backend_that_is_gone_end_at_once() -> None:
    with nat() as lb:
        for flow in range(40):
            established(lb, flow)
        lb.configured.discard(B)
        lb.gone.add(B)
        lb.reconcile()
        lb.now_s += 1
        lb.scan()
        forward, reverse = pairs(lb)
        assert forward == reverse
        assert 0 < forward < 40


def test_half_of_a_pair_is_cleared() -> None:
    """As a crash between two deletions leaves it."""
    with nat() as lb:
        for flow in range(10):
            established(lb, flow)
        keys, _ = lb.obj.maps["nat_rev"].items()
        lb.obj.maps["nat_rev"].delete_many(keys[:3])
        keys, _ = lb.obj.maps["nat_fwd"].items()
        lb.obj.maps["nat_fwd"].delete_many(keys[:4])
        lb.now_s += 10
        lb.scan()
        forward, reverse = pairs(lb)
        assert forward == reverse <= 6


# Ids, and full tables ----------------------------------------------------------------------


def test_an_id_is_not_used_again_while_a_flow_names_it() -> None:
    with lab(backends=3) as lb:
        (place,) = lb.tables.placed.values()
        first = {e.address: i for e, i in place.backends.items()}
        lb.configured.discard(A + 2)
        lb.gone.add(A + 2)
        lb.reconcile()
        lb.configured.add(A + 9)
        lb.reconcile()
        (place,) = lb.tables.placed.values()
        assert place.backends[next(e for e in place.backends if e.address == A + 9)] not in (
            first.values()
        )
        lb.restart()  # nor by an agent that has only the maps to go by
        lb.now_s += 1
        lb.scan()
        lb.now_s += 1
        lb.scan()
        assert first[A + 2] not in lb.tables.retired_backends
        lb.configured.add(A + 10)
        lb.reconcile()
        (place,) = lb.tables.placed.values()
        assert first[A + 2] in place.backends.values()


@pytest.mark.parametrize(
    ("sizes", "table"),
    [
        ({"backends": 8}, "backends"),
        ({"slots": 256, "restarts": 32}, "slots"),
    ],
)
def test_a_full_table_refuses_the_change_and_keeps_what_is(
    sizes: dict[str, int], table: str
) -> None:
    with lab(sizes=sizes) as lb:
        before = {flow: lb.send(flow, SYN, 1) for flow in range(50)}
        words, known = lb.tables.words.copy(), lb.tables.known().copy()
        old = set(lb.configured)
        lb.configured |= {A + n for n in range(40)}
        with pytest.raises(ShuntError) as caught:
            lb.reconcile()
        assert caught.value.what == f"table {table} is full"
        assert f"limits.{table}" in caught.value.fix
        assert (lb.tables.words == words).all()
        assert (lb.tables.known() == known).all()
        lb.configured = old
        assert lb.reconcile() == 0
        assert {flow: lb.send(flow, ACK, 2) for flow in range(50)} == before
        lb.configured.add(A + 2)  # and what fits is taken
        assert lb.reconcile() > 0


@pytest.mark.parametrize(
    ("table", "sizes", "services", "ports"),
    [
        ("frontends", {"services": 16}, 1, 16),
        ("frontends", {"services": 16}, 16, 1),
        ("services", {"svc": 8}, 10, 1),
    ],
)
def test_more_services_than_fit_are_refused_and_nothing_changes(
    table: str, sizes: dict[str, int], services: int, ports: int
) -> None:
    with lab(sizes=sizes) as lb:

        def plan(services: int, ports: int) -> list[Write]:
            (web,) = lb.targets().values()
            want = {web.name: web}
            for n in range(1, services + 1):
                vip = VIP + n
                frontends = frozenset(Frontend(vip, 80 + p, Protocol.TCP) for p in range(ports))
                want[f"s{n}/tcp"] = replace(web, name=f"s{n}/tcp", frontends=frontends)
            return lb.planner.plan(want, lb.now_ns, lb.condition)

        before = {flow: lb.send(flow, SYN, 1) for flow in range(50)}
        free = [ids.available() for ids in (lb.tables.service_ids, lb.tables.backend_ids)]
        slots = lb.tables.regions.free_slots()
        with pytest.raises(ShuntError) as caught:
            plan(services, ports)
        assert caught.value.what == f"table {table} is full"
        assert caught.value.why
        assert f"limits.{table}" in caught.value.fix
        # What the plan had taken is given back: what fits still fits.
        assert free == [ids.available() for ids in (lb.tables.service_ids, lb.tables.backend_ids)]
        assert slots == lb.tables.regions.free_slots()
        assert lb.reconcile() == 0
        lb.applier.apply(plan(2, 2))
        assert {flow: lb.send(flow, ACK, 2) for flow in range(50)} == before
        assert len(lb.tables.frontends) == 5


def test_restarting_finds_everything_and_plans_nothing() -> None:
    with lab(backends=5) as lb:
        lb.drained.add(A)
        lb.failing.add(B)
        lb.reconcile()
        lb.restart()
        assert lb.reconcile() == 0
