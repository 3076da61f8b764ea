# SPDX-License-Identifier: Apache-2.0
"""Remembered flows and translations as plain values, read batch by batch. Changes nothing."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from shunt.agent.nat_expiry import BROKEN, ENDED
from shunt.agent.node import Node
from shunt.agent.samples import describe
from shunt.agent.service_views import Json, names
from shunt.agent.tables import Tables
from shunt.kern.flows import backends, seen_ns, states
from shunt.lb.compile import Endpoint, unmapped
from shunt.lb.model import PROTOCOL_NAMES

BATCH = 4096  # lines, or elements
_ID = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True)
class _Batch:
    """Some flows of either kind. Shape: a row each."""

    keys: Any
    values: Any
    svc: NDArray[np.intp]
    backend: NDArray[np.intp]
    state: NDArray[Any]
    seen_ns: NDArray[np.int64]


async def flows(node: Node, service: str | None, limit: int) -> Json:
    """Flows that are remembered, in no order. `more`: there are more than `limit`."""
    tables = node.tables

    def batches() -> Iterator[_Batch]:
        for _, lines in tables.flows.batches(BATCH):
            found = lines[lines["key"]["kind"] == 0]  # not the clients of services with affinity
            words = found["word"]
            ids = backends(words)
            svc = tables.backends["svc"][ids].astype(np.intp)
            yield _Batch(found["key"], found, svc, ids, states(words), seen_ns(words))

    return await _listed(node, batches(), service, limit, lambda _: {})


async def translations(node: Node, service: str | None, limit: int) -> Json:
    """Flows of modes nat and local, from the client's side, in no order. `more`: there are more."""
    closing = states_of(node)["CLOSING"]

    def batches() -> Iterator[_Batch]:
        for keys, values in node.tables.maps["nat_fwd"].batches(BATCH):
            ids = (values["word"] & _ID).astype(np.intp)
            over = (values["closed"] != 0) | (values["track"] & (ENDED | BROKEN) != 0)
            state = np.where(over, closing, values["state"])
            seen = values["seen_ns"].astype(np.int64)
            yield _Batch(keys, values, values["svc"].astype(np.intp), ids, state, seen)

    def own(value: Any) -> Json:
        return {
            "own": str(unmapped(value["saddr"].tobytes())),
            "own_port": int(value["sport"]),
            "backend_port": int(value["dport"]),
        }

    return await _listed(node, batches(), service, limit, own)


def states_of(node: Node) -> type[IntEnum]:
    """enum flow_state."""
    return node.datapath.btf.enum("flow_state", "FLOW_")  # type: ignore[no-any-return]


async def _listed(
    node: Node,
    batches: Iterator[_Batch],
    service: str | None,
    limit: int,
    more_of: Callable[[Any], Json],
) -> Json:
    tables, state_of = node.tables, states_of(node)
    targets = {p.svc: n for n, p in tables.placed.items()}
    wanted = None
    if service is not None:
        wanted = [svc for svc, n in targets.items() if n.rpartition("/")[0] == service]
    # Encoded row by row: a hundred thousand dicts would hold up the loop, as garbage too.
    found: list[msgspec.Raw] = []
    more = False
    for batch in batches:
        index = np.arange(len(batch.keys))
        if wanted is not None:
            index = index[np.isin(batch.svc, wanted)]
        more = more or len(found) + len(index) > limit
        now_ns = time.monotonic_ns()
        for i in index[: limit - len(found)].tolist():
            key = batch.keys[i]
            row = {
                "service": targets.get(int(batch.svc[i]), "").rpartition("/")[0],
                "client": str(unmapped(key["saddr"].tobytes())),
                "client_port": int(key["sport"]),
                "vip": str(unmapped(key["daddr"].tobytes())),
                "vip_port": int(key["dport"]),
                "protocol": PROTOCOL_NAMES[int(key["proto"])],
                "state": state_of(int(batch.state[i])).name.lower(),
                **more_of(batch.values[i]),
                "backend": backend_name(tables, int(batch.backend[i])),
                "idle_s": round(max(0, now_ns - int(batch.seen_ns[i])) / 1e9, 1),
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
