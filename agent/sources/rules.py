# SPDX-License-Identifier: Apache-2.0
"""Rules between services, and between services and the limits of the node."""

from collections import defaultdict
from collections.abc import Callable, Sequence

from shunt.lb.model import Frontend, IPNetwork, Limits, Port, Settings

from .node import NodePorts
from .problems import Place, Problems
from .services import Written


def check_services(written: Sequence[Written], problems: Problems) -> None:
    """No two services of one name; no frontend in two services."""
    names: dict[str, Place] = {}
    owners: dict[Frontend, tuple[int, Place]] = {}
    taken: dict[tuple[int, int], list[tuple[Frontend, Place]]] = defaultdict(list)
    node_ports = NodePorts[Written]()
    for at, item in enumerate(written):
        name = item.service.name
        if name and name in names:
            why = f"the first one is at {names[name]}"
            what = f'two services have the name "{name}"'
            problems.add(item.name_place, what, why, "rename or remove one of the two")
        names.setdefault(name, item.name_place)
        places = dict(zip(item.service.vips, item.vip_places, strict=True))
        for frontend in item.service.frontends():
            owner, _ = owners.setdefault(frontend, (at, places[frontend.vip]))
            if owner != at:
                taken[owner, at].append((frontend, places[frontend.vip]))
        if item.node_place is not None:
            _check_node_ports(item, item.node_place, node_ports, problems)
    for (owner, _), frontends in taken.items():
        frontend, place = frontends[0]
        more = f" (and {len(frontends) - 1} more)" if len(frontends) > 1 else ""
        name = written[owner].service.name or "another service"
        why = f"{name} has the same frontend at {owners[frontend][1]}"
        problems.add(
            place,
            f"frontend {frontend}{more} is taken",
            why,
            "give each service a VIP, port or protocol of its own",
        )


def _check_node_ports(
    item: Written, place: Place, node_ports: NodePorts[Written], problems: Problems
) -> None:
    if clash := node_ports.clash(item.service):
        fix = "give each service a network, port or protocol of its own"
        problems.add(place, *told(*clash), fix)
    node_ports.add(item.service, item)


def told(port: Port, network: IPNetwork, other: Written) -> tuple[str, str]:
    """What and why of a port that another service has on this host's addresses."""
    name = other.service.name or "another service"
    why = f"{name} ({other.node_place}) has that port on addresses which are in both networks"
    return f"port {port} of node/{network} is taken", why


def check_limits(
    written: Sequence[Written],
    limits: Limits,
    place_of: Callable[[str], Place],
    problems: Problems,
) -> None:
    """What all services need fits the tables.

    `place_of` says where a limit is set.
    """
    services = [item.service for item in written]
    # A network of this host's addresses has one, at least, or is of no use.
    frontends = sum(len((*s.vips, *s.node)) * len(s.ports) for s in services)
    # The data path knows each protocol of a service as a service; id 0 of both stands for none.
    parts = sum(len(service.protocols()) for service in services)
    backends = sum(len(service.protocols()) * len(service.backends) for service in services)
    sources = sum(len(service.protocols()) * len(service.sources) for service in services)
    server_ids = sum(len(service.backends) for service in services if service.quic)
    for name, need, most, unit in (
        ("frontends", frontends, limits.frontends, "VIP, port and protocol"),
        ("services", parts, limits.services - 1, "service and protocol"),
        ("backends", backends, limits.backends - 1, "backend, service and protocol"),
        ("sources", sources, limits.sources, "rule of a service's protocol"),
        ("server_ids", server_ids, limits.server_ids, "backend of a service with quic"),
    ):
        if need > most:
            what = f"{need} {name} are configured, and {most} fit"
            why = f"limits.{name} is {getattr(limits, name)}; each {unit} takes one"
            fix = f"raise limits.{name} to {need + getattr(limits, name) - most} or more"
            problems.add(place_of(name), what, why, fix)
    _check_slots(written, limits.slots, place_of("slots"), problems)


def check_modes(written: Sequence[Written], settings: Settings, problems: Problems) -> None:
    """Without XDP nothing wraps packets, sends them on as they are, or changes their family."""
    for item in written if settings.xdp_mode == "off" else ():
        service = item.service
        if not service.mode.translates:
            problems.add(
                item.name_place,
                f"service {service.name} is of mode {service.mode}, and xdp is off",
                "without XDP there are the modes nat and local alone",
                "give it one of these, or take `xdp: off` away",
            )
        elif service.crosses_families():
            problems.add(
                item.name_place,
                f"service {service.name} has VIPs and backends of both families, and xdp is off",
                "the XDP program alone translates between IPv4 and IPv6",
                "make it two services, of one family each, or take `xdp: off` away",
            )


def _check_slots(written: Sequence[Written], slots: int, place: Place, problems: Problems) -> None:
    fitting = 0
    for item in written:
        service, need = item.service, item.service.region_slots()
        if need <= slots:
            fitting += need * len(service.protocols())
            continue
        count = f"{len(service.backends)} backends of {service.slots_per_backend} slots"
        what = f"{service.name} needs {need} slots, and the table has {slots}"
        why = f"{count} are rounded up to a power of two; limits.slots is set at {place}"
        fix = f"raise limits.slots to {need} or more, or lower slots_per_backend"
        problems.add(item.name_place, what, why, fix)
    if fitting > slots:
        largest = max(
            (item for item in written if item.service.region_slots() <= slots),
            key=lambda item: item.service.region_slots() * len(item.service.protocols()),
        )
        need = largest.service.region_slots() * len(largest.service.protocols())
        what = f"the services need {fitting} slots, and the table has {slots}"
        why = f"the largest is {largest.service.name} ({largest.name_place}) with {need}"
        fix = f"raise limits.slots to {1 << (fitting - 1).bit_length()}, or lower slots_per_backend"
        problems.add(place, what, why, fix)
