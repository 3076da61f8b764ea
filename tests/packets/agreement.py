# SPDX-License-Identifier: Apache-2.0
"""One service in the tables of XDP and of TC, and packets that both must send to the same backend.

The same tables three times: XDP has one to itself, TC another, and of the third each packet meets
one of the two, as while an interface gets an XDP program or loses it. Mode nat, which both have.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.packets.balancer import UP, Balancer, Out, Reason, Service, Slot
from tests.packets.frames import packed
from tests.packets.test_quic import CONFIG, SERVERS, name
from tests.packets.test_tc_tracking import IDLE_S
from tests.packets.translator import CLIENT, VIP, Translator, tuple_in

BACKENDS = {4: [f"10.0.1.{n}" for n in range(1, 6)], 6: [f"fd00::1:{n}" for n in range(1, 6)]}
SLOTS = 64
AFFINITY_NS = 100 * 10**9
# What a service may ask for, and the port of its frontend: 0 is any.
KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 80),
    "affinity": ({"affinity_ns": AFFINITY_NS}, 80),
    "hash client": ({"hash_client": True}, 80),
    "both": ({"affinity_ns": AFFINITY_NS, "hash_client": True}, 80),
    "any port": ({}, 0),
    "quic": ({"quic": CONFIG}, 443),
    "quic, affinity": ({"quic": CONFIG, "affinity_ns": AFFINITY_NS}, 443),
}


def said(out: Out) -> tuple[str, Any]:
    """What became of a packet. Of no known flow, XDP answers it, and TC does not."""
    (reason,) = out.reasons
    if reason in {Reason.SENT_RST_NO_FLOW, Reason.DROP_NAT_NO_FLOW}:
        return "DROP_NAT_NO_FLOW", out.events
    sent = reason in {Reason.SENT_TO_BACKEND, Reason.SENT_TO_CLIENT}
    return reason.name, (out.data if sent else b"", out.events)


@dataclass
class Programs:
    """XDP alone, TC alone, and the two that share their tables."""

    xdp: Balancer
    tc: Translator
    sharing: tuple[Balancer, Translator]
    draw: random.Random = field(default_factory=lambda: random.Random(0))

    @property
    def tables(self) -> tuple[Balancer, ...]:
        return self.xdp, self.tc, self.sharing[1]

    def begin(self, seed: int) -> None:
        self.draw = random.Random(seed)
        for lb in (*self.tables, self.sharing[0]):
            lb.empty()

    def advance(self, seconds: float) -> None:
        for lb in (*self.tables, self.sharing[0]):
            lb.advance(seconds)

    def run(self, packet: bytes) -> Out:
        """What all three make of it."""
        one, *others = (p.run(packet) for p in (self.tc, self.xdp, self.draw.choice(self.sharing)))
        assert [said(other) for other in others] == [said(one)] * 2
        return one


@contextmanager
def loaded() -> Iterator[Programs]:
    """The programs, which no budget holds up."""
    asked: dict[str, Any] = {"inserts_per_s": 10**6, "answers_per_s": 10**6}
    with (
        Balancer(**asked) as xdp,
        Translator(**asked) as tc,
        Translator(**asked) as shared,
        Balancer(maps=shared.object.maps, **asked) as other,
    ):
        yield Programs(xdp, tc, (other, shared))


@dataclass
class Scene:
    """One service, as each of the tables has it, and its clients."""

    programs: Programs
    ip: int
    proto: int
    kind: str = "plain"
    mode: str = "nat"

    def __post_init__(self) -> None:
        self.asked, self.port = KINDS[self.kind]
        self.services = [self._serve(lb) for lb in self.programs.tables]
        self.ids = self.services[0].backends
        self.flags = dict.fromkeys(self.ids, UP)

    def _serve(self, lb: Balancer) -> Service:
        service = lb.add_service(
            VIP[self.ip], self.port, self.proto, self.mode, BACKENDS[self.ip],
            slots=SLOTS, idle_s=IDLE_S,
        )  # fmt: skip
        service.ask(**self.asked)
        if "quic" in self.asked:
            name(lb, service, dict(zip(SERVERS, service.backends, strict=False)))
        return service

    def set_slots(self, cur: int | Sequence[int], prev: int = 0, state: int = Slot.SETTLED) -> None:
        for service in self.services:
            service.set_slots(cur, prev, state)

    def set_flags(self, backend: int, flags: int) -> None:
        self.flags[backend] = flags
        for lb in self.programs.tables:
            lb.set_flags(backend, flags)

    def send(
        self, sport: int, flags: str = "S", *, host: str = "", dport: int = 0, payload: bytes = b""
    ) -> Out:
        client, port = host or CLIENT[self.ip], dport or self.port or 80
        return self.programs.run(
            packed(self.proto, client, VIP[self.ip], flags, sport, port, payload)
        )

    def reply(self, sent: Out, flags: str = "SA") -> Out:
        """What the backend says to what it got."""
        src, sport, dst, dport = tuple_in(sent.data)
        return self.programs.run(packed(self.proto, dst, src, flags, dport, sport))

    def backend_of(self, out: Out) -> int | None:
        """Its id; None: the packet was not sent."""
        if out.reasons != {Reason.SENT_TO_BACKEND: 1}:
            return None
        return self.ids[BACKENDS[self.ip].index(tuple_in(out.data)[2])]
