# SPDX-License-Identifier: Apache-2.0
"""Remembered flows and translations as plain values, read batch by batch. Changes nothing."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from shunt.agent.node import Node
from shunt.agent.samples import describe
from shunt.agent.service_views import Json, names
from shunt.agent.tables import Tables
from shunt.lb.compile import Endpoint, unmapped
from shunt.lb.model import Protocol

BATCH = 1024
_ID = np.uint64(0xFFFFFFFF)


async def flows(node: Node, service: str | None, limit: int) -> Json:
    """Flows that are remembered, in no order. `more`: there are more than `limit`."""
    states = names(node.datapath.btf, "flow_state", "FLOW_")

    def shown(key: Any, value: Any) -> Json:
        return {
            "client": str(unmapped(key["saddr"].tobytes())),
            "client_port": int(key["sport"]),
            "vip": str(unmapped(key["daddr"].tobytes())),
            "vip_port": int(key["dport"]),
            "protocol": Protocol(int(key["proto"])).name.lower(),
            "state": states(int(value["state"])).name.lower(),
        }

    return await _listed(node, "flows", service, limit, shown)


async def translations(node: Node, service: str | None, limit: int) -> Json:
    """Flows of mode nat, from the client's side, in no order. `more`: there are more."""
    states = names(node.datapath.btf, "flow_state", "FLOW_")

    def shown(key: Any, value: Any) -> Json:
        state = states(int(value["state"])).name.lower()
        return {
            "client": str(unmapped(key["saddr"].tobytes())),
            "client_port": int(key["sport"]),
            "vip": str(unmapped(key["daddr"].tobytes())),
            "vip_port": int(key["dport"]),
            "protocol": Protocol(int(key["proto"])).name.lower(),
            "state": "closing" if int(value["closed"]) else state,
            "own": str(unmapped(value["saddr"].tobytes())),
            "own_port": int(value["sport"]),
            "backend_port": int(value["dport"]),
        }

    return await _listed(node, "nat_fwd", service, limit, shown)


async def _listed(
    node: Node,
    name: str,
    service: str | None,
    limit: int,
    shown: Callable[[Any, Any], Json],
) -> Json:
    tables = node.tables
    targets = {p.svc: n for n, p in tables.placed.items()}
    wanted = None
    if service is not None:
        wanted = [svc for svc, n in targets.items() if n.rpartition("/")[0] == service]
    # Encoded row by row: a hundred thousand dicts would hold up the loop, as garbage too.
    found: list[msgspec.Raw] = []
    more = False
    for keys, values in tables.maps[name].batches(BATCH):
        index = np.arange(len(keys))
        if wanted is not None:
            index = index[np.isin(values["svc"], wanted)]
        more = more or len(found) + len(index) > limit
        now_ns = time.monotonic_ns()
        for i in index[: limit - len(found)].tolist():
            row = {
                "service": targets.get(int(values["svc"][i]), "").rpartition("/")[0],
                **shown(keys[i], values[i]),
                "backend": backend_name(tables, int(values["word"][i] & _ID)),
                "idle_s": round(max(0, now_ns - int(values["seen_ns"][i])) / 1e9, 1),
            }
            found.append(msgspec.Raw(msgspec.json.encode(row)))
        if more:
            break
        await asyncio.sleep(0)
    return {"flows": found, "more": more}


def sample(node: Node, record: bytes) -> Json:
    """A sampled packet: a record of the ring, `struct sample`."""
    btf = node.datapath.btf
    found = np.frombuffer(record, btf.struct("sample"), 1)[0]
    named = node.tables.maps["names"].lookup(int(found["svc"]))
    ago_s = (time.monotonic_ns() - int(found["time_ns"])) / 1e9
    try:
        interface = socket.if_indextoname(int(found["ifindex"]))
    except OSError:  # it has gone
        interface = ""
    return {
        "time": round(time.time() - ago_s, 3),
        "reason": names(btf, "reason", "REASON_")(int(found["reason"])).name,
        "interface": interface,
        "service": named["name"].item().decode().rpartition("/")[0] if named is not None else "",
        "backend": backend_name(node.tables, int(found["backend"])),
        "bytes": int(found["len"]),
        **describe(found["data"][: int(found["captured"])].tobytes()),
    }


def backend_name(tables: Tables, backend_id: int) -> str:
    """What a backend id stands for; empty for none and for one that is gone."""
    record = tables.backends[backend_id]
    if not backend_id or not int(record["flags"]) & tables.flag.known:
        return ""
    return str(Endpoint(unmapped(record["addr"].tobytes()), int(record["port"])))
