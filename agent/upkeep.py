# SPDX-License-Identifier: Apache-2.0
"""What each backend needs while it stands in the maps: a next hop kept current, and its checks."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from shunt.agent.nexthops import NextHops
from shunt.agent.probe import Prober
from shunt.agent.probe import Target as ProbeTarget
from shunt.agent.tables import Tables
from shunt.agent.wiring import Wiring
from shunt.agent.writes import ClearBackend
from shunt.lb.compile import Endpoint, target_name, unmapped
from shunt.lb.errors import ShuntError
from shunt.lb.health import Health, Rules
from shunt.lb.model import IPAddress, Protocol, Service

log = logging.getLogger("shunt")

Key = tuple[str, Endpoint]  # service name, endpoint


class Upkeep:
    """Has those looked after that are to be, and no others. What is asked is what has changed."""

    def __init__(
        self,
        tables: Tables,
        health: Health[Key],
        prober: Prober[Key],
        nexthops: NextHops,
        wiring: Wiring,
    ) -> None:
        self.tables, self.health, self.prober = tables, health, prober
        self.nexthops, self.wiring = nexthops, wiring

    def watch(self, services: Mapping[str, Service], names: Collection[str] | None) -> None:
        """Next hops and health checks of the services' backends, those removed among them.

        Of all services if no `names` are given.
        """
        now_s, where = time.monotonic(), self.tables.placed
        probes: dict[Key, ProbeTarget] = {}
        addresses: set[IPAddress] = set()
        for name in services if names is None else names:
            service = services.get(name)
            for backend in service.backends if service is not None else ():
                addresses.add(backend.address)
                if service is not None and service.health:
                    endpoint = Endpoint(backend.address, backend.port)
                    self.health.watch((name, endpoint), rules_of(service), now_s)
                    probes[name, endpoint] = _probe(service, endpoint)
        placed = [
            (target.rpartition("/")[0], endpoint)
            for target in (where if names is None else self._placed(*names))
            for endpoint in where[target].backends
        ]
        for key in placed:
            addresses.add(key[1].address)
            owner = services.get(key[0])
            if key not in probes and owner is not None and owner.health:
                self.health.remove(key)
                probes[key] = _probe(owner, key[1])
        gone = [key for key in (self.health if names is None else placed) if key not in probes]
        for key in gone:
            self.health.forget(key)
        if names is None:
            self.prober.set_targets(probes)
            self.nexthops.want(addresses)
        else:
            self.prober.change(probes, gone)
            self.nexthops.change(addresses, ())

    def wire(self, changed: Iterable[IPAddress] | None = None) -> None:
        try:
            self.wiring.sync(self.nexthops.current(), changed)
        except ShuntError as e:
            log.warning("%s", e)

    def forget(self, cleared: Collection[ClearBackend]) -> None:
        """Nothing stands for these backends any more: no check and no next hop is for them."""
        where = self.tables.placed
        for write in cleared:
            service = write.name.rpartition("/")[0]
            if not any(write.endpoint in where[n].backends for n in self._placed(service)):
                self.health.forget((service, write.endpoint))
                self.prober.change({}, [(service, write.endpoint)])
        addresses = {write.endpoint.address for write in cleared}
        held = self.tables.backends["addr"][self.tables.at(addresses)]
        self.nexthops.change((), addresses - {unmapped(raw.tobytes()) for raw in held})
        self.wire(())

    def _placed(self, *services: str) -> list[str]:
        names = [target_name(service, p) for service in services for p in Protocol]
        return [name for name in names if name in self.tables.placed]


def rules_of(service: Service) -> Rules:
    """How the results of a service's checks are judged."""
    check = service.health
    assert check is not None
    return Rules(check.rise, check.fall, service.tcp_idle_s)


def _probe(service: Service, endpoint: Endpoint) -> ProbeTarget:
    check = service.health
    assert check is not None
    tcp = [p.port for p in service.ports if p.protocol is Protocol.TCP and p.port]
    port: Any = check.port or endpoint.port or (tcp or [p.port for p in service.ports])[0]
    return ProbeTarget(endpoint.address, port, check.interval_s, check.timeout_s)
