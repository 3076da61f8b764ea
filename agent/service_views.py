# SPDX-License-Identifier: Apache-2.0
"""Services and their backends as plain values. Changes nothing.

A service of several protocols is several in the data path; people see it as one, and a backend
of it as one row with the counters added up.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shunt.agent.nexthops import NextHop
from shunt.agent.node import Node
from shunt.agent.tables import Placed, Tables
from shunt.kern.btf import Btf
from shunt.lb import slots as slot
from shunt.lb.compile import Endpoint, target_name
from shunt.lb.errors import ShuntError
from shunt.lb.health import State as Checked
from shunt.lb.model import Backend, IPAddress, Service

Json = dict[str, Any]
Hops = Mapping[IPAddress, NextHop | ShuntError]

STATES = ("up", "failing", "draining", "removed")
# Fewer counters than this are looked up one by one; more are read in batches.
FEW = 200
# So many backends are looked at before others on the event loop get a turn.
BATCH = 200


@dataclass
class _Seen:
    """One backend over the protocols of its service."""

    endpoint: Endpoint
    configured_weight: int | None = None  # None: it is no longer configured
    server_id: bytes = b""
    ids: list[int] = field(default_factory=list)
    slots: int = 0


@lru_cache(maxsize=16)
def names(btf: Btf, enum: str, prefix: str) -> type[IntEnum]:
    """The names of an enum of bpf/abi.h."""
    return btf.enum(enum, prefix)


def backend_states(tables: Tables) -> NDArray[np.intp]:
    """By backend id, what matters most to its packets, as an index of STATES."""
    flags, flag = tables.backends["flags"], tables.flag
    conditions = [flags & flag.removed != 0, flags & flag.up == 0, flags & flag.drained != 0]
    found: NDArray[np.intp] = np.select(
        conditions, [STATES.index(s) for s in ("removed", "failing", "draining")], 0
    )
    return found


def backend_state(tables: Tables, backend_id: int) -> str:
    """The same for one."""
    flags, flag = int(tables.backends["flags"][backend_id]), tables.flag
    if flags & flag.removed:
        return "removed"
    if not flags & flag.up:
        return "failing"
    return "draining" if flags & flag.drained else "up"


async def services(node: Node) -> list[Json]:
    """Every service, without its backends."""
    assert node.configuration is not None
    shown: list[tuple[Json, list[Placed]]] = []
    for n, service in enumerate(node.services.values()):
        shown.append((_service(node, service), _places(node, service)))
        if n % BATCH == BATCH - 1:
            await asyncio.sleep(0)
    _add_service_counts(node, shown)
    return [json for json, _ in shown]


async def service(node: Node, found: Service) -> Json:
    """One service with its backends."""
    shown = _service(node, found)
    _add_service_counts(node, [(shown, _places(node, found))])
    check = found.health
    shown["health"] = check and {
        "type": check.kind,
        "port": check.port,
        "via": check.via,
        "interval_s": check.interval_s,
        "timeout_s": check.timeout_s,
        "rise": check.rise,
        "fall": check.fall,
        "jitter": check.jitter,
        "slow_start_s": check.slow_start_s,
        "panic_threshold": check.panic_threshold,
    }
    shown["quic"] = found.quic and {
        "server_id_length": found.quic.server_id_length,
        "config_id": found.quic.config_id,
        "nonce_length": found.quic.nonce_length,
    }
    shown["sockets"], shown["redirect"] = found.sockets, found.redirect
    shown["idle_s"] = {p: getattr(found, f"{p}_idle_s") for p in shown["protocols"]}
    shown["backends"] = await backends(node, [found])
    return shown


async def backends(node: Node, of: Iterable[Service]) -> list[Json]:
    """The backends of these services, those that were removed and still have flows last."""
    hops = node.nexthops.current()
    shown: list[tuple[Json, list[int]]] = []
    rested = 0
    for found in of:
        for seen, share in _seen(node, found):
            shown.append((_backend(node, found, seen, share, hops), seen.ids))
        if len(shown) - rested >= BATCH:
            rested = len(shown)
            await asyncio.sleep(0)
    for json, ids in shown:
        _add_counts(node.tables.backend_stats, json, ids)
    return [json for json, _ in shown]


def backend(node: Node, service: Service, endpoint: Endpoint) -> Json:
    """One backend of a service, as `backends` has it."""
    seen, share = next(found for found in _seen(node, service) if found[0].endpoint == endpoint)
    shown = _backend(node, service, seen, share, node.nexthops.current())
    _add_counts(node.tables.backend_stats, shown, seen.ids)
    return shown


def watched(node: Node, service: Service) -> tuple[Json, dict[str, Json]]:
    """What watchers are told of a service, and of each backend: no counters."""
    places = _places(node, service)
    ids = {e: i for place in places for e, i in place.backends.items()}
    weights = {Endpoint(b.address, b.port): b.weight for b in service.backends}
    backends: dict[str, Json] = {}
    for endpoint in dict.fromkeys([*weights, *ids]):
        name, i = str(Backend(endpoint.address, endpoint.port)), ids.get(endpoint)
        override = int(node.tables.backends["weight"][i]) if i is not None else 0
        backends[name] = {
            "service": service.name,
            "backend": name,
            "state": backend_state(node.tables, i) if i is not None else "failing",
            "weight": override or weights.get(endpoint),
        }
    shown = {
        "service": service.name,
        "origin": node.origins.get(service.name, ""),
        "mode": str(service.mode),
        "vips": [str(vip) for vip in service.vips],
        "ports": [str(port) for port in service.ports],
    }
    return shown, backends


def _places(node: Node, service: Service) -> list[Placed]:
    names = [target_name(service.name, protocol) for protocol in service.protocols()]
    return [node.tables.placed[name] for name in names if name in node.tables.placed]


def _service(node: Node, service: Service) -> Json:
    tables, places = node.tables, _places(node, service)
    counts = {"total": 0, "settled": 0, "moving": 0, "lingering": 0}
    for place in places:
        states = slot.state(tables.words[place.slots()])
        counts["total"] += len(states)
        for state in slot.State:
            counts[state.name.lower()] += int(np.count_nonzero(states == state))
    states_of = Counter(
        backend_state(tables, seen.ids[0]) for seen, _ in _seen(node, service) if seen.ids
    )
    return {
        "name": service.name,
        "origin": node.origins.get(service.name, ""),
        "protocols": [protocol.name.lower() for protocol in service.protocols()],
        "mode": str(service.mode),
        "vips": [str(vip) for vip in service.vips],
        "node": [str(network) for network in service.node],
        "ports": [str(port) for port in service.ports],
        "backend_states": {state: states_of[state] for state in STATES},
        "slots": counts,
    }


def _seen(node: Node, service: Service) -> list[tuple[_Seen, float]]:
    """Each backend with its share of the slots: the configured in their order, then others."""
    found: dict[Endpoint, _Seen] = {}
    for backend in service.backends:
        endpoint = Endpoint(backend.address, backend.port)
        found[endpoint] = _Seen(endpoint, backend.weight, backend.server_id)
    total = 0
    for place in _places(node, service):
        owners, counts = np.unique(slot.cur(node.tables.words[place.slots()]), return_counts=True)
        owned = dict(zip(owners.tolist(), counts.tolist(), strict=True))
        total += sum(owned.values())
        for endpoint, i in place.backends.items():
            seen = found.setdefault(endpoint, _Seen(endpoint))
            seen.ids.append(i)
            seen.slots += owned.get(i, 0)
    return [(seen, seen.slots / total if total else 0.0) for seen in found.values()]


def _backend(node: Node, service: Service, seen: _Seen, share: float, hops: Hops) -> Json:
    endpoint, tables = seen.endpoint, node.tables
    key = service.name, endpoint
    state = backend_state(tables, seen.ids[0]) if seen.ids else "failing"
    flags = int(tables.backends["flags"][seen.ids[0]]) if seen.ids else 0
    override = int(tables.backends["weight"][seen.ids[0]]) if seen.ids else 0
    hop = hops.get(endpoint.address)
    checked = node.health.state(key)
    return {
        "service": service.name,
        "backend": str(Backend(endpoint.address, endpoint.port)),
        "address": str(endpoint.address),
        "port": endpoint.port or None,
        "state": state,
        "drained": bool(flags & tables.flag.drained),
        "reason": _reason(node, service, seen, checked, state),
        "weight": override or seen.configured_weight,
        "configured_weight": seen.configured_weight,
        "slots": seen.slots,
        "share": round(share, 6),
        "server_id": seen.server_id.hex() or None,
        "nexthop": nexthop(hop),
        "health": _health(checked),
    }


def _reason(node: Node, service: Service, seen: _Seen, checked: Checked | None, state: str) -> str:
    """Why a backend gets no packets, or gets some though its checks fail."""
    failed = checked is not None and not checked.up
    if state == "up" and checked is not None and checked.last is not None and failed:
        return f"treated as up (panic): {checked.last.reason}"
    if state != "failing":
        return ""
    obstacle = node.obstacle(target_name(service.name, service.protocols()[0]), seen.endpoint)
    if obstacle is not None:
        return f"{obstacle.what}: {obstacle.why}"
    if checked is not None and checked.last is not None and not checked.last.ok:
        return checked.last.reason
    return ""


def _health(checked: Checked | None) -> Json | None:
    """What its checks found; None if it is not checked."""
    if checked is None:
        return None
    last = checked.last
    return {
        "up": checked.up,
        "checks": checked.checks,
        "failures": checked.failures,
        "last_ok": last.ok if last else None,
        "last_reason": last.reason if last else "",
        "latency_ms": round(last.latency_ms, 3) if last and last.latency_ms is not None else None,
    }


def nexthop(hop: NextHop | ShuntError | None) -> Json | None:
    """Where a backend's frames go; None where there is no way."""
    if not isinstance(hop, NextHop):
        return None
    return {
        "device": hop.device,
        "via": str(hop.via),
        "gateway": hop.gateway,
        "mac": hop.dmac.hex(":") if hop.dmac else None,
        "mtu": hop.mtu,
    }


def _add_service_counts(node: Node, shown: Sequence[tuple[Json, list[Placed]]]) -> None:
    """A service's total: what no backend got, and its backends'."""
    tables = node.tables
    for json, places in shown:
        _add_counts(tables.svc_stats, json, [place.svc for place in places])
        _add_counts(tables.backend_stats, json, [i for p in places for i in p.backends.values()])


def _add_counts(stats: Any, json: Json, ids: Sequence[int]) -> None:
    """Add packets and bytes, summed over ids and processors."""
    counts = stats[:, ids]
    for name in ("packets", "bytes"):
        json[name] = json.get(name, 0) + int(counts[name].sum())
