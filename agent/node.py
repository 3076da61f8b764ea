# SPDX-License-Identifier: Apache-2.0
"""One node: brings the maps to what the configuration, health and the operator want.

Runs on one event loop. Every change ends in `reconcile`: compile, plan, apply. What cannot be
applied as a whole is refused, and what is in force stays.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shunt.agent.apply import Applier, sync_ports
from shunt.agent.events import turned
from shunt.agent.nexthops import NextHop, NextHops, refuse_gateway
from shunt.agent.observing import Observing
from shunt.agent.plan import Planner
from shunt.agent.probe import Prober
from shunt.agent.probe import Target as ProbeTarget
from shunt.agent.scan import Scanner
from shunt.agent.tables import Tables
from shunt.agent.wiring import Wiring
from shunt.kern.flows import backends
from shunt.kern.rcu import synchronize
from shunt.lb.compile import Condition, Endpoint, Target, targets
from shunt.lb.errors import ShuntError
from shunt.lb.health import Health, Result, Rules, Turn
from shunt.lb.lookup import find_backend, find_service
from shunt.lb.model import Configuration, IPAddress, Mode, Protocol, Service
from shunt.xdp.attach import Datapath

log = logging.getLogger("shunt")

Key = tuple[str, Endpoint]  # service name, endpoint
WEIGHT_MAX = 65535


@dataclass
class Wish:
    """What the operator asked for at run time."""

    drained: bool = False
    weight: int = 0  # 0: as configured


@dataclass
class Counts:
    """Of this process."""

    reloads: int = 0
    refused: int = 0
    writes: int = 0
    apply_s: float = 0.0  # of the last one
    started_s: float = field(default_factory=time.monotonic)


class Node:
    """Everything between a checked configuration and the maps."""

    def __init__(self, bpffs: Path) -> None:
        self.datapath = Datapath(bpffs)
        self.configuration: Configuration | None = None
        self.generation = 0
        self.errors: list[str] = []  # of the newest configuration, if it was refused
        self.origins: dict[str, str] = {}  # service: "FILE:LINE", or "api"
        self.aside: dict[str, list[str]] = {}  # services of the API that are not in force, and why
        self.health: Health[Key] = Health()
        self.wishes: dict[Key, Wish] = {}
        self.counts = Counts()
        self.observing = Observing()
        self.want: dict[str, Target] = {}
        self.on_change: Callable[[Iterable[str] | None], None] = lambda _targets: None
        self._gone: set[tuple[str, Endpoint]] = set()
        self._modes: dict[str, Mode] = {}  # by service

    def start(self, configuration: Configuration) -> None:
        """Load, read back what is in force, and bring it to `configuration`; then attach.

        Raises: ShuntError. What forwarded before goes on as it was.
        """
        self.datapath.load(configuration.settings)
        self.tables = Tables(self.datapath.maps, self.datapath.btf, time.monotonic_ns())
        self.wiring = Wiring(self.tables, synchronize)
        self.planner = Planner(self.tables)
        self.applier = Applier(self.tables, time.monotonic_ns, self.wiring.index_of)
        self.scanner = Scanner(self.tables)
        self.nexthops = NextHops(self._hops_changed)
        self.prober: Prober[Key] = Prober(self._probed)
        self.generation = int(self.tables.meta["generation"][0])
        self._recall(configuration)
        self.configure(configuration)
        self.nexthops.start()

    def _recall(self, configuration: Configuration) -> None:
        """What a predecessor knew of each backend: failing, drained, its weight."""
        flag, now_s = self.tables.flag, time.monotonic()
        services = {s.name: s for s in configuration.services}
        for name, place in self.tables.placed.items():
            service = name.rpartition("/")[0]
            for endpoint, i in place.backends.items():
                flags = int(self.tables.backends["flags"][i])
                key = service, endpoint
                weight = int(self.tables.backends["weight"][i])
                if flags & flag.drained or weight:
                    self.wishes[key] = Wish(bool(flags & flag.drained), weight)
                if service in services and services[service].health:
                    self.health.watch(key, _rules(services[service]), now_s, bool(flags & flag.up))

    def configure(self, configuration: Configuration) -> None:
        """Put a new configuration in force.

        Raises: ShuntError if it cannot be; the one before stays in force.
        """
        before = self.configuration
        if before is not None:
            self._check_change(before, configuration)
        try:
            self._put(configuration)
        except ShuntError:
            if before is not None:
                self._put(before)
            self.configuration = before
            raise
        self.generation += 1
        self.tables.meta["generation"][0] = self.generation
        self.errors = []

    def _put(self, configuration: Configuration) -> None:
        before, self.configuration = self.configuration, configuration
        self._modes = {service.name: service.mode for service in configuration.services}
        settings = configuration.settings
        changed = before is None or before.settings != settings
        if before is not None and changed:
            self.datapath.load(settings)
        self._watch(configuration)
        self.reconcile()
        uses_nat = any(s.mode is Mode.NAT for s in configuration.services)
        last = settings.nat_port_max if uses_nat else settings.nat_port_min - 1
        sync_ports(self.tables, range(settings.nat_port_min, last + 1))
        if changed:
            self.datapath.attach(settings.interfaces, settings.xdp_mode)

    def _check_change(self, before: Configuration, after: Configuration) -> None:
        for name in ("limits", "hash_seed", "xdp_mode"):
            old, new = getattr(before.settings, name), getattr(after.settings, name)
            if old != new:
                raise ShuntError(
                    f"{name} can't change while shuntd runs",
                    f"it is {old}, and the file now says {new}",
                    "restart shuntd for it (packets go on meanwhile), or put it back",
                )

    def swap_programs(self) -> None:
        """Load the program anew from its file, on the same maps, and swap every interface to it.

        Raises: ShuntError; the program before goes on.
        """
        assert self.configuration is not None
        settings = self.configuration.settings
        self.datapath.load(settings)
        self.datapath.attach(settings.interfaces, settings.xdp_mode)

    # Deciding --------------------------------------------------------------------------------

    def condition(self, name: str, endpoint: Endpoint) -> Condition:
        """What is known of a target's backend beyond its configuration."""
        key = name.rpartition("/")[0], endpoint
        wish = self.wishes.get(key, Wish())
        up = self.health.is_up(key) and self.obstacle(name, endpoint) is None
        return Condition(up, wish.drained, wish.weight)

    def obstacle(self, name: str, endpoint: Endpoint) -> ShuntError | None:
        """Why no packet can be sent to a backend at all, health aside."""
        hop = self.nexthops.get(endpoint.address)
        if isinstance(hop, ShuntError):
            return hop
        if isinstance(hop, NextHop) and self._modes.get(name.rpartition("/")[0]) is Mode.DSR_L2:
            return refuse_gateway(endpoint.address, hop)
        return None

    def _compile(self, configuration: Configuration) -> dict[str, Target]:
        return targets(configuration.services, self.condition)

    def _watch(self, configuration: Configuration) -> None:
        """Next hops and health checks of all backends, those that were removed among them."""
        now_s = time.monotonic()
        probes: dict[Key, ProbeTarget] = {}
        addresses: set[IPAddress] = set()
        for service in configuration.services:
            for backend in service.backends:
                endpoint = Endpoint(backend.address, backend.port)
                addresses.add(endpoint.address)
                if service.health:
                    self.health.watch((service.name, endpoint), _rules(service), now_s)
                    probes[service.name, endpoint] = _probe(service, endpoint)
        services = {s.name: s for s in configuration.services}
        for name, place in self.tables.placed.items():
            service_name = name.rpartition("/")[0]
            for endpoint in place.backends:
                addresses.add(endpoint.address)
                key = service_name, endpoint
                owner = services.get(service_name)
                if key not in probes and owner is not None and owner.health:
                    self.health.remove(key)
                    probes[key] = _probe(owner, endpoint)
        for key in [k for k in self.health if k not in probes]:
            self.health.forget(key)
        self.prober.set_targets(probes)
        self.nexthops.want(addresses)
        self._wire()

    def _wire(self) -> None:
        try:
            self.wiring.sync(self.nexthops.current())
        except ShuntError as e:
            log.warning("%s", e)

    def reconcile(self, only: Iterable[str] | None = None) -> int:
        """Compile, plan, apply: all targets, or those of `only`. Returns how many writes it took.

        Raises: ShuntError if a table is full; nothing has changed then.
        """
        assert self.configuration is not None
        began = time.monotonic()
        if only is None:
            want = self._compile(self.configuration)
        else:
            only = set(only)
            names = {n.rpartition("/")[0] for n in only}
            some = [s for s in self.configuration.services if s.name in names]
            want = {**self.want, **targets(some, self.condition)}
        writes = self.planner.plan(
            want,
            time.monotonic_ns(),
            self.condition,
            only,
            gone=lambda name, endpoint: (name, endpoint) in self._gone,
        )
        self.applier.apply(writes)
        self.want = want
        self._gone.clear()
        self.counts.writes += len(writes)
        if writes:
            self.counts.apply_s = time.monotonic() - began
            self.observing.apply_s.observe(self.counts.apply_s)
        self.on_change(only)
        return len(writes)

    def _targets_of(self, service: str) -> list[str]:
        return [n for n in self.want if n.rpartition("/")[0] == service]

    # Events ----------------------------------------------------------------------------------

    def _hops_changed(self, addresses: list[IPAddress]) -> None:
        self._wire()
        changed = set(addresses)
        only = {
            name
            for name, target in self.want.items()
            for member in target.members
            if member.endpoint.address in changed
            and member.up != self.condition(name, member.endpoint).up
        }
        if only:
            self.try_reconcile(only)

    def try_reconcile(self, only: Iterable[str]) -> None:
        """Reconcile where nobody waits for an answer: a full table is logged."""
        try:
            self.reconcile(only)
        except ShuntError as e:
            self.counts.refused += 1
            log.error("%s", e)

    def _probed(self, key: Key, result: Result) -> None:
        for transition in self.health.result(key, result):
            service, endpoint = transition.key
            turned(service, endpoint, transition.turn, transition.reason)
            names = self._targets_of(service)
            if transition.turn is Turn.GONE:
                self._gone |= {(name, endpoint) for name in names}
            self.try_reconcile(names)

    def after_scan(self) -> None:
        """Shrink what has settled; clear removed backends that nothing names any more."""
        t = self.tables
        only: set[str] = set()
        for name, place in t.placed.items():
            for i in self.scanner.unreferenced(place):
                endpoint = next(e for e, n in place.backends.items() if n == i)
                self._gone.add((name, endpoint))
                only.add(name)
            if name in self.want and place.log2 > self.want[name].log2:
                only.add(name)
        if only:
            self.try_reconcile(only)
            if self.configuration is not None:
                self._watch(self.configuration)

    # The operator ----------------------------------------------------------------------------

    def wish(
        self, service: str, backend: str, *, drained: bool | None = None, weight: int | None = None
    ) -> Endpoint:
        """Drain, undrain, or give a backend another weight (0: as configured), at once.

        Raises: ShuntError if there is no such backend, the weight is out of range, or a table is
                full; nothing has changed then.
        """
        assert self.configuration is not None
        endpoint = find_backend(self.configuration, service, backend)
        if weight is not None and not 0 <= weight <= WEIGHT_MAX:
            raise ShuntError(
                f"weight {weight} of backend {backend}",
                f"a weight is from 1 to {WEIGHT_MAX}; 0 means as configured",
                f"give a weight in that range; to send it no new flows: shunt backend drain"
                f" {service} {backend}",
            )
        key = service, endpoint
        before = self.wishes.get(key, Wish())
        self.wishes[key] = Wish(
            before.drained if drained is None else drained,
            before.weight if weight is None else weight,
        )
        try:
            self.reconcile(self._targets_of(service))
        except ShuntError:
            self.wishes[key] = before
            raise
        return endpoint

    async def flush_flows(self, service: str | None) -> int:
        """Forget remembered flows, of one service or of all; connections on moving slots may break.

        Raises: ShuntError if there is no such service.
        """
        t = self.tables
        svcs: list[int] | None = None
        if service is not None:
            svcs = [t.placed[n].svc for n in self._targets_of(service) if n in t.placed]
            if not svcs:
                assert self.configuration is not None
                find_service(self.configuration, service)
        deleted = 0
        for index, flows in t.flows.batches():
            words = flows["word"]
            ended = np.ones(len(words), np.bool_)
            if svcs is not None:
                ended = np.isin(t.backends["svc"][backends(words)], svcs)
            deleted += int(t.flows.delete(index[ended], words[ended]).sum())
            await asyncio.sleep(0)
        for name in ("nat_fwd", "nat_rev"):
            for keys, values in t.maps[name].batches():
                ended = keys if svcs is None else keys[np.isin(values["svc"], svcs)]
                gone = t.maps[name].delete_many(ended)
                deleted += gone if name != "nat_rev" else 0
                await asyncio.sleep(0)
        return deleted

    async def close(self) -> None:
        """Stop watching; what is in the maps stays in force."""
        self.prober.close()
        await self.nexthops.close()
        self.observing.close()
        self.datapath.close()


def _rules(service: Service) -> Rules:
    check = service.health
    assert check is not None
    return Rules(check.rise, check.fall, service.tcp_idle_s)


def _probe(service: Service, endpoint: Endpoint) -> ProbeTarget:
    check = service.health
    assert check is not None
    tcp = [p.port for p in service.ports if p.protocol is Protocol.TCP and p.port]
    port: Any = check.port or endpoint.port or (tcp or [p.port for p in service.ports])[0]
    return ProbeTarget(endpoint.address, port, check.interval_s, check.timeout_s)
