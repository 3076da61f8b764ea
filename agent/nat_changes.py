# SPDX-License-Identifier: Apache-2.0
"""Translations that begin and end, while somebody watches.

Found by looking at map nat_fwd every second, so that the program has nothing to do with it. None is
missed by that: a translation stays for longer than a second, and one whose tuple begins anew
in between differs in its own port or backend, or is the same to everybody.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shunt.agent.flow_views import backend_name
from shunt.agent.node import Node
from shunt.agent.service_views import Json
from shunt.kern.maps import Map
from shunt.lb.compile import unmapped
from shunt.lb.model import PROTOCOL_NAMES

EVERY_S = 1.0
# So many lines before others on the event loop get a turn.
BATCH = 200
# Of a value, what says whose translation it is.
_KEPT = ("word", "saddr", "sport", "dport", "svc")


class NatChanges:
    """Lines for each watcher, until `close`."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._closed = asyncio.Event()

    def close(self) -> None:
        """Every watcher's lines end."""
        self._closed.set()

    async def lines(self) -> AsyncGenerator[Json, None]:
        """What begins and ends from now on."""
        nat = self.node.tables.maps["nat_fwd"]
        before = await asyncio.to_thread(look, nat)
        while not self._closed.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closed.wait(), EVERY_S)
            now = await asyncio.to_thread(look, nat)
            begun, ended = await asyncio.to_thread(differ, before, now)
            before = now
            for event, rows in (("ended", ended), ("created", begun)):
                for n, row in enumerate(rows):
                    if n % BATCH == BATCH - 1:
                        await asyncio.sleep(0)
                    yield self._line(event, row)

    def _line(self, event: str, row: Any) -> Json:
        key = row["key"]
        return {
            "time": round(time.time(), 3),
            "event": event,
            "service": self.node.tables.name_of(int(row["svc"])).rpartition("/")[0],
            "protocol": PROTOCOL_NAMES[int(key["proto"])],
            "client": str(unmapped(key["saddr"].tobytes())),
            "client_port": int(key["sport"]),
            "vip": str(unmapped(key["daddr"].tobytes())),
            "vip_port": int(key["dport"]),
            "own": str(unmapped(row["saddr"].tobytes())),
            "own_port": int(row["sport"]),
            "backend": backend_name(self.node.tables, int(row["word"]) & 0xFFFFFFFF),
            "backend_port": int(row["dport"]),
        }


def look(nat: Map) -> NDArray[Any]:
    """What there is. Shape: records of `key` and what _KEPT names, without holes."""
    value = nat.spec.value
    assert value.fields is not None
    dtype = np.dtype([("key", nat.spec.key), *((n, value.fields[n][0]) for n in _KEPT)])
    keys, values = nat.items()
    rows = np.zeros(len(keys), dtype)
    rows["key"] = keys
    for name in _KEPT:
        rows[name] = values[name]
    return rows


def differ(before: NDArray[Any], now: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rows that are only in `now`, and rows that are only in `before`."""
    old, new = (np.ascontiguousarray(r).view(f"S{r.dtype.itemsize}") for r in (before, now))
    return now[~np.isin(new, old)], before[~np.isin(old, new)]
