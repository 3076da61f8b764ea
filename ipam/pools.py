# SPDX-License-Identifier: Apache-2.0
"""VIP pools: a free address for each service that asks, and always the same one.

An address that was given stays given. A new one stands where the hash of the service's name
points, or at the next free place: so it hardly depends on who else asks, on nodes that were never
told what others gave either.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from itertools import combinations
from typing import NamedTuple

from netaddr import IPAddress as Number
from netaddr import IPNetwork as Range
from netaddr import IPSet

from shunt.lb.errors import ShuntError
from shunt.lb.model import IPAddress, IPNetwork


class Request(NamedTuple):
    """A service wants an address of a pool."""

    service: str
    pool: str


@dataclass
class Allocation:
    """What each request got: an address, or the error that says why not."""

    given: dict[Request, IPAddress] = field(default_factory=dict)
    refused: dict[Request, ShuntError] = field(default_factory=dict)


def overlaps(pools: Mapping[str, Sequence[IPNetwork]]) -> list[tuple[str, str, IPNetwork]]:
    """Pairs of pools with addresses in common, and the first network of the second that has."""
    sets = {name: _set(networks) for name, networks in pools.items()}
    return [
        (one, other, next(n for n in pools[other] if not _set([n]).isdisjoint(sets[one])))
        for one, other in combinations(pools, 2)
        if not sets[one].isdisjoint(sets[other])
    ]


def size(networks: Sequence[IPNetwork]) -> int:
    """How many addresses there are; what stands twice counts once."""
    return int(_set(networks).size)


def allocate(
    pools: Mapping[str, Sequence[IPNetwork]],
    requests: Iterable[Request],
    held: Mapping[Request, IPAddress],
    taken: Collection[IPAddress],
) -> Allocation:
    """Give every request an address.

    Shape: `held` is what was given before, and is given again; `taken` are addresses that nobody
           gets anew, since services name them. The order of the requests makes no difference.
    """
    found = Allocation()
    by_pool: dict[str, list[Request]] = {}
    for request in sorted(set(requests)):
        if request.pool in pools:
            by_pool.setdefault(request.pool, []).append(request)
        else:
            found.refused[request] = _unknown(request.pool, pools)
    for name, wanted in by_pool.items():
        _from_pool(name, _set(pools[name]), wanted, held, taken, found)
    return found


def _from_pool(
    name: str,
    pool: IPSet,
    wanted: Sequence[Request],
    held: Mapping[Request, IPAddress],
    taken: Collection[IPAddress],
    found: Allocation,
) -> None:
    new: list[Request] = []
    for request in wanted:
        if request not in held:
            new.append(request)
        elif Number(str(held[request])) in pool:
            found.given[request] = held[request]
        else:
            found.refused[request] = ShuntError(
                f"pool {name} no longer has {held[request]}, which {request.service} has",
                "a service keeps its address; another one would end its connections",
                f"give the pool that address back, or write {held[request]} or another as the vip",
            )
    used = {a for r, a in found.given.items() if r.pool == name} | set(taken)
    free = pool - IPSet([Number(str(a)) for a in used])
    for request in new:
        if not free.size:
            found.refused[request] = ShuntError(
                f"pool {name} has no free address",
                f"all of its {pool.size} are given, or named by services (shunt pool list)",
                f"add a network to pools.{name}, or remove a service that uses it",
            )
            continue
        address = _next_free(free, _nth(pool, _hash(request.service) % pool.size))
        found.given[request] = ip_address(str(address))
        free.remove(address)


def _unknown(pool: str, pools: Mapping[str, Sequence[IPNetwork]]) -> ShuntError:
    names = ", ".join(sorted(pools)) or "none"
    return ShuntError(
        f"there is no pool {pool}",
        f"pools of shunt.yaml: {names}",
        "name one of them, or add the pool: pools: {" + pool + ": [NETWORK]}",
    )


def _set(networks: Sequence[IPNetwork]) -> IPSet:
    return IPSet([Range(str(network)) for network in networks])


def _hash(service: str) -> int:
    return int.from_bytes(hashlib.blake2b(service.encode(), digest_size=16).digest(), "big")


def _nth(addresses: IPSet, n: int) -> Number:
    """The address at place `n`. Shape: n is below the set's size."""
    for block in addresses.iter_cidrs():
        if n < block.size:
            return block[n]
        n -= block.size
    raise IndexError(n)


def _next_free(free: IPSet, start: Number) -> Number:
    """The first at or after `start`, else the very first. Shape: `free` is not empty."""
    for block in free.iter_cidrs():
        if block.last >= int(start):
            return start if block.first <= int(start) else block[0]
    return _nth(free, 0)


def family(networks: Sequence[IPNetwork]) -> int | None:
    """4 or 6; None if both are there."""
    versions = {network.version for network in networks}
    return versions.pop() if len(versions) == 1 else None
