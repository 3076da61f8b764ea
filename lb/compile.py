# SPDX-License-Identifier: Apache-2.0
"""From the model to what the data path is to hold: one target for each service and protocol."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import IPv6Address

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from shunt.lb import maglev
from shunt.lb.model import (
    Backend,
    Frontend,
    IPAddress,
    Mode,
    Protocol,
    Quic,
    RateLimit,
    Service,
    SourceRule,
)
from shunt.lb.standing import STEPS

NS_PER_S = 1_000_000_000
_MAPPED = bytes(10) + b"\xff\xff"


class Endpoint(Struct, frozen=True, gc=False):
    """What a backend id stands for within one target. Port 0 is the frontend's."""

    address: IPAddress
    port: int

    def __hash__(self) -> int:
        # An address's own hash is slow, and there are many look-ups by endpoint.
        return hash((int(self.address), self.port))

    def __str__(self) -> str:
        if self.port:
            return str(Backend(self.address, self.port))
        if isinstance(self.address, IPv6Address):
            return str(self.address)
        return "{}.{}.{}.{}".format(*self.address.packed)  # the same, in half of the time


class Member(Struct, frozen=True, gc=False):
    """One backend as it should be treated now."""

    endpoint: Endpoint
    weight: int = 1
    up: bool = True  # not failing
    drained: bool = False  # by the operator: no new flows
    override: int = 0  # weight set at run time; 0 = as configured
    server_id: bytes = b""  # which QUIC connection ids are its own; none without Options.quic

    @property
    def takes_new_flows(self) -> bool:
        """Whether slots may be its own."""
        return self.up and not self.drained


class Options(Struct, frozen=True, gc=False):
    """What a service asks for beyond balancing."""

    affinity_ns: int = 0
    hash_client: bool = False
    sources: tuple[SourceRule, ...] = ()
    rate: RateLimit | None = None
    quic: Quic | None = None
    sockets: bool = True
    node: bool = False  # it asks for this node's own addresses


NO_OPTIONS = Options()  # as almost every service has them: one for all


class Target(Struct, frozen=True, gc=False):
    """One service id: a service's frontends of one protocol, and their backends."""

    name: str  # "web/tcp"
    mode: Mode
    protocol: Protocol
    idle_ns: int
    window_ns: int
    log2: int
    frontends: frozenset[Frontend]
    members: tuple[Member, ...]
    options: Options = NO_OPTIONS


class Condition(Struct, frozen=True, gc=False):
    """What a node knows of a backend beyond its configuration."""

    up: bool = True
    drained: bool = False
    weight: int = 0
    tenths: int = STEPS  # of its weight, in slow start


def targets(
    services: Iterable[Service], condition: Callable[[str, Endpoint], Condition]
) -> dict[str, Target]:
    """All targets by name. `condition` is asked for each (target name, endpoint)."""
    found = {}
    for service in services:
        for protocol in service.protocols():
            target = compile_target(service, protocol, condition)
            found[target.name] = target
    return found


def differing(before: Iterable[Service], after: Iterable[Service]) -> set[str]:
    """The names of the services that came, went, or changed."""
    rest = {service.name: service for service in before}
    found = set()
    for service in after:
        old = rest.pop(service.name, None)
        if old is not service and old != service:  # most are the very same
            found.add(service.name)
    return found | rest.keys()


def target_name(service: str, protocol: Protocol) -> str:
    """What a service of one protocol is called in the data path."""
    return f"{service}/{protocol.name.lower()}"


def compile_target(
    service: Service, protocol: Protocol, condition: Callable[[str, Endpoint], Condition]
) -> Target:
    """One service and protocol."""
    name = target_name(service.name, protocol)
    udp = protocol is Protocol.UDP
    quic = service.quic if udp else None
    members = []
    endpoints = [Endpoint(backend.address, backend.port) for backend in service.backends]
    conditions = [condition(name, endpoint) for endpoint in endpoints]
    # Only ratios matter, and a tenth of weight 1 is no integer.
    starting = any(now.tenths < STEPS for now in conditions)
    for backend, endpoint, now in zip(service.backends, endpoints, conditions, strict=True):
        weight = (now.weight or backend.weight) * (now.tenths if starting else 1)
        server_id = backend.server_id if quic else b""
        members.append(Member(endpoint, weight, now.up, now.drained, now.weight, server_id))
    options = Options(
        round(service.affinity_s * NS_PER_S),
        service.hash_by == "client",
        service.sources,
        None if udp else service.rate,
        quic,
        service.sockets,
        bool(service.node),
    )
    return Target(
        name=name,
        mode=service.mode,
        protocol=protocol,
        idle_ns=round((service.udp_idle_s if udp else service.tcp_idle_s) * NS_PER_S),
        window_ns=round((service.udp_window_s if udp else service.tcp_idle_s) * NS_PER_S),
        log2=maglev.log2_slots(len(service.backends), service.slots_per_backend),
        frontends=frozenset(f for f in service.frontends() if f.protocol is protocol),
        members=tuple(members),
        options=NO_OPTIONS if options == NO_OPTIONS else options,
    )


def owners(target: Target, ids: Mapping[Endpoint, int]) -> NDArray[np.uint32]:
    """Who owns each slot, as backend ids; all 0 if nobody takes new flows.

    Shape: (2**target.log2,).
    """
    owner_ids, table = shares(target, [ids[member.endpoint] for member in target.members])
    return owner_ids[table]


def shares(target: Target, ids: Sequence[int]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """The same in two parts: the ids of those who own slots, and of each slot an index into them.

    Shape: `ids` are the members'. (n,), (2**target.log2,); n is at least 1.
    """
    owning = [(m, i) for m, i in zip(target.members, ids, strict=True) if m.takes_new_flows]
    table = np.zeros(1 << target.log2, np.uint32)
    if not owning:
        return np.zeros(1, np.uint32), table
    hashes = maglev.hash_array([maglev.hash_identity(str(m.endpoint)) for m, _ in owning])
    maglev.fill_hashed(hashes, np.array([m.weight for m, _ in owning], np.uint32), table)
    return np.array([i for _, i in owning], np.uint32), table


def mapped(address: IPAddress) -> bytes:
    """An address as the tables hold it: IPv6, or IPv4-mapped."""
    if isinstance(address, IPv6Address):
        return address.packed
    return _MAPPED + address.packed


def unmapped(raw: bytes) -> IPAddress:
    """The address that `mapped` gave these bytes for."""
    v6 = IPv6Address(raw)
    return v6.ipv4_mapped or v6
