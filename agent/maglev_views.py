# SPDX-License-Identifier: Apache-2.0
"""A service's Maglev table as it stands, and what a change would move. Changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shunt.agent.node import Node
from shunt.agent.service_views import Json, backend_state
from shunt.agent.sources import values
from shunt.agent.tables import Placed
from shunt.agent.wishes import WEIGHT_MAX
from shunt.lb import slots as slot
from shunt.lb.compile import Endpoint, Target, target_name
from shunt.lb.errors import ShuntError
from shunt.lb.lookup import find_backend
from shunt.lb.model import Service
from shunt.lb.simulate import Change, Outcome, changed, due, simulate

_KEYS = ("add", "remove", "drain", "undrain", "weights")


def show(node: Node, service: Service) -> Json:
    """The tables of a service, one for each protocol."""
    return {
        "service": service.name,
        "tables": [_table(node, place, target) for place, target in _tables(node, service)],
    }


def simulated(node: Node, service: Service, asked: Json) -> Json:
    """What would move, for each protocol.

    Raises: ShuntError if what is asked makes no sense for this service.
    """
    change = parse(node, service, asked)
    return {
        "service": service.name,
        "tables": [
            _outcome(
                target,
                simulate(
                    place.backends,
                    slot.cur(node.tables.words[place.slots()]).astype(np.int64),
                    changed(target, change, service.slots_per_backend),
                ),
            )
            for place, target in _tables(node, service)
        ],
    }


def parse(node: Node, service: Service, asked: Json) -> Change:
    """A request's body as a change.

    Raises: ShuntError.
    """
    for key in asked:
        if key not in _KEYS:
            raise ShuntError(
                f"a simulation has no {key}", f"it has: {', '.join(_KEYS)}", "correct the request"
            )
    assert node.configuration is not None
    configuration = node.configuration
    added: dict[Endpoint, int] = {}
    for text, weight in _weights(asked, "add").items():
        try:
            backend = values.backend(text)
        except values.Refused as e:
            raise ShuntError(e.what, f"add wants {e.wants}", e.fix) from e
        added[Endpoint(backend.address, backend.port)] = weight
    known = {str(endpoint): endpoint for endpoint in added}

    def find(name: str) -> Endpoint:
        return known.get(name) or find_backend(configuration, service.name, name)

    return Change(
        add=added,
        remove=_named(asked, "remove", find),
        drain=_named(asked, "drain", find),
        undrain=_named(asked, "undrain", find),
        weights={find(name): weight for name, weight in _weights(asked, "weights").items()},
    )


def _named(asked: Json, key: str, find: Callable[[str], Endpoint]) -> frozenset[Endpoint]:
    names = asked.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ShuntError(
            f"{key} is {names!r}", "it wants a list of backends", "send names in a list"
        )
    return frozenset(find(name) for name in names)


def _weights(asked: Json, key: str) -> dict[str, int]:
    pairs = asked.get(key) or {}
    if not isinstance(pairs, dict):
        raise ShuntError(
            f"{key} is {pairs!r}",
            "it wants backends with their weights",
            'send {"BACKEND": WEIGHT}',
        )
    for name, weight in pairs.items():
        whole = isinstance(weight, int) and not isinstance(weight, bool)
        if not whole or not 1 <= weight <= WEIGHT_MAX:
            raise ShuntError(
                f"weight {weight!r} of backend {name}",
                f"a weight is from 1 to {WEIGHT_MAX}",
                "give one in that range",
            )
    return dict(pairs)


def _tables(node: Node, service: Service) -> Iterator[tuple[Placed, Target]]:
    for protocol in service.protocols():
        name = target_name(service.name, protocol)
        if name in node.tables.placed and name in node.want:
            yield node.tables.placed[name], node.want[name]


def _table(node: Node, place: Placed, target: Target) -> Json:
    words = node.tables.words[place.slots()]
    counts = _counts(slot.cur(words), place.backends.values())
    weights = {m.endpoint: m.weight for m in target.members}
    worth = due({m.endpoint: m.weight for m in target.members if m.takes_new_flows}, len(words))
    rows: list[Json] = [
        {
            "backend": str(endpoint),
            "state": backend_state(node.tables, i),
            "weight": weights.get(endpoint),
            "slots": counts[i],
            "share": round(counts[i] / len(words), 6),
            "due": round(worth.get(endpoint, 0.0), 3),
        }
        for endpoint, i in place.backends.items()
    ]
    off = [row["slots"] / row["due"] - 1 for row in rows if row["due"]]
    states = np.bincount(slot.state(words).astype(np.intp), minlength=len(slot.State))
    return {
        **_head(target),
        "slots": len(words),
        "first_slot": place.first,
        "states": {state.name.lower(): int(states[state]) for state in slot.State},
        # How far the fullest and the emptiest are from what their weights are worth.
        "most_above": round(max(0.0, *off) if off else 0.0, 6),
        "most_below": round(max(0.0, *(-o for o in off)) if off else 0.0, 6),
        "backends": rows,
    }


def _outcome(target: Target, found: Outcome) -> Json:
    return {
        **_head(target),
        "slots_before": found.slots_before,
        "slots_after": found.slots_after,
        "slots": found.slots,
        "moved": found.moved,
        "moved_share": round(found.moved / found.slots, 6),
        "least": found.least,
        "least_share": round(found.least / found.slots, 6),
        "backends": [
            {
                "backend": str(row.endpoint),
                "before": row.before,
                "after": row.after,
                "gained": row.gained,
                "lost": row.lost,
            }
            for row in found.rows
        ],
    }


def _head(target: Target) -> Json:
    return {"protocol": target.protocol.name.lower()}


def _counts(owners: NDArray[Any], ids: Iterable[int]) -> dict[int, int]:
    found, counts = np.unique(owners, return_counts=True)
    owned = dict(zip(found.tolist(), counts.tolist(), strict=True))
    return {i: owned.get(i, 0) for i in ids}
