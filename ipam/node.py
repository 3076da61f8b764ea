# SPDX-License-Identifier: Apache-2.0
"""VIPs that are this host's own addresses, chosen by network: whatever addresses it has just now.

A service that names an address itself counts more, for the ports that it has there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from itertools import product

from shunt.lb.errors import ShuntError
from shunt.lb.model import Frontend, IPAddress, IPNetwork, Port, Protocol, Service


def covers(network: IPNetwork, address: IPAddress) -> bool:
    """Whether a network means an address: loopback ones only if it has no others, and link-local
    ones likewise."""
    return address in network and _kind(address) == _kind(network)


def overlap(one: IPNetwork, other: IPNetwork) -> bool:
    """Whether an address could be meant by both."""
    same = one.version == other.version and _kind(one) == _kind(other)
    return same and one.overlaps(other)


def _kind(of: IPAddress | IPNetwork) -> tuple[bool, bool]:
    return of.is_loopback, of.is_link_local


def resolve(services: Iterable[Service], addresses: Collection[IPAddress]) -> list[Service]:
    """The services with those of this host's addresses that they ask for among their VIPs."""
    services = list(services)
    if not any(service.node for service in services):
        return services
    own = sorted(addresses, key=lambda address: (address.version, int(address)))
    named = {
        frontend
        for service in services
        if any(vip in addresses for vip in service.vips)
        for frontend in service.frontends()
    }
    return [_resolve(service, own, named) if service.node else service for service in services]


def _resolve(service: Service, own: Iterable[IPAddress], named: set[Frontend]) -> Service:
    asked = [a for a in own if a not in service.vips and any(covers(n, a) for n in service.node)]
    all_of_them = (Frontend(vip, p.port, p.protocol) for vip, p in product(asked, service.ports))
    yields = frozenset(frontend for frontend in all_of_them if frontend in named)
    return replace(service, vips=(*service.vips, *asked), yields=yields)


def node_ports(services: Iterable[Service]) -> set[tuple[int, Port]]:
    """What resolved services have on this host's addresses, by IP version; not SCTP's."""
    return {each for service in services for each in _ports_of(service)}


def holders(services: Iterable[Service], port: Port, versions: Collection[int]) -> list[str]:
    """The names of those resolved services that have a port on this host's addresses of these IP
    versions."""
    asked = {(version, port) for version in versions}
    return sorted(s.name for s in services if port in s.ports and asked & set(_ports_of(s)))


def _ports_of(service: Service) -> Iterator[tuple[int, Port]]:
    for f in service.frontends() if service.node else ():
        if f.protocol is not Protocol.SCTP and any(covers(n, f.vip) for n in service.node):
            yield f.vip.version, Port(f.port, f.protocol)


def trouble(service: Service) -> ShuntError | None:
    """What a resolved service asks for and has not got."""
    if not service.node:
        return None
    if service.yields:
        first = min(map(str, service.yields))
        more = f" (and {len(service.yields) - 1} more)" if len(service.yields) > 1 else ""
        return ShuntError(
            f"service {service.name} does not answer on {first}{more}",
            "another service names that address itself, and counts more",
            "give one of the two another port",
        )
    if not any(covers(n, vip) for n in service.node for vip in service.vips):
        networks = ", ".join(map(str, service.node))
        return ShuntError(
            f"service {service.name} has no address of this host",
            f"none is in {networks}",
            "see `ip address`, or write other networks",
        )
    return None
