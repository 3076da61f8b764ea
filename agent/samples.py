# SPDX-License-Identifier: Apache-2.0
"""Sampled drops: read from the ring as they come, kept for a while, handed to whoever watches."""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import AsyncIterator
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from shunt.kern.ring import Ring
from shunt.lb.model import PROTOCOL_NAMES, Protocol

KEPT = 1000
# A watcher that is this far behind loses samples; the program samples some 100 a second.
QUEUED = 256

_GENEVE_PORT, _GENEVE_BYTES = 6081, 8 + 8 + 24  # UDP, Geneve, an option
_ETHERNET_BYTES = 14
_ETHERTYPE_VLANS = (0x8100, 0x88A8)
_ETHERTYPE_IPV4, _ETHERTYPE_IPV6 = 0x0800, 0x86DD
_TCP_FLAGS = ("fin", "syn", "rst", "psh", "ack", "urg")


class Subscription:
    """What one watcher has still to see; iterate over it. `lost`: what it was too slow for."""

    def __init__(self) -> None:
        self.lost = 0
        self._queue: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._closed = False

    def put(self, record: bytes) -> None:
        """Hand over a record; the oldest goes if there is no room."""
        if len(self._queue) >= QUEUED:
            self._queue.popleft()
            self.lost += 1
        self._queue.append(record)
        self._wake.set()

    def close(self) -> None:
        """End the iteration once everything is seen."""
        self._closed = True
        self._wake.set()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            while self._queue:
                yield self._queue.popleft()
            if self._closed:
                return
            self._wake.clear()
            await self._wake.wait()


class Samples:
    """The ring's reader, on the running event loop. Records are `struct sample`, raw."""

    def __init__(self, map_fd: int) -> None:
        """Raises: OSError if the map is no ring buffer."""
        self.recent: deque[bytes] = deque(maxlen=KEPT)
        self._subscriptions: set[Subscription] = set()
        self._ring = Ring(map_fd, self._take)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._ring.fileno(), self._ring.consume)

    def _take(self, record: bytes) -> None:
        self.recent.append(record)
        for subscription in self._subscriptions:
            subscription.put(record)

    def subscribe(self) -> Subscription:
        """Everything that comes from now on, until `unsubscribe`."""
        subscription = Subscription()
        self._subscriptions.add(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        self._subscriptions.discard(subscription)

    def end_subscriptions(self) -> None:
        """Every watcher's iteration ends."""
        for subscription in self._subscriptions:
            subscription.close()

    def close(self) -> None:
        """Stop reading; the ring stays pinned and fills up."""
        if self._ring.fileno() >= 0:
            self._loop.remove_reader(self._ring.fileno())
        self.end_subscriptions()
        self._ring.close()


def describe(frame: bytes) -> dict[str, Any]:
    """Who sent what to whom, as far as the beginning of a frame says. Absent: it does not."""
    at = _ETHERNET_BYTES
    if len(frame) < at:
        return {}
    (kind,) = struct.unpack_from("!H", frame, at - 2)
    while kind in _ETHERTYPE_VLANS and len(frame) >= at + 4:
        (kind,) = struct.unpack_from("!H", frame, at + 2)
        at += 4
    if kind == _ETHERTYPE_IPV4 and len(frame) >= at + 20:
        source, destination = frame[at + 12 : at + 16], frame[at + 16 : at + 20]
        found: dict[str, Any] = {
            "source": str(IPv4Address(source)),
            "destination": str(IPv4Address(destination)),
            "ttl": frame[at + 8],
        }
        protocol = frame[at + 9]
        (fragment,) = struct.unpack_from("!H", frame, at + 6)
        later_fragment = bool(fragment & 0x1FFF)
        at += (frame[at] & 0xF) * 4
    elif kind == _ETHERTYPE_IPV6 and len(frame) >= at + 40:
        found = {
            "source": str(IPv6Address(frame[at + 8 : at + 24])),
            "destination": str(IPv6Address(frame[at + 24 : at + 40])),
            "ttl": frame[at + 7],
        }
        protocol, later_fragment = frame[at + 6], False
        at += 40
    else:
        return {"ethertype": f"{kind:#06x}"}
    found["protocol"] = PROTOCOL_NAMES.get(protocol, str(protocol))
    if not later_fragment:
        found |= _transport(protocol, frame[at:])
    return found


def in_geneve(frame: bytes) -> dict[str, Any]:
    """The same of what dsr-geneve has wrapped; empty if this is none (bpf/geneve.h)."""
    mark = _GENEVE_PORT.to_bytes(2, "big")
    for at in (34, 54):  # behind an IPv4 or IPv6 header without options, as the balancer writes it
        inner = at + _GENEVE_BYTES
        if frame[at + 2 : at + 4] == mark and len(frame) > inner:
            return describe(bytes(12) + frame[at + 10 : at + 12] + frame[inner:])
    return {}


def _transport(protocol: int, segment: bytes) -> dict[str, Any]:
    if protocol not in set(Protocol) or len(segment) < 4:
        return {}
    source, destination = struct.unpack_from("!HH", segment)
    found: dict[str, Any] = {"source_port": source, "destination_port": destination}
    if protocol == 6 and len(segment) >= 14:
        flags = [name for bit, name in enumerate(_TCP_FLAGS) if segment[13] >> bit & 1]
        found["tcp_flags"] = flags
    return found
