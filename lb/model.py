# SPDX-License-Identifier: Apache-2.0
"""What an operator wants, in checked values: the one form every source is turned into.

Everything here is frozen and compares by value, so that "did anything change?" is `==`.
Sources check; nothing in this module does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Literal, NamedTuple

from msgspec import Struct

from shunt.lb.checks import How

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network
ANY_PORT = 0  # of a frontend: every port that no other frontend of its VIP has


class Protocol(IntEnum):
    """Transport protocols, by their number in the IP header."""

    TCP = 6
    UDP = 17
    SCTP = 132

    @property
    def connects(self) -> bool:
        """Whether a flow has a first packet that says so, and ends: it may end in peace."""
        return self is not Protocol.UDP


# Of services, and of what is translated beside them.
PROTOCOL_NAMES = {1: "icmp", 58: "icmpv6", **{int(p): p.name.lower() for p in Protocol}}


class Mode(StrEnum):
    """How a packet gets to its backend."""

    DSR_IPIP = "dsr-ipip"
    DSR_L2 = "dsr-l2"
    DSR_GENEVE = "dsr-geneve"
    NAT = "nat"
    LOCAL = "local"

    @property
    def translates(self) -> bool:
        """Whether both ends change; every flow is remembered then, whatever its slot."""
        return self in {Mode.NAT, Mode.LOCAL}

    @property
    def readdresses(self) -> bool:
        """Whether a backend gets packets for its own address and port, not for the VIP."""
        return self.translates or self is Mode.DSR_GENEVE


class Frontend(NamedTuple):
    """What a client addresses; unique over all services."""

    vip: IPAddress
    port: int
    protocol: Protocol

    def __str__(self) -> str:
        host = f"[{self.vip}]" if self.vip.version == 6 else str(self.vip)
        return f"{host}:{self.port or 'any'}/{self.protocol.name.lower()}"


@dataclass(frozen=True, slots=True)
class Port:
    """A port of a service's frontends."""

    port: int
    protocol: Protocol

    def __str__(self) -> str:
        return f"{self.port or 'any'}/{self.protocol.name.lower()}"


class Backend(Struct, frozen=True, gc=False):
    """A server behind a service. Port 0 is the frontend's own port.

    There may be 100,000: a Struct is made in a tenth of a dataclass's time, and is smaller.
    """

    address: IPAddress
    port: int = 0
    weight: int = 1
    server_id: bytes = b""  # what it writes into QUIC connection ids; Quic says how many bytes

    def __str__(self) -> str:
        if not self.port:
            return str(self.address)
        host = f"[{self.address}]" if self.address.version == 6 else str(self.address)
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """How a backend is probed. Port None: the backend's, or the first of the service's that fits.

    `how` is what is asked, of a class that fits `kind`; None for tcp.
    """

    kind: Literal["tcp", "http", "https", "grpc", "dns", "udp", "exec"] = "tcp"
    port: int | None = None
    interval_s: float = 2.0
    timeout_s: float = 1.0
    rise: int = 2
    fall: int = 3
    jitter: float = 0.0  # a share of the interval
    slow_start_s: float = 0.0
    # Below this share of backends up, all count as up. 0.01 of up to 100 is: when none is up.
    panic_threshold: float = 0.01
    how: How = None
    via: Literal["backend", "vip"] = "backend"  # which address its packets have


class SourceRule(NamedTuple):
    """What holds for clients in a network, unless a longer prefix says otherwise."""

    network: IPNetwork
    allow: bool


@dataclass(frozen=True, slots=True)
class RateLimit:
    """Of new TCP connections, for each client network: so many a second in the long run."""

    per_s: float
    burst: int  # at once, after a while without any
    prefix4: int = 32
    prefix6: int = 64


@dataclass(frozen=True, slots=True)
class Quic:
    """How backends make QUIC connection ids: draft-ietf-quic-load-balancers, in plaintext.

    Units: lengths are octets; the configuration's id is the first three bits.
    """

    server_id_length: int
    config_id: int = 0
    nonce_length: int = 4


@dataclass(frozen=True, slots=True)
class Service:
    """Frontends (every VIP with every port) and the backends that answer for them.

    `node`: this host's own addresses in these networks are VIPs too; ipam/node.py puts them in.
    """

    name: str
    vips: tuple[IPAddress, ...]
    ports: tuple[Port, ...]
    mode: Mode = Mode.DSR_IPIP
    backends: tuple[Backend, ...] = ()
    health: HealthCheck | None = None
    tcp_idle_s: float = 8000.0
    udp_idle_s: float = 60.0
    udp_window_s: float = 10.0
    slots_per_backend: int = 100
    hash_by: Literal["tuple", "client"] = "tuple"
    affinity_s: float = 0.0  # 0: none
    sources: tuple[SourceRule, ...] = ()  # none: everybody is served
    rate: RateLimit | None = None
    quic: Quic | None = None  # of its UDP ports
    sockets: bool = True  # whether sockets of this host are translated; else they see the VIPs
    redirect: bool = False  # streams between sockets of this node may pass TCP by
    echo: bool | None = None  # VIPs answer echo requests while a backend lives; None: as the node
    node: tuple[IPNetwork, ...] = ()
    yields: frozenset[Frontend] = frozenset()  # to services that name these addresses themselves

    def protocols(self) -> tuple[Protocol, ...]:
        """The protocols of the ports, TCP first: each is a service of its own in the data path."""
        return tuple(sorted({port.protocol for port in self.ports}))

    def frontends(self) -> Iterator[Frontend]:
        """Every VIP with every port, in the order written."""
        for vip in self.vips:
            for port in self.ports:
                frontend = Frontend(vip, port.port, port.protocol)
                if not self.yields or frontend not in self.yields:
                    yield frontend

    def crosses_families(self) -> bool:
        """Whether a client of one family may get a backend of the other."""
        families = {vip.version for vip in self.vips}
        return any(families - {backend.address.version} for backend in self.backends)

    def region_slots(self) -> int:
        """Slots of one protocol: a power of two, from the configured backends alone."""
        return 1 << max(0, len(self.backends) * self.slots_per_backend - 1).bit_length()


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes of the maps, in elements; fixed while the maps are pinned."""

    frontends: int = 65536
    services: int = 16384
    slots: int = 2**20
    backends: int = 32768
    nexthops: int = 4096
    sources: int = 65536
    rates: int = 65536
    server_ids: int = 4096
    flows: int = 3 * 2**17  # what half a million lines of 64 bytes are good for
    nat: int = 2**18


@dataclass(frozen=True, slots=True)
class Masquerade:
    """What leaves the node by these interfaces gets its address: clients' packets to backends
    elsewhere, and what comes from `sources` unless it is for one of `not_to`."""

    interfaces: tuple[str, ...]
    sources: tuple[IPNetwork, ...] = ()
    not_to: tuple[IPNetwork, ...] = ()


@dataclass(frozen=True, slots=True)
class Settings:
    """What holds for the whole node. Budgets are a second, for each processor."""

    interfaces: tuple[str, ...]
    xdp_mode: Literal["auto", "native", "generic", "off"] = "auto"
    hash_seed: int = 0
    ipip_source4: IPv4Network = IPv4Network("198.18.0.0/16")
    ipip_source6: IPv6Network = IPv6Network("100::/64")
    nat_port_min: int = 10000
    nat_port_max: int = 29999
    masquerade: Masquerade | None = None
    handover: Literal["device", "peer"] = "device"  # to what is behind a veth device, by TC
    limits: Limits = Limits()
    echo: bool = True  # what holds for services that do not say
    # Whose connections to VIPs are translated at the socket: this network namespace's, or all's.
    sockets: Literal["host", "all", "off"] = "host"
    # Which of those connections are closed when their backend has gone.
    sockets_close: Literal["udp", "all", "off"] = "udp"
    sockets_exclude: tuple[str, ...] = ()  # control groups, as paths below the hierarchy's root
    node_ports: Literal["reserve", "share"] = "reserve"  # whether binds to them are refused
    inserts_per_s: int = 50000
    answers_per_s: int = 1000
    samples_per_s: int = 100
    metrics_listen: tuple[IPAddress, int] | None = None
    metrics_detail: Literal["node", "services", "backends"] = "backends"
    program_times: bool = False
    # Of checks by way of a VIP: the upper 8 bits of their packets' mark (the others are the
    # backend), and the routing table for them.
    check_mark: int = 83
    check_table: int = 5348


@dataclass(frozen=True, slots=True)
class Pool:
    """Addresses that services ask for by the pool's name; `given`: who has which, by name."""

    name: str
    networks: tuple[IPNetwork, ...]
    given: tuple[tuple[str, IPAddress], ...] = ()


@dataclass(frozen=True, slots=True)
class Configuration:
    """A whole, checked configuration. Services and pools are sorted by name."""

    settings: Settings
    services: tuple[Service, ...] = ()
    pools: tuple[Pool, ...] = ()
