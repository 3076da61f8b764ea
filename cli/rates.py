# SPDX-License-Identifier: Apache-2.0
"""Rates from two readings of counters. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Json = Mapping[str, Any]
Key = tuple[str, str]  # service, backend; "" for the service itself


@dataclass(frozen=True, slots=True)
class Reading:
    """Packets and bytes of everything at one time."""

    at_s: float
    counts: dict[Key, tuple[int, int]]


def reading(at_s: float, services: Iterable[Json], backends: Iterable[Json]) -> Reading:
    """From what the API tells."""
    counts = {(s["name"], ""): (s["packets"], s["bytes"]) for s in services}
    counts |= {(b["service"], b["backend"]): (b["packets"], b["bytes"]) for b in backends}
    return Reading(at_s, counts)


def rate(before: Reading, after: Reading, key: Key) -> tuple[float, float]:
    """Packets and bits a second.

    A counter that went down began at zero again; what has just come has no rate yet.
    """
    now, then = after.counts.get(key), before.counts.get(key)
    passed_s = after.at_s - before.at_s
    if now is None or then is None or passed_s <= 0:
        return 0.0, 0.0
    packets, octets = ((a - b if a >= b else a) / passed_s for a, b in zip(now, then, strict=True))
    return packets, octets * 8


def rates(
    before: Reading, after: Reading, services: Iterable[Json], backends: Iterable[Json]
) -> list[dict[str, Any]]:
    """Services with their backends' rates; the busiest first, quiet ones by name."""
    shown = []
    by_service: dict[str, list[dict[str, Any]]] = {}
    for backend in backends:
        packets, bits = rate(before, after, (backend["service"], backend["backend"]))
        by_service.setdefault(backend["service"], []).append(
            {
                "backend": backend["backend"],
                "state": backend["state"],
                "packets_per_s": round(packets, 1),
                "bits_per_s": round(bits, 1),
            }
        )
    for service in services:
        packets, bits = rate(before, after, (service["name"], ""))
        rows = by_service.get(service["name"], [])
        rows.sort(key=lambda row: -row["packets_per_s"])
        shown.append(
            {
                "service": service["name"],
                "packets_per_s": round(packets, 1),
                "bits_per_s": round(bits, 1),
                "slots_moving": service["slots"]["moving"],
                "backends": rows,
            }
        )
    return sorted(shown, key=lambda s: (-s["packets_per_s"], s["service"]))
