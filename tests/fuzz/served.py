# SPDX-License-Identifier: Apache-2.0
"""The services that are served while packets are sent at random, and where theirs may go.

Each has a VIP and backends of its own, and each backend a MAC of its own, so that a packet that
went astray is seen to have done so. Their numbers depend on nothing but what a service is: kept
packets go on to mean what they meant when others join.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_network
from itertools import product

from tests.fuzz.headers import (
    GENEVE_BYTES,
    GENEVE_PORT,
    IPIPS,
    SCTP,
    TCP,
    UDP,
    Headers,
    mapped,
    packed,
    read,
)
from tests.packets.balancer import OWN4, OWN6

PORT = 80
# Never change the number of one, nor give it again.
NUMBERS = {"dsr-ipip": 0, "dsr-l2": 1, "nat": 2, "dsr-geneve": 3, "nat46": 4, "local": 5}
PROTOS = {TCP: 0, UDP: 1, SCTP: 2}
STATES = {"settled": 0, "moving": 1, "empty": 2, "asks": 3}
OTHER = {4: 6, 6: 4}
OWN = {4: OWN4, 6: OWN6}
OWN_PACKED = {packed(OWN4), packed(OWN6)}
ANY_PORT_VIP, ANY_PORT_NUMBER = "203.0.113.250", 250
CLIENTS = {4: ("192.0.2.1", "192.0.2.8"), 6: ("2001:db8:c::1", "2001:db8:c::8")}
DENIED = [ip_network("192.0.2.8/32"), ip_network("2001:db8:c::8/128")]
BACKENDS = 3


@dataclass(slots=True)
class Served:
    """A service. `backends` are addresses by MAC; `clients` who has sent it something: by which
    router, and from which address."""

    version: int
    vip: str
    mode: str  # of NUMBERS
    proto: int
    state: str
    number: int
    port: int = PORT
    addresses: tuple[str, ...] = ()
    key: bytes = b""  # the VIP
    backends: dict[bytes, bytes] = field(default_factory=dict)
    known: frozenset[bytes] = frozenset()
    clients: set[tuple[bytes, bytes]] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.key = packed(self.vip)
        self.addresses = self.addresses or tuple(self._backends())
        self.backends = {self.mac(i): packed(a) for i, a in enumerate(self.addresses)}
        self.known = frozenset(self.backends.values())

    @property
    def is_nat(self) -> bool:
        """Its backends see this host's address."""
        return self.mode in {"nat", "nat46"}

    def _backends(self) -> Iterator[str]:
        """A tunnel's last is of the other family; all are behind nat46."""
        for i in range(1, BACKENDS + 1):
            crosses = self.mode == "nat46" or (
                i == BACKENDS and self.mode in {"dsr-ipip", "dsr-geneve"}
            )
            yield self.address(OTHER[self.version] if crosses else self.version, i)

    def address(self, family: int, i: int) -> str:
        """Of a backend."""
        if family == 4:
            return f"10.{self.version}.{self.number}.{i}"
        return f"fd00:{self.version}::{self.number:x}:{i}"

    def mac(self, i: int) -> bytes:
        """Of a backend, by its position."""
        return bytes((2, 1, self.version, self.number, 0, i + 1))

    def sends(self, was: Headers, frame: bytes, sent: bytes, now: Headers) -> bool:
        """Whether this is what it makes of a frame: to a backend of its own, in its mode."""
        backend = self.backends.get(now.to)
        if self.mode == "dsr-l2":
            same = (was.src, was.dst, was.proto, was.sport, was.dport)
            return backend is not None and same == (
                now.src,
                now.dst,
                now.proto,
                now.sport,
                now.dport,
            )
        if backend != now.dst:
            return False
        if self.mode == "dsr-ipip":
            return self.wraps(was, frame, sent, now)
        if self.mode == "dsr-geneve":
            return self._tells(was, sent, now)
        return self.is_nat and now.src in OWN_PACKED

    def wraps(self, was: Headers, frame: bytes, sent: bytes, now: Headers) -> bool:
        """Nothing but an outer header is new."""
        known = now.dst in self.known and now.proto == IPIPS[len(was.dst)]
        return known and sent[now.l4 :] == frame[was.at :]

    def _tells(self, was: Headers, sent: bytes, now: Headers) -> bool:
        """Geneve names the VIP, and the packet within is for the backend if it can be."""
        option = sent[now.l4 + GENEVE_BYTES - 20 : now.l4 + GENEVE_BYTES]
        inner = read(sent[:12] + _ethertype(was.dst) + sent[now.l4 + GENEVE_BYTES :])
        crosses = len(now.dst) != len(was.dst)
        return (
            (now.proto, now.dport) == (UDP, GENEVE_PORT)
            and option[:16] == mapped(was.dst)
            and inner is not None
            and (inner.src, inner.dst) == (was.src, was.dst if crosses else now.dst)
        )


def _ethertype(address: bytes) -> bytes:
    return b"\x08\x00" if len(address) == 4 else b"\x86\xdd"


class Directory:
    """Whose a frame is."""

    def __init__(self, services: Sequence[Served]) -> None:
        self.services = services
        self._exact = {(s.key, s.proto, s.port): s for s in services}
        self._by_vip: dict[bytes, list[Served]] = {}
        self._by_backend: dict[bytes, list[Served]] = {}
        for service in services:
            self._by_vip.setdefault(service.key, []).append(service)
            for address in service.known:
                self._by_backend.setdefault(address, []).append(service)

    def of(self, h: Headers) -> list[Served]:
        """The services that it was sent to: one, or where it has no ports all of that VIP."""
        if h.sport < 0:
            return self._by_vip.get(h.dst, [])
        for port in (h.dport, 0):
            if found := self._exact.get((h.dst, h.proto, port)):
                return [found]
        return []

    def at_vip(self, address: bytes) -> list[Served]:
        """With this VIP."""
        return self._by_vip.get(address, [])

    def with_backend(self, address: bytes) -> list[Served]:
        """With a backend there."""
        return self._by_backend.get(address, [])


def answers(was: Headers, now: Headers) -> bool:
    """Whether it goes back to where the frame came from."""
    there = (was.to, was.by, was.src, was.dst, was.tags)
    return there == (now.by, now.to, now.dst, now.src, now.tags)


def services(modes: Sequence[str], protos: Sequence[int]) -> Iterator[Served]:
    """One of each mode, family, protocol and state."""
    for version, mode, proto, state in product((4, 6), modes, protos, STATES):
        if mode == "nat46" and proto == SCTP:
            continue
        number = NUMBERS[mode] * 16 + PROTOS[proto] * 4 + STATES[state]
        vip = f"203.0.113.{number}" if version == 4 else f"2001:db8:a::{number:x}"
        yield Served(version, vip, mode, proto, state, number)
