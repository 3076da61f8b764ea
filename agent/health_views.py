# SPDX-License-Identifier: Apache-2.0
"""What the health checks found, as plain values. Changes nothing."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import UTC, datetime

from shunt.agent.node import Node
from shunt.agent.service_views import Json
from shunt.lb.compile import Endpoint
from shunt.lb.health import State
from shunt.lb.model import Service
from shunt.lb.standing import STEPS


def health(node: Node, of: Iterable[Service]) -> Json:
    """The checked backends of these services, and which services are in panic."""
    services = list(of)
    now_s, wall_s = time.monotonic(), time.time()
    rows = [
        _row(node, service, endpoint, state, wall_s - now_s)
        for service in services
        for endpoint in _endpoints(node, service)
        if (state := node.health.state((service.name, endpoint))) is not None
    ]
    names = {service.name for service in services}
    return {"health": rows, "panic": [p for p in panic(node) if p["service"] in names]}


def panic(node: Node) -> list[Json]:
    """Services of which so few backends are up that all are treated as up."""
    return [
        {"service": name, "up": found.up, "backends": found.backends}
        for name, found in sorted(node.checks.panic.items())
    ]


def _endpoints(node: Node, service: Service) -> list[Endpoint]:
    """Those configured in their order, then those that were removed."""
    found = {Endpoint(b.address, b.port): None for b in service.backends}
    for protocol in service.protocols():
        place = node.tables.placed.get(f"{service.name}/{protocol.name.lower()}")
        found |= dict.fromkeys(place.backends if place else ())
    return list(found)


def _row(node: Node, service: Service, endpoint: Endpoint, state: State, epoch_s: float) -> Json:
    key = service.name, endpoint
    last = state.last
    return {
        "service": service.name,
        "backend": str(endpoint),
        "type": service.health.kind if service.health else None,
        "state": _word(state),
        "removed": state.removed,
        "panic": not state.up and node.checks.is_up(key),
        "weight_share": node.checks.tenths(key) / STEPS,
        "since": _wall(state.since_s + epoch_s),
        "checks": state.checks,
        "failures": state.failures,
        "last_ok": last.ok if last else None,
        "last_at": _wall(last.at_s + epoch_s) if last else None,
        "latency_ms": round(last.latency_ms, 3) if last and last.latency_ms is not None else None,
        "reason": last.reason if last else "",
    }


def _word(state: State) -> str:
    if not state.up:
        return "failing"
    return "up" if state.last is not None else "unknown"


def _wall(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds")
