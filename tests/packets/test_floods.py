# SPDX-License-Identifier: Apache-2.0
"""Floods through the real program: established connections are unhurt, and counters name the cause.

Each is 20,000 packets of as many clients at full speed, over tables that others filled before:
SYNs, stray ACKs, datagrams, and fragments that are the first or the rest of a datagram that is
never whole; at settled and at moving slots, in both families, sent on wrapped or translated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

import numpy as np
import pytest

from shunt.kern.testrun import Runs
from shunt.lb.slots import State
from tests.packets.balancer import TCP, UDP, Balancer, Service
from tests.packets.floods import KINDS, Flooder
from tests.packets.frames import ETH, tcp, udp
from tests.packets.test_echo import know_vip
from tests.packets.test_fragments import fragments_of

FLOOD = 20_000
ROOM = 1 << 10
SIZES = dict.fromkeys(("flows", "nat_fwd", "nat_rev", "fragments"), ROOM)
# More than there is room for, and of clients that no flood has.
FILLERS, ELSEWHERE = 8 * ROOM, 1 << 20
VIP = {4: "203.0.113.1", 6: "2001:db8:a::1"}
BACKENDS = {
    4: [f"172.16.0.{n}" for n in range(1, 11)],
    6: [f"fd00::{n}" for n in range(1, 11)],
}
CLIENT = {4: "192.0.2.1", 6: "2001:db8:c::1"}
PORTS = range(2000, 2100)
# Where a frame, wrapped in the same family or not at all, has its destination.
DESTINATION = {4: slice(ETH + 16, ETH + 20), 6: slice(ETH + 24, ETH + 40)}
SPORT = {4: ETH + 20, 6: ETH + 40}

COLLISION = "NAT_COLLISION"

MakeLb = Callable[..., Balancer]
kinds = pytest.mark.parametrize("kind", KINDS)
versions = pytest.mark.parametrize("version", [4, 6])
modes = pytest.mark.parametrize("mode", ["dsr-ipip", "nat"])


@pytest.fixture(scope="module")
def flooder() -> Iterator[Flooder]:
    with Flooder() as flooder:
        yield flooder


@dataclass
class Scene:
    """A service of TCP and one of datagrams, with a VIP and backends in common."""

    lb: Balancer
    flooder: Flooder
    version: int
    mode: str
    services: list[Service] = field(default_factory=list)

    def __post_init__(self) -> None:
        vip, backends = VIP[self.version], BACKENDS[self.version]
        self.services += [self.lb.add_service(vip, 80, p, self.mode, backends) for p in (TCP, UDP)]
        know_vip(self.lb, vip)
        self.program = self.lb.object.programs["shunt_lb"].fd
        self._runs = Runs(self.program, 256)
        self._owners = {ip_address(a).packed: a for a in backends}
        ends = CLIENT[self.version], VIP[self.version]
        self._frames = {name: bytes(tcp(*ends, name)) for name in ("S", "A")}
        self._frames["U"] = bytes(udp(*ends))

    def to(self, kind: str, port: int) -> str:
        """Which backend gets a packet of a client's: S(YN), A(CK), or U(DP)."""
        frame, at = bytearray(self._frames[kind]), SPORT[self.version]
        frame[at : at + 2] = port.to_bytes(2, "big")
        self._runs.run(bytes(frame))
        return self.receiver(self._runs.data)

    def receiver(self, sent: bytes) -> str:
        return self._owners[sent[DESTINATION[self.version]]]

    def established(self, begin: bool = False) -> dict[tuple[str, int], str]:
        """Connections of one client, of both protocols, and who has each."""
        if begin:
            for port in PORTS:
                self.to("S", port)
        return {(kind, port): self.to(kind, port) for port in PORTS for kind in ("A", "U")}

    def set_slots(self, state: State = State.SETTLED) -> None:
        """All are the backends' in turn; or they come from the first one to the second."""
        for service in self.services:
            if state == State.SETTLED:
                service.set_slots(service.backends)
            else:
                service.set_slots(service.backends[1], service.backends[0], state)

    def fill(self) -> None:
        """The tables of flows, by others who came before."""
        for kind in ("SYN", "UDP"):
            self.flood(kind, FILLERS, first=ELSEWHERE)

    def flood(self, kind: str, packets: int = FLOOD, **stream: int) -> dict[str, int]:
        """Events and reasons that it caused, by name."""
        before = self.counts()
        self.flooder.send(self.program, kind, VIP[self.version], packets, **stream)
        after = self.counts()
        # Which ports are tried, and found taken, is left to chance.
        return {n: c - before[n] for n, c in after.items() if c != before[n] and n != COLLISION}

    def counts(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for name, enum, column in (
            ("reasons", self.lb.object.btf.enum("reason", "REASON_"), "packets"),
            ("events", self.lb.object.btf.enum("event", "EVENT_"), "times"),
        ):
            totals = self.lb.map(name).totals()[column]
            found |= {e.name: int(totals[e]) for e in enum if e.name != "COUNT"}
        return found

    def remembered(self) -> set[bytes]:
        """The flows in all tables."""
        pairs = (self.lb.entries(name) for name in ("nat_fwd", "nat_rev"))
        flows = {key.tobytes() for key in self.lb.flows()["key"]}
        return flows.union(*({key.tobytes() for key, _ in found} for found in pairs))


@pytest.fixture
def make_scene(make_lb: MakeLb, flooder: Flooder) -> Callable[..., Scene]:
    def make(version: int = 4, mode: str = "dsr-ipip", inserts: int = 1 << 30) -> Scene:
        lb = make_lb(SIZES, answers_per_s=100, inserts_per_s=inserts)
        return Scene(lb, flooder, version, mode)

    return make


def causes(kind: str, mode: str) -> dict[str, int]:
    """What a flood is counted as where no more flows can be remembered, FLOW_* aside."""
    if kind == "later fragments":
        return {"PASS_FRAGMENT": FLOOD, "FRAGMENT_EARLY": FLOOD}
    if mode == "nat":
        return {"SENT_RST_NO_FLOW" if kind == "stray ACK" else "DROP_NAT_TABLE_FULL": FLOOD}
    first = {"FRAGMENT_FIRST": FLOOD} if kind == "first fragments" else {}
    return {"SENT_TO_BACKEND": FLOOD, **first}


@kinds
@versions
@modes
def test_settled_slots_take_no_notice(
    kind: str, version: int, mode: str, make_scene: Callable[..., Scene]
) -> None:
    scene = make_scene(version, mode)
    before = scene.established(begin=True)
    assert len(set(before.values())) == 10
    scene.set_slots(State.MOVING)
    scene.fill()
    scene.set_slots()
    full = scene.remembered()
    assert len(full) > ROOM // 2
    assert scene.flood(kind) == causes(kind, mode)
    assert scene.established() == before
    assert scene.remembered() == full


@kinds
@versions
@modes
def test_moving_slots_keep_their_connections(
    kind: str, version: int, mode: str, make_scene: Callable[..., Scene]
) -> None:
    scene = make_scene(version, mode)
    for service in scene.services:
        service.set_slots(service.backends[0])
    before = scene.established(begin=True)
    scene.set_slots(State.MOVING)
    assert scene.established() == before  # and they are remembered from now on
    scene.fill()
    full = scene.remembered()
    for _ in range(2):
        said = scene.flood(kind)
        flows = {n: said.pop(n) for n in list(said) if n.startswith("FLOW_")}
        assert said == causes(kind, mode)
        asks = mode == "dsr-ipip" and kind != "later fragments"
        assert flows == ({"FLOW_TABLE_FULL": FLOOD} if asks else {})
        assert scene.established() == before
    assert scene.remembered() == full
    if mode == "dsr-ipip":
        # Who comes now can't be remembered, and is sent where its next packet goes too.
        assert scene.to("S", 1) == scene.to("A", 1) == BACKENDS[version][0]
    # Only what is remembered stays there now.
    scene.set_slots(State.LINGERING)
    assert scene.established() == before


@kinds
def test_settled_slots_store_nothing(kind: str, make_scene: Callable[..., Scene]) -> None:
    scene = make_scene()
    scene.flood(kind)
    assert not scene.remembered()


@versions
@modes
def test_whole_datagrams_go_on_among_parts_of_others(
    version: int, mode: str, make_scene: Callable[..., Scene]
) -> None:
    """Datagrams whose parts come together; what is remembered of first ones makes room for them."""
    scene = make_scene(version, mode)
    before = scene.established(begin=True)
    ends = CLIENT[version], VIP[version]
    for kind in ("first fragments", "later fragments"):
        scene.flood(kind)
        assert len(scene.lb.entries("fragments")) <= ROOM
        for port in PORTS[:10]:
            parts = fragments_of(udp(*ends, sport=port, payload=bytes(3000)), ident=port)
            owners = [scene.receiver(scene.lb.run(part).data) for part in parts]
            assert owners == [before["U", port]] * 3


@versions
@pytest.mark.parametrize("kind", ["SYN", "UDP"])
def test_insertions_have_a_budget(
    kind: str, version: int, make_scene: Callable[..., Scene]
) -> None:
    scene = make_scene(version, inserts=500)
    for service in scene.services:
        service.move()
    before = scene.established()
    held = len(scene.remembered())
    assert held == 2 * len(PORTS)
    said = scene.flood(kind)
    assert said["FLOW_REMEMBERED"] == 500 - held
    assert said["FLOW_OVER_BUDGET"] == FLOOD - (500 - held)
    assert len(scene.remembered()) == 500
    assert scene.established() == before


@versions
@pytest.mark.parametrize("kind", ["SYN", "UDP"])
def test_what_is_nobodys_is_passed_and_counted(
    kind: str, version: int, make_scene: Callable[..., Scene]
) -> None:
    assert make_scene(version).flood(kind, port=9) == {"PASS_NOT_OURS": FLOOD}


def test_that_check_can_fail(make_scene: Callable[..., Scene]) -> None:
    scene: Any = make_scene()
    before = scene.established(begin=True)
    for service in scene.services:
        service.set_slots(np.roll(np.array(service.backends), 1).tolist())
    assert scene.established() != before
