# SPDX-License-Identifier: Apache-2.0
"""Floods through the TC programs: established connections are unhurt, and counters name the cause.

The tables have room for 512 flows, and a flood is 2,000 packets of as many clients, at settled and
at moving slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from shunt.agent.nat_expiry import HALF_OPEN_NS, judge_nat
from shunt.kern.testrun import run_tc
from tests.packets.balancer import TCP, UDP, S, Slot
from tests.packets.floods import frame_of
from tests.packets.frames import tcp, udp
from tests.packets.test_echo import know_vip
from tests.packets.translator import BACKENDS, CLIENT, NEXT, VIP, Translator, expect, tuple_of

ROOM, FLOOD, CLIENTS = 1 << 9, 2000, 24
SIZES = dict.fromkeys(("nat_fwd", "nat_rev", "fragments"), ROOM)
# Where an Ethernet frame has the low half of its source address, which the source port follows
# behind the rest of the addresses.
SOURCE = {4: (28, 34), 6: (36, 54)}


@dataclass
class Scene:
    tc: Translator
    ip: int = 4
    held: dict[int, tuple[str, int]] = field(default_factory=dict)

    def establish(self) -> None:
        """Connections of one client, and who has each."""
        for port in range(2000, 2000 + CLIENTS):
            self.held[port] = self.ask(port, "S")
            self.answer(port, "SA")
            assert self.ask(port, "A") == self.held[port]

    def ask(self, port: int, flags: str) -> tuple[str, int]:
        """A segment of the client's; the backend that gets it."""
        out = self.tc.run(tcp(CLIENT[self.ip], VIP[self.ip], flags, sport=port))
        expect(out, NEXT, "SENT_TO_BACKEND")
        source, source_port, backend, backend_port = tuple_of(out.packet)
        assert (source, source_port) == (CLIENT[self.ip], port)
        return backend, backend_port

    def answer(self, port: int, flags: str) -> None:
        """A segment of its backend's; the client gets it from the VIP."""
        backend, own = self.held[port]
        out = self.tc.leave(tcp(backend, CLIENT[self.ip], flags, sport=own, dport=port))
        expect(out, NEXT, "SENT_TO_CLIENT")
        assert tuple_of(out.packet) == (VIP[self.ip], 80, CLIENT[self.ip], port)

    def go_on(self) -> None:
        """Both ends of all that were established have something to say."""
        for port, backend in self.held.items():
            assert self.ask(port, "PA") == backend
            self.answer(port, "PA")

    def flood(self, flags: str = "S", *, proto: int = TCP, leaving: bool = False) -> dict[str, int]:
        """Events and reasons that it caused, by name. `leaving`: as if a backend sent it."""
        sources, to = ("192.0.0.1", "2001:db8:f::1"), VIP[self.ip]
        if leaving:
            sources, to = (BACKENDS[4][0], BACKENDS[6][0]), CLIENT[self.ip]
        source = sources[self.ip == 6]
        own = 8080 if leaving else 40000
        packet = udp(source, to) if proto == UDP else tcp(source, to, flags, sport=own)
        frame = bytearray(bytes(packet))
        low, port = SOURCE[self.ip]
        where = port + 2 if leaving else low  # its own address and port are a backend's
        return self._each(frame, where, "shunt_egress" if leaving else "shunt_ingress")

    def flood_fragments(self, kind: str) -> dict[str, int]:
        """Of datagrams, one of each: first or later ones."""
        frame, low = bytearray(frame_of(kind, self.ip, VIP[self.ip], 80)[0]), SOURCE[self.ip][0]
        return self._each(frame, low, "shunt_ingress")

    def _each(self, frame: bytearray, where: int, program: str) -> dict[str, int]:
        """The frame with numbers there."""
        fd, before = self.tc.object.programs[program].fd, self.counts()
        for number in range(FLOOD):
            frame[where : where + 2] = (number + 256).to_bytes(2, "big")
            run_tc(fd, bytes(frame))
        return {n: c - before[n] for n, c in self.counts().items() if c != before[n]}

    def counts(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for name, enum, column in (
            ("reasons", self.tc.object.btf.enum("reason", "REASON_"), "packets"),
            ("events", self.tc.object.btf.enum("event", "EVENT_"), "times"),
        ):
            totals = self.tc.map(name).totals()[column]
            found |= {e.name: int(totals[e]) for e in enum if e.name != "COUNT"}
        return found

    def pairs(self) -> int:
        """How many flows are known; each by both of its entries."""
        forward, reverse = (len(self.tc.entries(name)) for name in ("nat_fwd", "nat_rev"))
        assert forward == reverse
        return forward

    def forget(self) -> None:
        """What the agent's scan does, by its own judgement."""
        now = int(self.tc.clock)
        no, idle = np.zeros(1, np.bool_), np.array([8000 * S])
        reverse = {self._client(v): (k, v) for k, v in self.tc.entries("nat_rev")}
        for key, value in self.tc.entries("nat_fwd"):
            other, said = reverse[key["saddr"].tobytes(), int(key["sport"])]
            both = np.array([said]), np.array([value])
            if judge_nat(*both, no, no, idle, now, np.array([TCP]))[0]:
                self.tc.map("nat_fwd").delete(key)
                self.tc.map("nat_rev").delete(other)

    @staticmethod
    def _client(value: Any) -> tuple[bytes, int]:
        return value["client"].tobytes(), int(value["client_port"])


@pytest.fixture(scope="module")
def translator() -> Iterator[Translator]:
    with Translator(SIZES, inserts_per_s=1 << 30) as tc:
        yield tc


def scene(tc: Translator, ip: int, state: int = Slot.SETTLED) -> Scene:
    for proto in (TCP, UDP):
        made = tc.add_service(VIP[ip], 80, proto, backends=BACKENDS[ip], backend_port=8080)
        if state != Slot.SETTLED:
            made.set_slots(made.backends, made.backends[0], state)
    know_vip(tc, VIP[ip], at_tc=True)
    return Scene(tc, ip)


@pytest.fixture(params=[4, 6])
def ip(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=["SETTLED", "MOVING"])
def full(request: pytest.FixtureRequest, ip: int, translator: Translator) -> Scene:
    """The table is what ends a flood."""
    translator.empty()
    return scene(translator, ip, Slot[request.param])


def test_half_open_connections_beyond_the_tables(full: Scene) -> None:
    full.establish()
    said = full.flood("S")
    room = ROOM - CLIENTS
    assert said == {
        "SENT_TO_BACKEND": room,
        "NAT_CREATED": room,
        "DROP_NAT_TABLE_FULL": FLOOD - room,
    }
    full.go_on()
    # Nor does a second one, into the full table, displace anything; the half-open are known again.
    assert full.flood("S") == {"SENT_TO_BACKEND": room, "DROP_NAT_TABLE_FULL": FLOOD - room}
    full.go_on()
    assert full.pairs() == ROOM
    refused = full.tc.run(tcp(CLIENT[full.ip], VIP[full.ip], "S", sport=1))
    assert [r.name for r in refused.reasons] == ["DROP_NAT_TABLE_FULL"]


def test_the_half_open_go_first(full: Scene) -> None:
    full.establish()
    full.flood("S")
    full.tc.advance(HALF_OPEN_NS / S + 1)
    full.forget()
    assert full.pairs() == CLIENTS
    full.go_on()
    assert full.ask(1, "S")[0] in BACKENDS[full.ip]


def test_datagrams_beyond_the_tables(full: Scene) -> None:
    full.establish()
    said = full.flood(proto=UDP)
    assert said["DROP_NAT_TABLE_FULL"] == FLOOD - (ROOM - CLIENTS)
    full.go_on()


def test_first_fragments_beyond_the_tables(full: Scene) -> None:
    full.establish()
    said, room = full.flood_fragments("first fragments"), ROOM - CLIENTS
    assert said == {
        "SENT_TO_BACKEND": room,
        "NAT_CREATED": room,
        "FRAGMENT_FIRST": room,
        "DROP_NAT_TABLE_FULL": FLOOD - room,
    }
    assert len(full.tc.entries("fragments")) <= ROOM
    full.go_on()


def test_later_fragments_store_nothing(full: Scene) -> None:
    """Without their first ones they are the stack's, which TC does not count."""
    full.establish()
    assert full.flood_fragments("later fragments") == {"FRAGMENT_EARLY": FLOOD}
    assert full.pairs() == CLIENTS
    assert not full.tc.entries("fragments")
    full.go_on()


@pytest.mark.parametrize("flags", ["A", "SA", "R"])
def test_stray_segments_store_nothing(full: Scene, flags: str) -> None:
    full.establish()
    assert full.flood(flags) == {"DROP_NAT_NO_FLOW": FLOOD}
    assert full.pairs() == CLIENTS
    full.go_on()


def test_what_a_backend_sends_to_nobody_stores_nothing(full: Scene) -> None:
    """From the port of its connections, to ports of which the client has but some."""
    full.establish()
    own = [port for port, to in full.held.items() if to == (BACKENDS[full.ip][0], 8080)]
    assert full.flood("SA", leaving=True) == {"SENT_TO_CLIENT": len(own)}
    assert 0 < len(own) < CLIENTS
    assert full.pairs() == CLIENTS
    full.go_on()


def test_new_flows_have_a_budget() -> None:
    with Translator(SIZES, inserts_per_s=300) as tc:
        flooded = scene(tc, 4)
        flooded.establish()
        said = flooded.flood("S")
        assert said == {
            "SENT_TO_BACKEND": 300 - CLIENTS,
            "NAT_CREATED": 300 - CLIENTS,
            "DROP_NAT_OVER_BUDGET": FLOOD - (300 - CLIENTS),
        }
        flooded.go_on()


def test_segments_that_claim_to_be_of_established_connections(full: Scene) -> None:
    """SYNs, and replies out of place, with the very tuples; none moves or ends one."""
    full.establish()
    for flags in ("S", "SF", "", "SA"):
        for port in full.held:
            full.tc.run(tcp(CLIENT[full.ip], VIP[full.ip], flags, sport=port))
    full.go_on()
    full.tc.advance(3600)
    full.forget()
    assert full.pairs() == CLIENTS


def test_that_check_can_fail(full: Scene) -> None:
    full.establish()
    (key, _), *_ = full.tc.entries("nat_rev")
    full.tc.map("nat_rev").delete(key)
    with pytest.raises(AssertionError):
        full.go_on()
