# SPDX-License-Identifier: Apache-2.0
"""Rules between services, and between services and the limits of the node."""

from collections import defaultdict
from collections.abc import Callable, Sequence

from shunt.lb.model import Frontend, Limits

from .problems import Place, Problems
from .services import Written


def check_services(written: Sequence[Written], problems: Problems) -> None:
    """No two services of one name; no frontend in two services."""
    names: dict[str, Place] = {}
    owners: dict[Frontend, tuple[int, Place]] = {}
    taken: dict[tuple[int, int], list[tuple[Frontend, Place]]] = defaultdict(list)
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
    frontends = sum(len(service.vips) * len(service.ports) for service in services)
    # The data path knows each protocol of a service as a service; id 0 of both stands for none.
    parts = sum(len(service.protocols()) for service in services)
    backends = sum(len(service.protocols()) * len(service.backends) for service in services)
    sources = sum(len(service.protocols()) * len(service.sources) for service in services)
    for name, need, most, unit in (
        ("frontends", frontends, limits.frontends, "VIP, port and protocol"),
        ("services", parts, limits.services - 1, "service and protocol"),
        ("backends", backends, limits.backends - 1, "backend, service and protocol"),
        ("sources", sources, limits.sources, "rule of a service's protocol"),
    ):
        if need > most:
            what = f"{need} {name} are configured, and {most} fit"
            why = f"limits.{name} is {getattr(limits, name)}; each {unit} takes one"
            fix = f"raise limits.{name} to {need + getattr(limits, name) - most} or more"
            problems.add(place_of(name), what, why, fix)
    _check_slots(written, limits.slots, place_of("slots"), problems)


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
