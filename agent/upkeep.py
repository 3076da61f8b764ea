# SPDX-License-Identifier: Apache-2.0
"""What each backend needs while it stands in the maps: a next hop kept current, and its checks."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping

from shunt.agent.checks import Checks, Key
from shunt.agent.detour import Detour
from shunt.agent.nexthops import NextHop, NextHops
from shunt.agent.tables import Tables
from shunt.agent.troubles import Troubles
from shunt.agent.wiring import Wiring
from shunt.agent.writes import ClearBackend
from shunt.kern.carrier import Carrier
from shunt.lb.compile import target_name, unmapped
from shunt.lb.errors import ShuntError
from shunt.lb.model import IPAddress, Mode, Protocol, Service

log = logging.getLogger("shunt")


class Upkeep:
    """Has those looked after that are to be, and no others. What is asked is what has changed."""

    def __init__(
        self,
        tables: Tables,
        checks: Checks,
        nexthops: NextHops,
        wiring: Wiring,
        troubles: Troubles,
    ) -> None:
        self.tables, self.checks = tables, checks
        self.nexthops, self.wiring = nexthops, wiring
        self._carrier = Carrier()
        self.detour = Detour(tables, nexthops, troubles)
        checks.start(self.trouble, self.detour.ways)

    def trouble(self, key: Key) -> str:
        """What on this host is between it and a backend, and nothing that the backend can help."""
        hop = self.nexthops.get(key[1].address)
        if isinstance(hop, NextHop):
            return "" if self._carrier.present(hop.device) else "no-carrier"
        state = self.checks.health.state(key)
        removed = state is not None and state.removed  # when it is gone must be found out
        return "no-route" if isinstance(hop, ShuntError) and not removed else ""

    def close(self) -> None:
        self._carrier.close()
        self.detour.close()

    def watch(
        self, services: Mapping[str, Service], names: Collection[str] | None, *, stack: bool
    ) -> None:
        """Next hops and health checks of the services' backends, those removed among them.

        Of all services if no `names` are given. `stack`: it alone sends to what is of mode local.
        """
        where = self.tables.placed
        placed = [
            (target.rpartition("/")[0], endpoint)
            for target in (where if names is None else self._placed(*names))
            for endpoint in where[target].backends
        ]
        local = {n for n, service in services.items() if stack and service.mode is Mode.LOCAL}
        addresses: set[IPAddress] = {e.address for name, e in placed if name not in local}
        for name in services if names is None else names:
            if name in services and name not in local:
                addresses.update(backend.address for backend in services[name].backends)
        self.checks.watch(services, names, placed)
        if names is None:
            self.nexthops.want(addresses)
        else:
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
                self.checks.forget((service, write.endpoint))
        addresses = {write.endpoint.address for write in cleared}
        held = self.tables.backends["addr"][self.tables.at(addresses)]
        self.nexthops.change((), addresses - {unmapped(raw.tobytes()) for raw in held})
        self.wire(())

    def _placed(self, *services: str) -> list[str]:
        names = [target_name(service, p) for service in services for p in Protocol]
        return [name for name in names if name in self.tables.placed]
