# SPDX-License-Identifier: Apache-2.0
"""Floods through the real program: established connections are unhurt, and counters name the cause.

Each flood is 100,000 packets of as many random flows at full speed, over settled and over moving
slots, with a table of flows that has long been full and without.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from perf import tables
from perf.driver import ACK, SYN, Driver, Stream
from shunt.kern.testrun import run_xdp
from shunt.lb.model import Mode
from shunt.lb.slots import State
from tests.packets.balancer import Balancer
from tests.packets.frames import tcp, udp

FLOOD = 100_000
VIP, BACKENDS = str(tables.VIPS4), [f"172.16.0.{n}" for n in range(1, 11)]
CLIENTS = 200


@dataclass
class Scene:
    lb: Balancer
    driver: Driver
    service: Any

    def established(self) -> dict[int, str]:
        """Connections of one client, and who has each."""
        return {port: self.to(port, "A") for port in range(2000, 2000 + CLIENTS)}

    def to(self, port: int, flags: str) -> str:
        return self.lb.backend_of(tcp("192.0.2.1", VIP, flags, sport=port, seq=1001))

    def flood(self, flags: int, port: int = tables.PORT, packets: int = FLOOD) -> dict[str, int]:
        """Events and reasons that it caused, by name."""
        before = self._counts()
        fd = self.lb.object.programs["shunt_lb"].fd
        self.driver.aim(fd, Stream(1 << 24, flags=flags, port=port))
        self.driver.send(packets)
        return {n: c - before[n] for n, c in self._counts().items() if c != before[n]}

    def _counts(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for name, enum, column in (
            ("reasons", self.lb.object.btf.enum("reason", "REASON_"), "packets"),
            ("events", self.lb.object.btf.enum("event", "EVENT_"), "times"),
        ):
            totals = self.lb.map(name).totals()[column]
            found |= {e.name: int(totals[e]) for e in enum if e.name != "COUNT"}
        return found


def scene(mode: str, **config: Any) -> Iterator[Scene]:
    sizes = {"flows": 1 << 10, "nat_fwd": 1 << 10, "nat_rev": 1 << 10, "fragments": 1 << 10}
    with Balancer(sizes, answers_per_s=100, **config) as lb:
        driver = Driver()
        try:
            yield Scene(lb, driver, lb.add_service(VIP, mode=mode, backends=BACKENDS))
        finally:
            driver.close()


@pytest.fixture
def dsr() -> Iterator[Scene]:
    yield from scene(Mode.DSR_IPIP.value, inserts_per_s=1 << 30)


@pytest.fixture
def nat() -> Iterator[Scene]:
    yield from scene(Mode.NAT.value, inserts_per_s=1 << 30)


@pytest.mark.parametrize("flags", [SYN, ACK], ids=["SYN", "stray ACK"])
def test_settled_slots_take_no_notice(flags: int, dsr: Scene) -> None:
    before = dsr.established()
    assert dsr.flood(flags) == {"SENT_TO_BACKEND": FLOOD}
    assert dsr.established() == before
    assert not len(dsr.lb.flows()), "nothing was stored"


@pytest.mark.parametrize("flags", [SYN, ACK], ids=["SYN", "stray ACK"])
def test_moving_slots_keep_their_connections_in_a_full_table(flags: int, dsr: Scene) -> None:
    before = dsr.established()
    rotated = np.roll(np.array(dsr.service.backends), 1)
    old = dsr.service.backends[0]
    dsr.service.set_slots(rotated.tolist(), old, State.MOVING)
    held = {port: dsr.to(port, "A") for port in before}  # remembered now
    said = dsr.flood(flags)
    assert said["SENT_TO_BACKEND"] == FLOOD
    assert said["FLOW_TABLE_FULL"] > FLOOD / 2
    assert {port: dsr.to(port, "A") for port in held} == held
    # Nor does a second flood, into the full table, evict anything.
    dsr.flood(flags)
    assert {port: dsr.to(port, "A") for port in held} == held
    # Who comes now can't be remembered, and is sent where its next packet goes too.
    assert dsr.to(1, "S") == dsr.to(1, "A") == BACKENDS[0]


def test_insertions_have_a_budget(dsr: Scene) -> None:
    with Balancer({"flows": 1 << 17}, inserts_per_s=1000) as lb:
        service = lb.add_service(VIP, backends=BACKENDS)
        service.move()
        held = Scene(lb, dsr.driver, service)
        before = {port: held.to(port, "A") for port in range(2000, 2000 + CLIENTS)}
        said = held.flood(SYN)
        assert said["FLOW_REMEMBERED"] == 1000 - CLIENTS
        assert said["FLOW_OVER_BUDGET"] > FLOOD - 2000
        assert len(lb.flows()) == 1000
        assert {port: held.to(port, "A") for port in before} == before


def test_a_flood_of_syns_does_not_hurt_translated_connections(nat: Scene) -> None:
    held = {}
    for port in range(2000, 2000 + CLIENTS):
        held[port] = nat.to(port, "S")
        assert nat.to(port, "A") == held[port]
    said = nat.flood(SYN)
    assert said["DROP_NAT_TABLE_FULL"] > FLOOD / 2
    assert {port: nat.to(port, "A") for port in held} == held


def test_stray_segments_to_a_translated_service_are_refused(nat: Scene) -> None:
    held = {}
    for port in range(2000, 2000 + CLIENTS):
        held[port] = nat.to(port, "S")
    said = {}
    for _ in range(100):
        # An answer is shorter than what it answers; the wrapper has room for some of those.
        said = nat.flood(ACK, packets=20)
    assert said == {"SENT_RST_NO_FLOW": 20}
    assert {port: nat.to(port, "A") for port in held} == held


def test_what_is_nobodys_is_passed_and_counted(dsr: Scene) -> None:
    assert dsr.flood(SYN, port=9) == {"PASS_NOT_OURS": FLOOD}


def test_a_flood_of_fragments_holds_nothing_for_long(dsr: Scene) -> None:
    """Later fragments of datagrams whose first one never came, and first ones without end."""
    lb, before = dsr.lb, dsr.established()
    lb.add_service(VIP, 53, 17, backends=BACKENDS)
    first = bytearray(bytes(udp("192.0.2.9", VIP, dport=53, payload=bytes(64), flags="MF", id=1)))
    later = bytearray(bytes(udp("192.0.2.9", VIP, dport=53, payload=bytes(64), frag=9, id=1)))
    fd = lb.object.programs["shunt_lb"].fd
    for number in range(5000):
        for frame in (first, later):
            frame[18:20] = (number + 1000).to_bytes(2, "big")
            frame[24:26] = bytes(2)
        run_xdp(fd, bytes(later))
        run_xdp(fd, bytes(first))
    reasons = lb.map("reasons").totals()["packets"]
    reason = lb.object.btf.enum("reason", "REASON_")
    assert int(reasons[reason["PASS_FRAGMENT"]]) == 5000, "each came before its first"
    assert len(lb.entries("fragments")) <= 1 << 10
    assert dsr.established() == before


def test_that_check_can_fail(dsr: Scene) -> None:
    before = dsr.established()
    dsr.service.set_slots(np.roll(np.array(dsr.service.backends), 1).tolist())
    assert dsr.established() != before
