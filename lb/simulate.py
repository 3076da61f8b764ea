# SPDX-License-Identifier: Apache-2.0
"""What would move if a service's backends changed: computed, and nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from shunt.lb import maglev
from shunt.lb.compile import Endpoint, Member, Target, owners
from shunt.lb.errors import ShuntError


@dataclass(frozen=True)
class Change:
    """What is asked about. Weights are of the backends named there."""

    add: Mapping[Endpoint, int] = field(default_factory=dict)
    remove: frozenset[Endpoint] = frozenset()
    drain: frozenset[Endpoint] = frozenset()
    undrain: frozenset[Endpoint] = frozenset()
    weights: Mapping[Endpoint, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """One backend's part. Units: slots of the outcome's table."""

    endpoint: Endpoint
    before: int
    after: int
    gained: int
    lost: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Both tables compared in slots of the larger of the two."""

    slots_before: int
    slots_after: int
    slots: int
    moved: int
    least: int  # of them, those that any table with these shares would have moved
    rows: tuple[Row, ...]


def changed(target: Target, change: Change, slots_per_backend: int) -> Target:
    """The target after a change; backends that are added count as up.

    Raises: ShuntError if one is added that is there, or another is named that is not.
    """
    there = {member.endpoint for member in target.members}
    for endpoint in change.add:
        if endpoint in there:
            raise ShuntError(
                f"{target.name} has a backend {endpoint} already",
                "what is there cannot be added",
                "to give it another weight: --weight",
            )
    named = change.remove | change.drain | change.undrain | set(change.weights)
    for endpoint in sorted(named - there - set(change.add), key=str):
        raise ShuntError(
            f"{target.name} has no backend {endpoint}",
            f"it has: {', '.join(map(str, sorted(there, key=str))) or 'none'}",
            "name one of them, or add it with --add",
        )
    kept = [m for m in target.members if m.endpoint not in change.remove]
    kept += [Member(endpoint, weight) for endpoint, weight in change.add.items()]
    members = tuple(_treated(member, change) for member in kept)
    log2 = maglev.log2_slots(len(members), slots_per_backend)
    return structs.replace(target, members=members, log2=log2)


def _treated(member: Member, change: Change) -> Member:
    drained = member.drained or member.endpoint in change.drain
    return structs.replace(
        member,
        drained=drained and member.endpoint not in change.undrain,
        weight=change.weights.get(member.endpoint, member.weight),
    )


def simulate(
    endpoints: Mapping[Endpoint, int], table: NDArray[np.integer], after: Target
) -> Outcome:
    """Compare a table as it stands with the one that `after` would have.

    Shape: `table` holds ids, a power of two of them; `endpoints` says whose, 0 is nobody's.
    """
    ids = dict(endpoints)
    fresh = max(ids.values(), default=0)
    for member in after.members:
        if member.endpoint not in ids:
            fresh += 1
            ids[member.endpoint] = fresh
    wanted = owners(after, ids)
    slots = max(len(table), len(wanted))
    old = np.repeat(np.asarray(table, np.int64), slots // len(table))
    new = np.repeat(np.asarray(wanted, np.int64), slots // len(wanted))
    moved = old != new
    counts = [np.bincount(some, minlength=fresh + 1) for some in (old, new, new[moved], old[moved])]
    rows = tuple(
        Row(endpoint, *(int(count[i]) for count in counts))
        for endpoint, i in sorted(ids.items(), key=lambda item: _order(item[0]))
    )
    return Outcome(
        slots_before=len(table),
        slots_after=len(wanted),
        slots=slots,
        moved=int(np.count_nonzero(moved)),
        least=int(np.maximum(counts[0] - counts[1], 0).sum()),
        rows=rows,
    )


def due(weights: Mapping[Endpoint, int], slots: int) -> dict[Endpoint, float]:
    """The slots that each backend's weight is worth, before rounding."""
    total = sum(weights.values())
    return {e: slots * weight / total for e, weight in weights.items()} if total else {}


def _order(endpoint: Endpoint) -> tuple[int, int, int]:
    return endpoint.address.version, int(endpoint.address), endpoint.port
