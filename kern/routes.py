# SPDX-License-Identifier: Apache-2.0
"""The kernel's routes to many addresses at once: what `Netlink.resolve` asks, 60 times as fast.

With 100,000 backends most of the time would go into encoding and decoding one message after the
other. So requests of one fixed form are written in C, several to a send (_routes.c), and of the
answers only what `Route` holds is read. Answers that differ in nothing but their destination share
an `Answer`.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Self

from shunt.kern import _routes
from shunt.kern.netlink import RTN_LOCAL, RTN_UNICAST, Link, Route, below_vlans

IPAddress = IPv4Address | IPv6Address

# linux/rtnetlink.h
RTA_OIF, RTA_GATEWAY, RTA_PREFSRC, RTA_METRICS, RTA_VIA = 4, 5, 7, 8, 18
RTA_ENCAP_TYPE, RTAX_MTU, RTA_TYPE_MASK = 21, 2, 0x3FFF
_RTMSG_BYTES, _RTM_TYPE = 12, 7  # struct rtmsg: its length, and where its type is
_ATTRIBUTE = struct.Struct("=HH")  # struct rtattr: length, type
_TIMEOUT = struct.pack("ll", 5, 0)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the kernel says of the way to an address, its destination aside."""

    kind: int = 0  # RTN_*
    ifindex: int = 0
    gateway: IPAddress | None = None
    source: IPAddress | None = None
    mtu: int = 0  # 0: the device's
    tunnel: bool = False
    error: int = 0  # instead of all this: an errno

    @property
    def ordinary(self) -> bool:
        """Whether it is a way, rather than a refusal."""
        return not self.error and self.kind in (RTN_UNICAST, RTN_LOCAL)

    def route(self, address: IPAddress, link: Link, links: Mapping[int, Link]) -> Route:
        """As `Netlink.resolve` gives it, of an answer that is ordinary."""
        port, tags = below_vlans(link, links)
        return Route(
            destination=address,
            link=link,
            mtu=min(self.mtu or link.mtu, link.mtu),
            gateway=self.gateway,
            source=self.source,
            local=self.kind == RTN_LOCAL,
            tunnel=self.tunnel,
            port=port,
            tags=tags,
        )


class Routes:
    """A request socket of its own, in the network namespace of the thread that makes it."""

    def __init__(self) -> None:
        self._socket = _open()
        self._sequence = 0
        self._known: dict[bytes | int, Answer] = {}  # by the kernel's words, of one call
        self._equal: dict[Answer, Answer] = {}

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, addresses: Sequence[IPAddress]) -> Iterator[tuple[IPAddress, Answer]]:
        """The answer for each address. One that did not come is an Answer with an error."""
        try:
            for at in range(0, len(addresses), _routes.AT_ONCE):
                some = addresses[at : at + _routes.AT_ONCE]
                answers, error = self._ask(some)
                for address, raw in zip(some, answers, strict=True):
                    yield address, self._known.get(raw) or self._answer(raw)
                if error:
                    for address in addresses[at + len(some) :]:
                        yield address, Answer(error=error)
                    return
        finally:
            self._known.clear()
            self._equal.clear()

    def _ask(self, some: Sequence[IPAddress]) -> tuple[list[bytes | int], int]:
        first = self._sequence
        self._sequence = first + len(some) & 0xFFFFFFFF
        raw = [address.packed for address in some]
        answers, error = _routes.ask(self._socket.fileno(), first, raw)
        if error:
            self._socket.close()  # what still comes would answer other questions
            self._socket = _open()
        return answers, error

    def _answer(self, raw: bytes | int) -> Answer:
        """Of the kernel's words, which are read once."""
        answer = Answer(error=raw) if isinstance(raw, int) else _decode(raw)
        self._known[raw] = self._equal.setdefault(answer, answer)
        return self._known[raw]


def _open() -> socket.socket:
    opened = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE
    )
    # Never reached unless an answer is lost; then an error is better than a hang.
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEOUT)
    opened.bind((0, 0))
    return opened


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        size, kind = _ATTRIBUTE.unpack_from(data, at)
        yield kind & RTA_TYPE_MASK, data[at + _ATTRIBUTE.size : at + size]
        at += max(_ATTRIBUTE.size, size + 3 & ~3)


def _decode(raw: bytes) -> Answer:
    found = dict(_attributes(raw[_RTMSG_BYTES:]))
    # An IPv4 route may have an IPv6 gateway (RFC 8950): then it stands in RTA_VIA, after a family.
    gateway = found.get(RTA_GATEWAY) or found.get(RTA_VIA, b"")[2:]
    source = found.get(RTA_PREFSRC)
    metrics = dict(_attributes(found.get(RTA_METRICS, b"")))
    return Answer(
        kind=raw[_RTM_TYPE],
        ifindex=int.from_bytes(found.get(RTA_OIF, b""), "little"),
        gateway=_address(gateway) if gateway else None,
        source=_address(source) if source else None,
        mtu=int.from_bytes(metrics.get(RTAX_MTU, b""), "little"),
        tunnel=RTA_ENCAP_TYPE in found,
    )


def _address(raw: bytes) -> IPAddress:
    return IPv4Address(raw) if len(raw) == 4 else IPv6Address(raw)
