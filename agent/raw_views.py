# SPDX-License-Identifier: Apache-2.0
"""The maps as they are, with ids, places and words: what to look at when tables are in doubt."""

from __future__ import annotations

import asyncio
from enum import IntEnum
from itertools import islice
from typing import Any

import msgspec

from shunt.agent.flow_views import BATCH, states_of
from shunt.agent.node import Node
from shunt.agent.service_views import Json, names
from shunt.kern.flows import backends, seen_ns, states
from shunt.lb.compile import unmapped
from shunt.lb.frontends import FrontendTable
from shunt.lb.model import PROTOCOL_NAMES
from shunt.xdp.resize import service_words


async def frontends(node: Node, service: str | None, limit: int) -> Json:
    """Map services, and what map svc says of each id. `more`: there are more than `limit`."""
    tables, modes = node.tables, names(node.datapath.btf, "mode", "MODE_")
    known = {place.svc: name for name, place in tables.placed.items()}
    # Read from the map itself, not from what the agent remembers having written.
    entries = FrontendTable(service_words(tables.maps["services"])).items()
    found: list[msgspec.Raw] = []
    more = False
    while some := list(islice(entries, BATCH)):
        for frontend, svc in some:
            name = known.get(svc, "")
            if service is not None and name.rpartition("/")[0] != service:
                continue
            if len(found) == limit:
                more = True
                break
            record = tables.svc[svc]
            first, log2 = tables.region_log2(svc)
            row = {
                "frontend": str(frontend),
                "vip": str(frontend.vip),
                "port": frontend.port,
                "protocol": frontend.protocol.name.lower(),
                "svc": svc,
                "name": name,
                "mode": modes(int(record["mode"])).name.lower().replace("_", "-"),
                "first_slot": first,
                "log2_slots": log2,
                "idle_ns": int(record["idle_ns"]),
            }
            found.append(msgspec.Raw(msgspec.json.encode(row)))
        if more:
            break
        await asyncio.sleep(0)
    return {"frontends": found, "more": more}


async def flows(node: Node, service: str | None, limit: int) -> Json:
    """Lines of map flows that hold a flow. `more`: there are more than `limit`."""
    tables, state_of = node.tables, states_of(node)
    wanted = {p.svc for n, p in tables.placed.items() if n.rpartition("/")[0] == service}
    found: list[msgspec.Raw] = []
    more = False
    for index, lines in tables.flows.batches(BATCH):
        services = tables.backends["svc"][backends(lines["word"])]
        for i, line, svc in zip(index.tolist(), lines, services.tolist(), strict=True):
            if service is not None and svc not in wanted:
                continue
            if len(found) == limit:
                more = True
                break
            found.append(msgspec.Raw(msgspec.json.encode(_line(i, line, svc, state_of))))
        if more:
            break
        await asyncio.sleep(0)
    return {"flows": found, "more": more}


def _line(index: int, line: Any, svc: int, state_of: type[IntEnum]) -> Json:
    key, word = line["key"], line["word"]
    return {
        "line": index,
        "source": str(unmapped(key["saddr"].tobytes())),
        "source_port": int(key["sport"]),
        "destination": str(unmapped(key["daddr"].tobytes())),
        "destination_port": int(key["dport"]),
        "protocol": PROTOCOL_NAMES[int(key["proto"])],
        "svc": svc,
        "backend_id": int(backends(word)),
        "state": state_of(int(states(word))).name.lower(),
        "seen_ns": int(seen_ns(word)),
        "hash": f"{int(line['hash']):08x}",
        "isn": int(line["isn"]),
        "word": f"{int(word):016x}",
        "near": f"{int(line['near']):016x}",
    }
