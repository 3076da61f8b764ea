# SPDX-License-Identifier: Apache-2.0
"""GET /v1/monitor: dropped packets, or translations that begin and end, as they come."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

import msgspec
from aiohttp import web

from shunt.agent import flow_views
from shunt.agent.answers import Refused
from shunt.agent.nat_changes import NatChanges
from shunt.agent.node import Node
from shunt.agent.samples import Samples
from shunt.agent.service_views import Json, names
from shunt.lb.errors import ShuntError
from shunt.lb.lookup import find_service

KINDS = ("drop", "nat")
FILTERS = ("service", "backend", "network", "reason")


@dataclass(frozen=True)
class Filter:
    """What a watcher wants to see; what is None, of all. `network`: of clients."""

    service: str | None = None
    backend: str | None = None
    network: IPv4Network | IPv6Network | None = None
    reason: str | None = None  # as the enum has it

    def wants(self, found: Json) -> bool:
        """Whether a line is to be shown. One without an address is of no network."""
        for key in ("service", "backend", "reason"):
            wanted = getattr(self, key)
            if wanted is not None and found.get(key) != wanted:
                return False
        if self.network is None:
            return True
        source = found.get("source") or found.get("client")
        return source is not None and ip_address(source) in self.network


class Monitor:
    """Streams to whoever asks."""

    def __init__(self, node: Node, samples: Samples) -> None:
        self.node, self.samples = node, samples
        self.nat = NatChanges(node)

    def close(self) -> None:
        """All streams end."""
        self.samples.end_subscriptions()
        self.nat.close()

    async def respond(self, request: web.Request) -> web.StreamResponse:
        """One JSON object a line; one with `lost` whenever the reader was too slow."""
        kind, wanted = self._asked(request.query)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        try:
            async with aclosing(self._drops() if kind == "drop" else self.nat.lines()) as lines:
                async for line in lines:
                    if "lost" in line or wanted.wants(line):
                        await response.write(msgspec.json.encode(line) + b"\n")
            await response.write_eof()
        except ConnectionError:
            pass  # the reader has gone
        return response

    async def _drops(self) -> AsyncGenerator[Json, None]:
        subscription, told = self.samples.subscribe(), 0
        try:
            async for record in subscription:
                if subscription.lost > told:
                    yield {"lost": subscription.lost - told}
                    told = subscription.lost
                yield flow_views.sample(self.node, record)
        finally:
            self.samples.unsubscribe(subscription)

    def _asked(self, query: Mapping[str, str]) -> tuple[str, Filter]:
        """Raises: Refused."""
        kind = query.get("type") or "drop"
        if kind not in KINDS:
            raise _refused(f"there is nothing of type {kind}", f"types: {', '.join(KINDS)}")
        allowed = [f for f in FILTERS if f != "reason" or kind == "drop"]
        for name in query:
            if name != "type" and name not in allowed:
                raise _refused(
                    f"/v1/monitor has no parameter {name} with type {kind}",
                    f"it has: type, {', '.join(allowed)}",
                )
        service, network = query.get("service") or None, query.get("network") or None
        if service is not None:
            assert self.node.configuration is not None
            try:
                find_service(self.node.configuration, service)
            except ShuntError as e:
                raise Refused(404, e) from e
        try:
            net = None if network is None else ip_network(network)
        except ValueError as e:
            raise _refused(f"network {network} is none", str(e)) from e
        return kind, Filter(service, query.get("backend") or None, net, self._reason(query))

    def _reason(self, query: Mapping[str, str]) -> str | None:
        """As people write it, drop-no-backend, or as the program does."""
        asked = query.get("reason")
        if not asked:
            return None
        reason = asked.upper().replace("-", "_")
        known = names(self.node.datapath.btf, "reason", "REASON_").__members__
        drops = [name for name in known if name.startswith("DROP_")]
        if reason not in drops:
            shown = ", ".join(n.lower().replace("_", "-") for n in drops)
            raise _refused(f"{asked[:40]} is no reason to drop", f"reasons: {shown}")
        return reason


def _refused(what: str, why: str) -> Refused:
    return Refused(400, ShuntError(what, why, "correct the request"))
