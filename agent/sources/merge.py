# SPDX-License-Identifier: Apache-2.0
"""Files and services of the API to one configuration. A file's word counts more than the API's.

A service of the API whose name or frontend a file has is set aside: it is kept, not in force, and
told. Everything else of both is in force.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
from yaml.nodes import Node

from shunt.ipam.pools import Request, allocate
from shunt.lb.errors import ShuntError
from shunt.lb.model import Configuration, Frontend, IPAddress, Mode, Pool, Settings

from .node import NodePorts
from .pools import NO_POOLS, Addresses, explicit_vips, given_to_other, requests_of
from .problems import ConfigError, Place, Problems
from .rules import check_limits, check_modes, check_services, told
from .services import Written, build_service
from .shape import ServiceEntry
from .store import State
from .tree import node_of
from .typed import Path, Reader

API = "api"
Errors = dict[str, list[ConfigError]]  # by service of the API


class Stale(Exception):
    """A service was built with addresses that it no longer has: its file is to be read again."""


@dataclass(frozen=True)
class Draft:
    """A service as it is written, its addresses not yet given."""

    reader: Reader
    path: Path
    entry: ServiceEntry

    @property
    def name(self) -> str:
        return self.entry.name if isinstance(self.entry.name, str) else ""

    @property
    def place(self) -> Place:
        return self.reader.place((*self.path, "name"))

    def requests(self) -> list[Request]:
        """What it asks pools for."""
        return requests_of(self.entry)

    def named(self) -> Iterable[IPAddress]:
        """The addresses that it names itself."""
        return explicit_vips(self.entry)

    def build(self, default_mode: Mode | None, addresses: Addresses) -> Written:
        """The service, with addresses; what is refused is noted as an error."""
        return build_service(self.reader, self.path, self.entry, default_mode, addresses)


@dataclass(frozen=True, slots=True)
class Built:
    """A service that was built before. It stays what it is while pools give it the same."""

    written: Written
    given: tuple[tuple[Request, IPAddress], ...] = ()  # addresses that it asks for, and got

    @property
    def name(self) -> str:
        return self.written.service.name

    @property
    def place(self) -> Place:
        return self.written.name_place

    def requests(self) -> list[Request]:
        return [request for request, _ in self.given]

    def named(self) -> Iterable[IPAddress]:
        asked = {address for _, address in self.given}
        return [vip for vip in self.written.service.vips if vip not in asked]

    def build(self, _default_mode: Mode | None, addresses: Addresses) -> Written:
        """Raises: Stale if it has other addresses now."""
        if any(addresses.given.get(request) != address for request, address in self.given):
            raise Stale
        return self.written


@dataclass
class Files:
    """What the files say, with their errors noted in `problems`."""

    problems: Problems
    reader: Reader  # of shunt.yaml
    settings: Settings | None = None
    pools: tuple[Pool, ...] = ()
    default_mode: Mode | None = None
    of_each: list[list[Draft | Built]] = field(default_factory=list)  # files, in their order

    @property
    def drafts(self) -> list[Draft | Built]:
        return [draft for some in self.of_each for draft in some]

    def settle(self, written: Iterable[Written], addresses: Addresses) -> None:
        """Without an error: what was built need not be built, nor its file read, again."""
        done = iter(written)
        for some in self.of_each:
            some[:] = [
                draft
                if isinstance(draft, Built)
                else Built(item, tuple((r, addresses.given[r]) for r in draft.requests()))
                for draft, item in zip(some, done, strict=False)
            ]


@dataclass(frozen=True)
class Loaded:
    """What is to be in force, and what is not although it was asked for."""

    configuration: Configuration
    origins: Mapping[str, str]  # service: "FILE:LINE" or API
    aside: Mapping[str, list[ConfigError]]  # service of the API: why
    overruled: frozenset[str]  # of these, those that are right in themselves
    vips: Mapping[Request, IPAddress]  # to be kept


class Taken:
    """What services have that count more than one that comes after them."""

    def __init__(self, items: Iterable[Written]) -> None:
        self.frontends: dict[Frontend, Written] = {}
        self.node_ports = NodePorts[Written]()
        for item in items:
            self.add(item)

    def add(self, item: Written) -> None:
        self.frontends.update(dict.fromkeys(item.service.frontends(), item))
        self.node_ports.add(item.service, item)


def place_of_api(name: str) -> str:
    """What errors call a service of the API."""
    return f"service {name} of the API"


def read_service(reader: Reader, root: Node) -> ServiceEntry | None:
    """One service; None, with errors noted, if it is no mapping."""
    found = reader.read(root, ServiceEntry)
    return found if isinstance(found, ServiceEntry) else None


def merge(
    files: Files,
    state: State,
    must: Collection[str] = (),
    newest: tuple[Draft, Problems] | None = None,
) -> Loaded:
    """Everything that is wanted, checked.

    Shape:  `must`: services of the API that may not fall out for errors of their own, since they
            are in force; `newest`: one that is asked for, and gives way to the others.
    Raises: ConfigErrors with all errors. What was loaded before stays in force.
            Stale if a file must be read again first.
    """
    of_files = files.drafts
    kept, aside, wrong = _of_api(of_files, state, newest)
    addresses = _give(files, [*of_files, *(draft for draft, _ in kept.values())], state)
    written = [draft.build(files.default_mode, addresses) for draft in of_files]
    taken = Taken(written if kept else ())
    in_force = list(written)
    for name, (draft, problems) in kept.items():
        item = draft.build(files.default_mode, addresses)
        if errors := problems.errors():
            wrong[name] = errors
            continue
        _check_apart(draft, item, taken, addresses)
        if errors := problems.errors():
            aside[name] = errors
            continue
        in_force.append(item)
        taken.add(item)
    _check_given(files, written, addresses, aside, in_force)
    names = {item.service.name for item in in_force}
    for name in sorted(set(must) & set(wrong)):
        files.problems.take(wrong[name])
    check_services(written, files.problems)
    if files.settings is not None and files.reader.trusts(("limits",)):
        check_limits(
            in_force,
            files.settings.limits,
            lambda limit: files.reader.place(("limits", limit)),
            files.problems,
        )
    if files.settings is not None and files.reader.trusts(("xdp",)):
        check_modes(in_force, files.settings, files.problems)
    files.problems.raise_any()
    assert files.settings is not None  # else a problem was noted
    files.settle(written, addresses)
    overruled, aside = frozenset(aside), aside | wrong
    held = {r: a for r, a in state.vips.items() if r.service in aside}
    vips = held | {r: a for r, a in addresses.given.items() if r.service in names}
    services = sorted((item.service for item in in_force), key=lambda service: service.name)
    return Loaded(
        Configuration(files.settings, tuple(services), _pools(files.pools, vips)),
        {w.service.name: API if w.service.name in kept else str(w.name_place) for w in in_force},
        aside,
        overruled,
        vips,
    )


def _of_api(
    drafts: Iterable[Draft | Built], state: State, newest: tuple[Draft, Problems] | None
) -> tuple[dict[str, tuple[Draft, Problems]], Errors, Errors]:
    """The API's services that no file has, the newest last; those that one has; the unreadable."""
    places = {draft.name: draft.place for draft in drafts if draft.name}
    kept: dict[str, tuple[Draft, Problems]] = {}
    aside: Errors = {}
    wrong: Errors = {}
    for name in [n for n in state.services if newest is None or n != newest[0].name]:
        problems = Problems()
        reader = Reader(place_of_api(name), problems)
        entry = read_service(reader, node_of(state.services[name]))
        if entry is None:
            wrong[name] = problems.errors()
        else:
            kept[name] = Draft(reader, (), entry), problems
    if newest is not None:
        kept[newest[0].name] = newest
    for name in kept.keys() & places.keys():
        draft, _ = kept.pop(name)
        what = f"a file has a service of the name {name}"
        why = f"the one at {places[name]} is in force: a file counts more than the API"
        fix = f"remove it there, or this one: shunt service remove {name}"
        aside[name] = [ConfigError(draft.place, what, why, fix)]
    return kept, aside, wrong


def _give(files: Files, drafts: list[Draft | Built], state: State) -> Addresses:
    """Addresses of pools, if it can be known what the pools have."""
    if files.settings is None or not files.reader.trusts(("pools",)):
        return Addresses(None, state.vips)
    requests = [request for draft in drafts for request in draft.requests()]
    if not requests:
        return NO_POOLS
    named = {vip for draft in drafts for vip in draft.named()}
    pools = {pool.name: pool.networks for pool in files.pools}
    return Addresses(allocate(pools, requests, state.vips, named), state.vips)


def _check_apart(draft: Draft, item: Written, taken: Taken, addresses: Addresses) -> None:
    """What a service of the API must not share with those that count more."""
    name = item.service.name
    others = set()
    for frontend in item.service.frontends():
        other = taken.frontends.get(frontend)
        if other is not None and other.service.name not in others:
            others.add(other.service.name)
            what = f"frontend {frontend} is taken"
            why = f"{other.service.name} ({other.name_place}) has it, and counts more"
            draft.reader.error((*draft.path, "vip"), what, why, "give it a VIP or port of its own")
    if clash := taken.node_ports.clash(item.service):
        what, why = told(*clash)
        draft.reader.error((*draft.path, "vip"), what, why, "give it a network or port of its own")
    for vip in item.service.vips:
        owner = addresses.owner(vip)
        if owner is not None and owner.service != name:
            error = given_to_other(vip, owner)
            draft.reader.error((*draft.path, "vip"), error.what, error.why, error.fix)


def _check_given(
    files: Files,
    written: list[Written],
    addresses: Addresses,
    aside: Errors,
    in_force: list[Written],
) -> None:
    """A file may name an address that a pool gave to a service of the API, which then loses it."""
    if not addresses.given:
        return
    of_api = {item.service.name: item for item in in_force[len(written) :]}
    for item in written:
        for vip, place in zip(item.service.vips, item.vip_places, strict=True):
            owner = addresses.owner(vip)
            if owner is None or owner.service == item.service.name:
                continue
            if owner.service in of_api:
                in_force.remove(of_api.pop(owner.service))
                file = Place(place_of_api(owner.service))
                what = f"{vip} of pool {owner.pool} is named by {item.service.name}"
                why = f"it stands at {place}: a file counts more than the API"
                fix = "name another address there; this service then comes back by itself"
                aside[owner.service] = [ConfigError(file, what, why, fix)]
            elif owner.service not in aside:
                error: ShuntError = given_to_other(vip, owner)
                files.problems.add(place, error.what, error.why, error.fix)


def _pools(pools: tuple[Pool, ...], vips: Mapping[Request, IPAddress]) -> tuple[Pool, ...]:
    given: dict[str, list[tuple[str, IPAddress]]] = {}
    for request, address in sorted(vips.items()):
        given.setdefault(request.pool, []).append((request.service, address))
    return tuple(Pool(p.name, p.networks, tuple(given.get(p.name, ()))) for p in pools)


def plain(service: ServiceEntry) -> dict[str, Any]:
    """A service as it is kept: what it says, without defaults."""
    found: dict[str, Any] = msgspec.to_builtins(service)
    return found
