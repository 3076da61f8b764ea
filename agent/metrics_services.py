# SPDX-License-Identifier: Apache-2.0
"""Metrics of each service and backend: as many as there are of them, docs/metrics.md says how many.

A service of two protocols is two here, as in the data path; so is a backend of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from shunt.agent.metric_families import BATCH, Family, Sample
from shunt.agent.node import Node
from shunt.agent.tables import Placed
from shunt.lb import slots as slot
from shunt.lb.compile import Endpoint
from shunt.lb.health import State

SERVICE_LABELS = ("service", "protocol")
BACKEND_LABELS = (*SERVICE_LABELS, "backend")


def _places(node: Node) -> list[Placed]:
    """A copy: services may come and go while a scrape is written."""
    return list(node.tables.placed.values())


def _named(place: Placed) -> tuple[str, str]:
    service, _, protocol = place.name.rpartition("/")
    return service, protocol


def _service_total(field: str) -> Callable[[Node], Iterator[Sample]]:
    """What no backend got or ones that have gone got, and what its backends got."""

    def read(node: Node) -> Iterator[Sample]:
        tables = node.tables
        for place in _places(node):
            own = tables.svc_stats[field][:, place.svc].sum()
            theirs = tables.backend_stats[field][:, list(place.backends.values())].sum()
            yield _named(place), int(own + theirs)

    return read


def _slots(node: Node) -> Iterator[Sample]:
    for place in _places(node):
        counts = np.bincount(
            slot.state(node.tables.words[place.slots()]).astype(np.intp),
            minlength=len(slot.State),
        )
        for state in slot.State:
            yield (*_named(place), state.name.lower()), int(counts[state])


def _by_id(
    value: Callable[[Node, NDArray[np.intp]], NDArray[np.generic]],
) -> Callable[[Node], Iterator[Sample]]:
    """A value of each backend, looked up for many ids at once."""

    def read(node: Node) -> Iterator[Sample]:
        waiting: list[tuple[tuple[str, ...], int]] = []
        for place in _places(node):
            named = _named(place)
            for endpoint, i in list(place.backends.items()):
                waiting.append(((*named, str(endpoint)), i))
            if len(waiting) >= BATCH:
                yield from looked_up(node, waiting)
                waiting = []
        yield from looked_up(node, waiting)

    def looked_up(node: Node, some: list[tuple[tuple[str, ...], int]]) -> Iterator[Sample]:
        ids = np.array([i for _, i in some], np.intp)
        for (labels, _), found in zip(some, value(node, ids).tolist(), strict=True):
            yield labels, float(found)

    return read


def _total(field: str) -> Callable[[Node], Iterator[Sample]]:
    return _by_id(lambda node, ids: node.tables.backend_stats[field][:, ids].sum(axis=0))


def _up(node: Node, ids: NDArray[np.intp]) -> NDArray[np.bool_]:
    up: NDArray[np.bool_] = (node.tables.backends["flags"][ids] & node.tables.flag.up) != 0
    return up


def _drained(node: Node, ids: NDArray[np.intp]) -> NDArray[np.bool_]:
    flag = node.tables.flag
    wanted = flag.drained | flag.removed
    drained: NDArray[np.bool_] = (node.tables.backends["flags"][ids] & wanted) != 0
    return drained


def _owned(node: Node) -> Iterator[Sample]:
    for place in _places(node):
        words = node.tables.words[place.slots()]
        owners, counts = np.unique(slot.cur(words), return_counts=True)
        owned = dict(zip(owners.tolist(), counts.tolist(), strict=True))
        for endpoint, i in list(place.backends.items()):
            yield (*_named(place), str(endpoint)), owned.get(i, 0)


def _checked(
    value: Callable[[State], float | None],
) -> Callable[[Node], Iterator[Sample]]:
    """A value of each backend that is checked; checks are of a service, whatever its protocols."""

    def read(node: Node) -> Iterator[Sample]:
        key: tuple[str, Endpoint]
        for key in list(node.health):
            state = node.health.state(key)
            found = value(state) if state else None
            if found is not None:
                yield (key[0], str(key[1])), found

    return read


def _latency_s(state: State) -> float | None:
    last = state.last
    return last.latency_ms / 1000 if last and last.latency_ms is not None else None


SERVICES = (
    Family("shunt_service_packets_total", "counter", SERVICE_LABELS,
           "Packets to a service.", _service_total("packets")),
    Family("shunt_service_bytes_total", "counter", SERVICE_LABELS,
           "Bytes of those packets.", _service_total("bytes")),
    Family("shunt_service_slots", "gauge", (*SERVICE_LABELS, "state"),
           "A service's slots by state.", _slots),
)  # fmt: skip
BACKENDS = (
    Family("shunt_backend_packets_total", "counter", BACKEND_LABELS,
           "Packets to a backend.", _total("packets")),
    Family("shunt_backend_bytes_total", "counter", BACKEND_LABELS,
           "Bytes of those packets.", _total("bytes")),
    Family("shunt_backend_slots", "gauge", BACKEND_LABELS,
           "Slots that are the backend's own.", _owned),
    Family("shunt_backend_up", "gauge", BACKEND_LABELS,
           "1 if it gets packets, 0 if it is failing or there is no way to it.", _by_id(_up)),
    Family("shunt_backend_drained", "gauge", BACKEND_LABELS,
           "1 if it gets no new flows: drained, or removed from the configuration.",
           _by_id(_drained)),
    Family("shunt_backend_healthy", "gauge", ("service", "backend"),
           "1 if its checks say that it is well.", _checked(lambda s: s.up)),
    Family("shunt_backend_checks_total", "counter", ("service", "backend"),
           "Checks of a backend that had a result.", _checked(lambda s: s.checks)),
    Family("shunt_backend_check_failures_total", "counter", ("service", "backend"),
           "Checks of a backend that failed.", _checked(lambda s: s.failures)),
    Family("shunt_backend_check_latency_seconds", "gauge", ("service", "backend"),
           "Of the last check, if it succeeded.", _checked(_latency_s)),
)  # fmt: skip
