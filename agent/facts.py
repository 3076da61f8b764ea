# SPDX-License-Identifier: Apache-2.0
"""What `shunt doctor` judges: gathered from the kernel, of which nothing is changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path

from shunt.agent.nat_ports import listeners, wanted
from shunt.agent.nexthops import NextHop, decide, unresolved
from shunt.kern import features, links, neighbours, netdev
from shunt.kern.features import Feature
from shunt.kern.memory import physical_bytes
from shunt.kern.netdev import Device
from shunt.kern.netlink import InterfaceAddress, Link, Netlink, Route, RouteEntry, ports
from shunt.lb.errors import ShuntError
from shunt.lb.model import Configuration, IPAddress, Protocol
from shunt.xdp import decap

# Of the documentation prefixes (RFC 5737, RFC 3849), for "any client". Asking sends nothing.
ANY_CLIENT: Mapping[int, IPAddress] = {4: IPv4Address("192.0.2.1"), 6: IPv6Address("2001:db8::1")}
PROC_SYS = Path("/proc/sys")


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """A device that XDP runs on or sends out of."""

    device: Device
    program: str = ""  # the XDP program that is attached
    mode: str = "none"  # how: native, generic, offloaded, none
    peer: Device | None = None  # a veth's other end, where it can be seen

    @property
    def name(self) -> str:
        return self.device.link.name


@dataclass(frozen=True, slots=True)
class BalancerFacts:
    """A node that runs shuntd."""

    features: tuple[Feature, ...]
    links: Mapping[int, Link]
    devices: Mapping[str, DeviceFacts]  # the configured ones and those towards backends
    addresses: frozenset[IPAddress]
    hops: Mapping[IPAddress, NextHop | ShuntError]  # by backend
    local_ports: range
    reserved_ports: frozenset[int] = frozenset()
    listeners: frozenset[tuple[Protocol, int]] = frozenset()
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class BackendFacts:
    """A server behind a load balancer."""

    links: Mapping[int, Link]
    addresses: tuple[InterfaceAddress, ...]
    sysctls: Mapping[str, str]
    routes: Mapping[int, Route | ShuntError]  # to clients, by IP version
    entries: Mapping[int, RouteEntry | None] = field(default_factory=dict)
    devices: Mapping[str, DeviceFacts] = field(default_factory=dict)  # Ethernet, with addresses
    ipip_module: bool = False
    geneve: Mapping[str, tuple[IPAddress, ...]] = field(default_factory=dict)  # of decap, by device


def gather_balancer(configuration: Configuration) -> BalancerFacts:
    """Look at this host as the node of a configuration. Raises: OSError."""
    with Netlink() as netlink:
        by_index = netlink.links()
        backends = {b.address for service in configuration.services for b in service.backends}
        hops = {address: _hop(netlink, by_index, address) for address in backends}
        names = set(configuration.settings.interfaces)
        # Frames leave by what is below a VLAN device.
        out_by = {h.port or h.ifindex for h in hops.values() if isinstance(h, NextHop)}
        used = [link for link in by_index.values() if link.name in names or link.ifindex in out_by]
        names |= {part.name for link in used for part in (link, *ports(link, by_index))}
        return BalancerFacts(
            features=tuple(features.probe_all()),
            links=by_index,
            devices=_devices(by_index.values(), names),
            addresses=frozenset(a.address for a in netlink.addresses()),
            hops=hops,
            local_ports=_port_range(read_sysctl("net.ipv4.ip_local_port_range")),
            reserved_ports=_ports(read_sysctl("net.ipv4.ip_local_reserved_ports")),
            listeners=listeners(wanted(configuration)),
            memory_bytes=physical_bytes(),
        )


def gather_backend(clients: Mapping[int, IPAddress] = ANY_CLIENT) -> BackendFacts:
    """Look at this host as a backend of clients like these. Raises: OSError."""
    with Netlink() as netlink:
        by_index = netlink.links()
        addresses = netlink.addresses()
        with_address = {a.ifindex for a in addresses if not a.address.is_link_local}
        names = {
            link.name
            for link in by_index.values()
            if link.ethernet and link.up and link.ifindex in with_address and link.kind != "dummy"
        }
        routes: dict[int, Route | ShuntError] = {}
        entries: dict[int, RouteEntry | None] = {}
        for version, client in clients.items():
            try:
                routes[version] = netlink.resolve(client, by_index)
                entries[version] = netlink.entry(client)
            except ShuntError as error:
                routes[version] = error
        devices = _devices(by_index.values(), names)
        return BackendFacts(
            links=by_index,
            addresses=tuple(addresses),
            sysctls=_sysctls(link.name for link in by_index.values()),
            routes=routes,
            entries=entries,
            devices=devices,
            ipip_module=features.ipip().present,
            geneve={
                name: decap.opened_for(device.device.link.ifindex)
                for name, device in devices.items()
                if device.program == decap.PROGRAM
            },
        )


def read_sysctl(key: str, proc_sys: Path = PROC_SYS) -> str:
    """A kernel parameter of this thread's network namespace; empty if there is none."""
    # Only a device's name may hold dots: net.ipv4.conf.eth0.100.rp_filter.
    parts = key.split(".")
    if parts[2:3] == ["conf"]:
        parts = [*parts[:3], ".".join(parts[3:-1]), parts[-1]]
    path = proc_sys.joinpath(*parts)
    return path.read_text().strip() if path.exists() else ""


def _sysctls(names: Iterable[str]) -> dict[str, str]:
    devices = ["all", *names]
    keys = [
        f"net.ipv4.conf.{device}.{key}"
        for device in devices
        for key in ("arp_ignore", "arp_announce", "rp_filter")
    ]
    return {key: read_sysctl(key) for key in keys}


def _hop(
    netlink: Netlink, by_index: Mapping[int, Link], address: IPAddress
) -> NextHop | ShuntError:
    try:
        route = netlink.resolve(address, by_index)
    except ShuntError as error:
        return error
    hop = decide(route, None)
    if isinstance(hop, ShuntError):
        return hop
    neighbour = neighbours.find(netlink, hop.ifindex, hop.via)
    # Without an entry nobody has asked yet: shuntd does, and that is no finding.
    if neighbour is not None and neighbour.state == neighbours.NUD_FAILED:
        return unresolved(address, hop, neighbour) or hop
    return decide(route, neighbour)


def _devices(known: Iterable[Link], names: Iterable[str]) -> dict[str, DeviceFacts]:
    wanted = set(names)
    found: dict[str, DeviceFacts] = {}
    for link in known:
        if link.name not in wanted:
            continue
        attached = links.query(link.ifindex)
        found[link.name] = DeviceFacts(
            device=netdev.device(link),
            program=attached.prog_name or ("(unnamed)" if attached.prog_id else ""),
            mode=attached.mode,
            peer=netdev.veth_peer(link) if link.kind == "veth" else None,
        )
    return found


def _port_range(text: str) -> range:
    low, high = map(int, text.split())
    return range(low, high + 1)


def _ports(text: str) -> frozenset[int]:
    """'80,1000-1002' as the kernel writes it."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        low, _, high = part.partition("-")
        found.update(range(int(low), int(high or low) + 1))
    return frozenset(found)
