# SPDX-License-Identifier: Apache-2.0
"""A service whose slots are changing hands, and what one client's packets meet there."""

from __future__ import annotations

from typing import Any

import numpy as np
from scapy.packet import Packet

from shunt.kern._flows import SEEN_SHIFT, TICK_SHIFT
from shunt.kern.flows import backends, pack, states
from tests.packets.balancer import Balancer, Flag, Reason
from tests.packets.frames import tcp

ENDS = {4: ("192.0.2.1", "203.0.113.1"), 6: ("2001:db8:c::1", "2001:db8:a::1")}
ADDRESSES = {4: ("10.0.0.1", "10.0.0.2"), 6: ("fd00::1", "fd00::2")}
OLD, NEW, NOBODY = "old", "new", "nobody"
IDLE_S, SHORT_S, TOUCH_S = 8000, 60, 1
TICK_S = (1 << TICK_SHIFT) / 1e9


class Case:
    """Every slot of one service moves from OLD (prev) to NEW (cur)."""

    def __init__(self, lb: Balancer, version: int) -> None:
        self.lb, self.ends = lb, ENDS[version]
        self.service = lb.add_service(self.ends[1], backends=ADDRESSES[version], idle_s=IDLE_S)
        self.old, self.new = self.service.backends
        self.names = dict(zip(ADDRESSES[version], (OLD, NEW), strict=True))
        self.events: dict[Any, int] = {}
        self.service.move()

    def to(self, flags: str, seq: int = 1000, sport: int = 40000) -> str:
        """Where a segment goes; the events it causes stand in `events`."""
        return self._sent(tcp(*self.ends, flags, seq=seq, sport=sport))

    def _sent(self, packet: Packet) -> str:
        out = self.lb.run(packet)
        self.events = out.events
        if out.reasons != {Reason.SENT_TO_BACKEND: 1}:
            assert out.reasons == {Reason.SENT_RST_NO_BACKEND: 1}
            return NOBODY
        return self.names[out.packet.payload.dst]

    def entry(self) -> tuple[int, int] | None:
        """(backend, state) of the one flow remembered, or None."""
        entries = self.lb.flows()
        assert len(entries) <= 1
        if not len(entries):
            return None
        return int(backends(entries["word"])[0]), int(states(entries["word"])[0])

    def seen(self) -> int:
        """When the one flow remembered was seen last. Units: ticks."""
        (word,) = self.lb.flows()["word"]
        return int(word) >> SEEN_SHIFT

    def rewrite(self, state: int, ticks: int) -> None:
        """Another state of the one flow remembered, seen at another time."""
        words = self.lb.map("flows").mapped()["word"]
        (at,) = np.flatnonzero(words)
        words[at] = pack(int(backends(words[at : at + 1])[0]), state, ticks << TICK_SHIFT)

    def fail(self, backend: int) -> None:
        self.lb.set_flags(backend, Flag.KNOWN)

    def gone(self, backend: int) -> None:
        self.lb.set_flags(backend, 0)
