# SPDX-License-Identifier: Apache-2.0
"""What a node keeps about itself: the operator's wishes, and what it has counted."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from shunt.agent.checks import Checks, Key
from shunt.agent.tables import Tables
from shunt.lb.model import Service

WEIGHT_MAX = 65535


@dataclass
class Wish:
    """What the operator asked for at run time."""

    drained: bool = False
    weight: int = 0  # 0: as configured


@dataclass
class Counts:
    """Of this process."""

    reloads: int = 0
    refused: int = 0
    writes: int = 0
    apply_s: float = 0.0  # of the last one
    read_s: float = 0.0  # of the files, at the start
    first_apply_s: float = 0.0  # from then on until all was in force
    started_s: float = field(default_factory=time.monotonic)


def recall(tables: Tables, checks: Checks, configured: Iterable[Service]) -> dict[Key, Wish]:
    """What a predecessor knew of each backend: drained, its weight; and, for `checks`, failing."""
    wishes: dict[Key, Wish] = {}
    services = {s.name: s for s in configured}
    starts = checks.starts.read()
    for name, place in tables.placed.items():
        service = name.rpartition("/")[0]
        for endpoint, i in place.backends.items():
            flags = int(tables.backends["flags"][i])
            key = service, endpoint
            weight = int(tables.backends["weight"][i])
            if flags & tables.flag.drained or weight:
                wishes[key] = Wish(bool(flags & tables.flag.drained), weight)
            if service in services:
                up = bool(flags & tables.flag.up)
                checks.recall(services[service], endpoint, up, starts.get(key))
    return wishes
