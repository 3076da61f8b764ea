# SPDX-License-Identifier: Apache-2.0
"""From the shape of a service to a Service, with the rules that hold within one service."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from msgspec import structs

from shunt.lb.errors import ShuntError
from shunt.lb.model import ANY_PORT, Backend, IPAddress, IPNetwork, Mode, Port, Protocol, Service

from . import node, options, quic, values
from .checks import build_health, duration, refuse
from .pools import Addresses, pool_of
from .problems import Place
from .shape import BackendEntry, ServiceEntry
from .typed import Path, Reader, each


@dataclass(frozen=True, slots=True)
class Written:
    """A service and where it is written."""

    service: Service
    name_place: Place
    vip_places: tuple[Place, ...]
    node_place: Place | None = None  # of the first network of this host's addresses


def build_service(
    reader: Reader,
    path: Path,
    entry: ServiceEntry,
    default_mode: Mode | None,
    addresses: Addresses,
) -> Written:
    """The service; what is refused is noted as an error and left out.

    A `default_mode` of None is one that cannot be known; then what depends on it is not checked.
    """
    mode = Mode(entry.mode) if isinstance(entry.mode, str) else default_mode
    if not reader.trusts((*path, "mode")):
        mode = None
    vips = _vips(reader, path, entry, addresses)
    networks = node.networks_of(reader, path, entry)
    ports = tuple(_ports(reader, path, entry))
    backends = _backends(reader, path, entry)
    if mode is not None:
        both = [*vips.items(), *networks.items()]
        backends = _fit_mode(reader, path, mode, both, ports, backends)
    node.check(reader, networks, mode, ports)
    _check_backends(reader, list(vips), ports, backends)
    connection_ids = quic.connection_ids(reader, path, entry, ports)
    quic.check_server_ids(reader, path, connection_ids, backends)
    service = Service(
        name=entry.name if isinstance(entry.name, str) else "",
        vips=tuple(vips),
        ports=ports,
        mode=mode or Mode.DSR_IPIP,
        backends=tuple(backends.values()),
        health=build_health(reader, (*path, "health"), entry, ports, mode),
        tcp_idle_s=duration(reader, (*path, "idle", "tcp"), entry.idle.tcp),
        udp_idle_s=duration(reader, (*path, "idle", "udp"), entry.idle.udp),
        udp_window_s=duration(reader, (*path, "udp_window"), entry.udp_window),
        slots_per_backend=entry.slots_per_backend,
        hash_by=entry.hash,
        affinity_s=options.affinity_s(reader, path, entry),
        sources=options.source_rules(reader, path, entry),
        rate=options.rate_limit(reader, path, entry, ports),
        quic=connection_ids,
        sockets=entry.sockets == "on",
        redirect=options.redirects(reader, path, entry, ports),
        echo=entry.echo == "on" if isinstance(entry.echo, str) else None,
        node=tuple(networks),
    )
    options.check_hash(reader, path, entry, service.region_slots())
    places = tuple(reader.place(vip_path) for vip_path in vips.values())
    of_node = next((reader.place(where) for where in networks.values()), None)
    return Written(service, reader.place((*path, "name")), places, of_node)


def _twice(reader: Reader, path: Path, what: str, first: Path) -> None:
    why = f"this service has it already at {reader.place(first)}"
    reader.error(path, f"{what} stands twice", why, "remove one of the two")


def _vips(
    reader: Reader, path: Path, entry: ServiceEntry, addresses: Addresses
) -> dict[IPAddress, Path]:
    found: dict[IPAddress, Path] = {}
    for where, text in each((*path, "vip"), entry.vip):
        if text.startswith(node.PREFIX):
            continue
        try:
            vip = _vip(text, entry, addresses)
        except values.Refused as error:
            refuse(reader, where, error)
            continue
        except ShuntError as error:
            reader.error(where, error.what, error.why, error.fix)
            continue
        if vip is None:
            continue
        if vip in found:
            _twice(reader, where, f"vip {vip}", found[vip])
        found.setdefault(vip, where)
    return found


def _vip(text: str, entry: ServiceEntry, addresses: Addresses) -> IPAddress | None:
    """The address that a vip stands for. Raises: values.Refused, ShuntError."""
    pool = pool_of(text)
    if pool is None:
        return values.address(text, "vip")
    return addresses.of(entry.name, pool) if isinstance(entry.name, str) else None


def _ports(reader: Reader, path: Path, entry: ServiceEntry) -> Iterator[Port]:
    found: dict[Port, Path] = {}
    for where, value in each((*path, "ports"), entry.ports):
        try:
            port = values.port(value)
        except values.Refused as error:
            refuse(reader, where, error)
            continue
        if port in found:
            _twice(reader, where, f"port {port}", found[port])
        else:
            found[port] = where
            yield port


def _backends(reader: Reader, path: Path, entry: ServiceEntry) -> dict[Path, Backend]:
    found = {}
    for where, value in each((*path, "backends"), entry.backends):
        try:
            if not isinstance(value, BackendEntry):
                found[where] = values.backend(value)
            elif isinstance(value.address, str):
                address = values.address(value.address, "backend")
                port = value.port if isinstance(value.port, int) else 0
                server_id = quic.server_id(reader, where, value)
                found[where] = Backend(address, port, value.weight, server_id)
        except values.Refused as error:
            refuse(reader, where, error)
    return found


def _fit_mode(
    reader: Reader,
    path: Path,
    mode: Mode,
    vips: Sequence[tuple[IPAddress | IPNetwork, Path]],
    ports: tuple[Port, ...],
    backends: dict[Path, Backend],
) -> dict[Path, Backend]:
    """The backends as the mode uses them; what it cannot do is noted."""
    if mode is Mode.LOCAL:
        _check_families(reader, path, vips, backends)
        _check_ports(reader, path, ports)
    if mode.readdresses:
        _check_sctp(reader, path, mode, vips, ports, backends)
        return backends
    numbers = {port.port for port in ports}
    for where, backend in backends.items():
        if backend.port and (others := sorted(numbers - {backend.port})):
            what = f"backend {backend} has a port of its own"
            why = f"mode {mode} leaves the packet's port as it is, here {others[0]}"
            reader.error(where, what, why, "remove the port, or use mode: dsr-geneve or nat")
    return {where: structs.replace(b, port=0) if b.port else b for where, b in backends.items()}


def _check_sctp(
    reader: Reader,
    path: Path,
    mode: Mode,
    vips: Sequence[tuple[IPAddress | IPNetwork, Path]],
    ports: tuple[Port, ...],
    backends: dict[Path, Backend],
) -> None:
    """What cannot be done with a checksum that no program can compute anew: bpf/sctp.h."""
    numbers = sorted({port.port for port in ports if port.protocol is Protocol.SCTP})
    if not numbers:
        return
    if mode is Mode.DSR_GENEVE:
        what, why = f"ports has {numbers[0] or 'any'}/sctp", f"mode {mode} is for TCP and UDP"
        reader.error((*path, "ports"), what, why, "use mode: dsr-ipip, dsr-l2 or nat")
        return
    versions = {vip.version for vip, _ in vips}
    for where, backend in backends.items():
        if others := [n for n in numbers if backend.port and n != backend.port]:
            what = f"backend {backend} has another port than {others[0] or 'any'}/sctp"
            why = "SCTP's checksum covers the ports and cannot be corrected for others"
            fix = f"let the backend serve {others[0] or 'every port'} and remove its port here"
            reader.error(where, what, why, fix)
        if mode is Mode.NAT and versions - {backend.address.version}:
            what = f"backend {backend} is not of its VIP's family"
            why = "SCTP is not translated between IPv4 and IPv6"
            reader.error(where, what, why, "make it two services, one for each family")


def _check_ports(reader: Reader, path: Path, ports: tuple[Port, ...]) -> None:
    if any(port.port == ANY_PORT for port in ports):
        what, why = "ports has any", "mode local knows replies by the port that they come from"
        reader.error((*path, "ports"), what, why, "list the ports, or use mode: nat")


def _check_families(
    reader: Reader,
    path: Path,
    vips: Sequence[tuple[IPAddress | IPNetwork, Path]],
    backends: dict[Path, Backend],
) -> None:
    families = {vip.version for vip, _ in vips}
    if len(families) > 1:
        what = "vip has addresses of both families"
        why = "mode local does not translate between IPv4 and IPv6"
        fix = "make it two services, or use mode: nat"
        reader.error((*path, "vip"), what, why, fix)
        return
    for where, backend in backends.items():
        if families and backend.address.version not in families:
            vip, vip_path = vips[0]
            what = f"backend {backend} is not of its VIP's family"
            why = f"mode local cannot reach it from {vip} ({reader.place(vip_path)})"
            fix = f"give an IPv{vip.version} backend, or use mode: nat"
            reader.error(where, what, why, fix)


def _check_backends(
    reader: Reader, vips: list[IPAddress], ports: tuple[Port, ...], backends: dict[Path, Backend]
) -> None:
    numbers = {port.port for port in ports}
    only = next(iter(numbers)) if len(numbers) == 1 else 0
    # Almost always all differ, which numbers show sooner: an address is slow to hash and compare.
    seen = {(int(b.address), b.port or only) for b in backends.values()}
    if len(seen) == len(backends) and not {int(vip) for vip in vips} & {n for n, _ in seen}:
        return
    first: dict[tuple[IPAddress, int], Path] = {}
    for where, backend in backends.items():
        if backend.address in vips:
            why = "packets would come back to the balancer"
            fix = "name the server's own address"
            reader.error(where, f"backend {backend} is a VIP of its own service", why, fix)
        key = (backend.address, backend.port or only)
        if key in first:
            _twice(reader, where, f"backend {backend}", first[key])
        first.setdefault(key, where)
