# SPDX-License-Identifier: Apache-2.0
"""Map echo: the VIPs that answer echo requests, which is those with a backend that lives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from shunt.agent.tables import Placed
from shunt.kern.maps import Map, Records
from shunt.lb.compile import Target, mapped, unmapped
from shunt.lb.model import Configuration, IPAddress


def answering(
    targets: Iterable[Target], configuration: Configuration, placed: Mapping[str, Placed]
) -> dict[IPAddress, int]:
    """Each VIP that answers now, and the service id for which it is counted.

    Of several services of a VIP, one that lets it answer is enough.
    """
    default = configuration.settings.echo
    echo = {s.name: default if s.echo is None else s.echo for s in configuration.services}
    found: dict[IPAddress, int] = {}
    for target in sorted(targets, key=lambda t: t.name):
        if echo.get(target.name.rpartition("/")[0]) and any(m.up for m in target.members):
            for frontend in target.frontends:
                found.setdefault(frontend.vip, placed[target.name].svc)
    return found


def sync_echo(table: Map, wanted: Mapping[IPAddress, int]) -> int:
    """Let these VIPs answer and no others. Returns how many changed.

    Raises: ShuntError if the map is full; some of the new ones may answer then.
    """
    keys, values = table.items()
    there = {
        unmapped(key["vip"].tobytes()): int(value["svc"])
        for key, value in zip(keys, values, strict=True)
    }
    changed = 0
    for vip in there.keys() - wanted.keys():
        table.delete(_key(table, vip))
        changed += 1
    for vip, svc in wanted.items():
        if there.get(vip) != svc:
            value = table.new_values(1)
            value["svc"] = svc
            table.update(_key(table, vip), value)
            changed += 1
    return changed


def _key(table: Map, vip: IPAddress) -> Records:
    key = table.new_keys(1)
    key["vip"] = np.frombuffer(mapped(vip), np.uint8)
    return key
