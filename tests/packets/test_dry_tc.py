# SPDX-License-Identifier: Apache-2.0
"""TC's dry programs against the live ones, as test_dry.py has it for XDP's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice

import pytest
from scapy.packet import Packet

from shunt.kern.tc import Direction
from shunt.kern.testrun import Ran, run_tc
from shunt.tc.attach import PROGRAMS
from shunt.tc.translation import DRY
from shunt.xdp.dry import DryRun
from tests.fuzz.mutations import mutations
from tests.packets.balancer import LOOPBACK, OWN4, OWN6, SCTP, TCP, UDP, Out, Reason
from tests.packets.frames import either, sctp
from tests.packets.test_dry import contents, verdict_of
from tests.packets.test_fragments import fragments_of
from tests.packets.test_tc_masquerade import OWN, POD, WORLD, Masquerader
from tests.packets.test_tc_masquerade_echo import echo_of, reply, request
from tests.packets.translator import BACKENDS, CLIENT, VIP, answer

IN, OUT = Direction.INGRESS, Direction.EGRESS
LOCAL, REMOTE = 80, 81  # ports of a service of mode local, and of nat


class Twins:
    """The live programs and the dry ones, which are asked first."""

    def __init__(self, tc: Masquerader) -> None:
        self.tc = tc
        self.dry = {
            way: DryRun(tc.config, tc.object.maps, DRY, PROGRAMS[way], _run) for way in Direction
        }
        self.reasons: set[str] = set()

    def run(self, way: Direction, packet: Packet | bytes) -> Out:
        """One packet through both. Raises: AssertionError where they differ."""
        frame = bytes(packet)
        before = contents(self.tc.object.maps)
        self.dry[way].clock[...] = self.tc.clock
        tried = self.dry[way].run(frame)
        assert contents(self.tc.object.maps) == before, frame.hex()
        out = self.tc.run(frame) if way is IN else self.tc.leave(frame)
        reason = Reason(verdict_of(tried)[1])
        counted = set(out.reasons) or {Reason.PASS_NOT_OURS}
        assert ({reason}, tried.verdict, tried.data) == (counted, out.verdict, out.data)
        self.reasons.add(reason.name)
        return out

    def close(self) -> None:
        for dry in self.dry.values():
            dry.close()


def _run(fd: int, frame: bytes, ifindex: int) -> Ran:
    return run_tc(fd, frame, ifindex=ifindex)


@pytest.fixture(params=["device", "peer"])
def twins(request: pytest.FixtureRequest) -> Iterator[Twins]:
    """With both ways of handing on what is for another device: by it, or past it."""
    with Masquerader(handover_peer=request.param == "peer") as tc:
        tc.add_veth(LOOPBACK)
        for ip in (4, 6):
            for proto in (TCP, UDP):
                tc.add_service(VIP[ip], LOCAL, proto, backends=BACKENDS[ip], backend_port=8080)
                tc.add_service(VIP[ip], REMOTE, proto, "nat", backends=BACKENDS[ip])
        found = Twins(tc)
        yield found
        found.close()


def test_they_say_what_becomes_of_connections(twins: Twins) -> None:
    rnd = random.Random(5)
    for _ in range(150):
        ip, proto = rnd.choice((4, 6)), rnd.choice((TCP, UDP))
        flags = rnd.choice(("S", "S", "A", "FA", "R"))
        port = rnd.randrange(1024, 1030)
        extra = {"flags": flags} if proto == TCP else {}
        to = rnd.choice((LOCAL, REMOTE))
        if rnd.random() < 0.3:  # a VIP on its way out: it was none, or is none any more
            whom = rnd.choice((WORLD, VIP))[ip]
            sent = twins.run(OUT, either(proto, POD[ip], whom, sport=port, dport=to, **extra))
        else:
            who = rnd.choice((CLIENT, CLIENT, POD))[ip]
            sent = twins.run(IN, either(proto, who, VIP[ip], sport=port, dport=to, **extra))
        if sent.reasons and not any(r.name.startswith("DROP") for r in sent.reasons):
            back = rnd.choice(("SA", "A", "FA", "R", "S"))
            answered = answer(sent, back, proto=proto)
            for way in (IN, OUT) if rnd.random() < 0.8 else (OUT,):
                twins.run(way, answered)
        twins.tc.advance(rnd.choice((0.001, 0.1, 61)))
    assert {"SENT_TO_BACKEND", "SENT_TO_CLIENT", "SENT_MASQUERADED"} <= twins.reasons
    assert {"DROP_NAT_NO_FLOW", "DROP_NAT_INVALID", "PASS_NOT_OURS"} <= twins.reasons


def test_they_say_what_becomes_of_any_packet(twins: Twins) -> None:
    corpus = [
        (0, bytes(either(proto, CLIENT[ip], VIP[ip], dport=port, **extra)))
        for ip in (4, 6)
        for proto, extra in ((TCP, {"flags": "S"}), (TCP, {"flags": "A"}), (UDP, {}))
        for port in (LOCAL, REMOTE)
    ]
    # The kernel makes no skb of what is shorter than its IP header.
    frames = (f for _, f in mutations(random.Random(7), corpus) if len(f) >= 54)
    for n, frame in enumerate(islice(frames, 600)):
        twins.run(OUT if n % 4 == 0 else IN, frame)
    assert len(twins.reasons) >= 4, twins.reasons


@pytest.mark.parametrize("ip", [4, 6])
def test_they_say_what_becomes_of_associations(twins: Twins, ip: int) -> None:
    for port, mode in ((LOCAL, "local"), (REMOTE, "nat")):
        twins.tc.add_service(VIP[ip], port, SCTP, mode, backends=BACKENDS[ip][:1])
        for sport, chunks in (
            (7, "INIT"),
            (7, "COOKIE ECHO"),
            (8, "DATA"),
            (7, "INIT"),
            (7, "ABORT"),
        ):
            twins.run(IN, sctp(CLIENT[ip], VIP[ip], chunks, sport=sport, dport=port))
        twins.run(IN, sctp(CLIENT[ip][:-1] + "9", VIP[ip], sport=7, dport=port))
        own = CLIENT[ip] if mode == "local" else (OWN4 if ip == 4 else OWN6)
        back = sctp(BACKENDS[ip][0], own, "INIT ACK", sport=port, dport=7)
        twins.run(OUT if mode == "local" else IN, back)
    for chunks in ("INIT", "COOKIE ECHO", "INIT"):
        twins.run(OUT, sctp(POD[ip], WORLD[ip], chunks, sport=7, dport=9))
    assert {"SENT_TO_BACKEND", "SENT_TO_CLIENT", "SENT_MASQUERADED"} <= twins.reasons
    assert {"DROP_NAT_NO_FLOW", "DROP_NAT_INVALID", "DROP_NAT_SCTP_PORT"} <= twins.reasons


@pytest.mark.parametrize("ip", [4, 6])
def test_they_say_what_becomes_of_pings_and_pieces(twins: Twins, ip: int) -> None:
    ident = echo_of(twins.run(OUT, request(ip, POD[ip], WORLD[ip], 7)).packet)[2]
    twins.run(OUT, request(ip, POD[ip], WORLD[ip], 7, 2))
    twins.run(IN, reply(ip, WORLD[ip], OWN[ip], ident))
    twins.run(IN, reply(ip, WORLD[ip], OWN[ip], ident ^ 1))
    parts = fragments_of(request(ip, POD[ip], WORLD[ip], 8, 1, bytes(4000)))
    pieces = fragments_of(either(UDP, POD[ip], WORLD[ip], payload=bytes(4000)), 78)
    for part in (*parts, *pieces[1:], *pieces):
        twins.run(OUT, part)
    assert twins.reasons == {
        "SENT_MASQUERADED", "SENT_TO_CLIENT", "PASS_NOT_OURS", "DROP_NAT_FRAGMENT"
    }  # fmt: skip
