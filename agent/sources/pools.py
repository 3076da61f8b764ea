# SPDX-License-Identifier: Apache-2.0
"""VIP pools as they are written: `pools:` of shunt.yaml, and `pool/NAME` as a service's vip."""

from collections.abc import Iterator, Mapping

from shunt.ipam.pools import Allocation, Request, family, overlaps
from shunt.lb.errors import ShuntError
from shunt.lb.model import IPAddress, IPNetwork, Pool

from . import values
from .shape import ServiceEntry, SettingsFile
from .typed import Path, Reader, each

PREFIX = "pool/"


def build_pools(reader: Reader, written: SettingsFile) -> tuple[Pool, ...]:
    """The pools, by name; what is refused is noted as an error and left out."""
    found: dict[str, tuple[IPNetwork, ...]] = {}
    for name, entry in written.pools.items():
        networks = tuple(_networks(reader, ("pools", name), entry))
        if not networks:
            continue
        if family(networks) is None:
            why = "a service that asks for it wants one address, of a family it knows"
            fix = f"make it two pools, such as {name} and {name}6; a service may ask for both"
            reader.error(("pools", name), f"pool {name} has networks of both families", why, fix)
            continue
        found[name] = networks
    for one, other, network in overlaps(found):
        what = f"pools {one} and {other} overlap"
        why = f"{network} of {other} has addresses of {one} ({reader.place(('pools', one))})"
        reader.error(("pools", other), what, why, "give each pool addresses of its own")
    return tuple(Pool(name, found[name]) for name in sorted(found))


def _networks(reader: Reader, path: Path, entry: object) -> Iterator[IPNetwork]:
    for where, text in each(path, entry):
        try:
            yield values.pool_network(text)
        except values.Refused as error:
            reader.refuse(where, error.what, error.wants, error.fix)


def pool_of(text: str) -> str | None:
    """The pool that a vip names; None if it is an address."""
    return text.removeprefix(PREFIX) if text.startswith(PREFIX) else None


def asks_pools(entry: ServiceEntry) -> bool:
    """Whether an address is wanted that a pool gives."""
    return any(pool_of(text) is not None for _, text in each((), entry.vip))


def requests_of(entry: ServiceEntry) -> list[Request]:
    """What a service asks pools for."""
    if not isinstance(entry.name, str):
        return []
    pools = (pool_of(text) for _, text in each((), entry.vip))
    return [Request(entry.name, pool) for pool in pools if pool is not None]


def explicit_vips(entry: ServiceEntry) -> list[IPAddress]:
    """The addresses that a service names itself, as far as they are some."""
    found = []
    for _, text in each((), entry.vip):
        if pool_of(text) is None:
            try:
                found.append(values.address(text, "vip"))
            except values.Refused:
                continue  # told where the service is built
    return found


class Addresses:
    """What the pools gave, while services are built. Without pools that can be trusted: nothing."""

    def __init__(self, allocation: Allocation | None, held: Mapping[Request, IPAddress]) -> None:
        self._allocation = allocation
        self.given = dict(held) if allocation is None else allocation.given
        self._owners = {a: r for r, a in self.given.items()} if allocation else {}

    def of(self, service: str, pool: str) -> IPAddress | None:
        """The address; None if it cannot be known, which is told elsewhere.

        Raises: ShuntError that says why there is none.
        """
        request = Request(service, pool)
        if self._allocation is None:
            return None
        if request in self._allocation.refused:
            raise self._allocation.refused[request]
        return self.given.get(request)

    def owner(self, address: IPAddress) -> Request | None:
        """Whom a pool gave an address."""
        return self._owners.get(address)


def given_to_other(address: IPAddress, owner: Request) -> ShuntError:
    """A service names an address that another one was given."""
    return ShuntError(
        f"vip {address} is given to {owner.service}",
        f"pool {owner.pool} gave it, and {owner.service} keeps it",
        f"choose another address, or ask for one: {PREFIX}{owner.pool}",
    )


NO_POOLS = Addresses(Allocation(), {})  # for services that ask for none
