# SPDX-License-Identifier: Apache-2.0
"""One node: brings the maps to what the configuration, health and the operator want.

Runs on one event loop. Every change ends in `reconcile`: compile, plan, apply. What cannot be
applied as a whole is refused, and what is in force stays.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from shunt.agent import streams
from shunt.agent.apply import Applier
from shunt.agent.batches import BATCH, FIRST, in_batches
from shunt.agent.checks import Checks, Key
from shunt.agent.closing import Closing
from shunt.agent.echo import Echo, answers, decides
from shunt.agent.fixed import check_change
from shunt.agent.flush import flush
from shunt.agent.nexthops import NextHop, NextHops
from shunt.agent.observing import Observing
from shunt.agent.own_addresses import OwnAddresses
from shunt.agent.plan import Planner
from shunt.agent.reach import PARTICULAR, unfit
from shunt.agent.scan import Scanner
from shunt.agent.socket_upkeep import SocketUpkeep
from shunt.agent.tables import Tables
from shunt.agent.translating import Translating, is_at_tc
from shunt.agent.upkeep import Upkeep
from shunt.agent.wiring import Wiring
from shunt.agent.wishes import Counts, Wish, recall
from shunt.agent.writes import ClearBackend
from shunt.kern.rcu import synchronize
from shunt.lb.compile import Condition, Endpoint, Target, differing, target_name, targets
from shunt.lb.errors import ShuntError
from shunt.lb.lookup import find_service
from shunt.lb.model import Configuration, IPAddress, Mode, Protocol, Service, Settings
from shunt.sockops.attach import Sockets
from shunt.sockops.streams import Streams
from shunt.xdp.attach import Datapath

log = logging.getLogger("shunt")

_UP, _DOWN = Condition(), Condition(up=False)


class Node:
    """Everything between a checked configuration and the maps."""

    def __init__(self, bpffs: Path, state: Path) -> None:
        self.datapath = Datapath(bpffs)
        self.sockets, self.streams = Sockets(bpffs), Streams(bpffs)
        self.configuration: Configuration | None = None
        self.generation = 0
        self.errors: list[str] = []  # of the newest configuration, if it was refused
        self.origins: dict[str, str] = {}  # service: "FILE:LINE", or "api"
        self.aside: dict[str, list[str]] = {}  # services of the API that are not in force, and why
        self.checks = Checks(self._turned, state)
        self.health = self.checks.health
        self.wishes: dict[Key, Wish] = {}
        self.counts = Counts()
        self.observing = Observing()
        self.closing = Closing(self.sockets, self.observing.troubles)
        self.socket_upkeep = SocketUpkeep(self.sockets, self.closing, self.observing.troubles)
        self.want: dict[str, Target] = {}
        self.on_change: Callable[[Iterable[str] | None], None] = lambda _targets: None
        self._gone: set[tuple[str, Endpoint]] = set()
        self.services: dict[str, Service] = {}  # by name; with this host's addresses in them
        self._particular: dict[str, Mode] = {}  # those that do not do with every next hop
        self._unsure = False  # whether what is in force is the configuration before, as a whole

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
        self.echo = Echo(self.datapath.maps["echo"])
        self.own = OwnAddresses(self._addresses_changed, self.observing.troubles)
        self.nexthops = NextHops(self._hops_changed, macs_changed=lambda: self.upkeep.wire(()))
        self.translating = Translating(self.datapath, self.tables, self.own)
        self.upkeep = Upkeep(
            self.tables, self.checks, self.nexthops, self.wiring, self.observing.troubles
        )
        self.prober = self.checks.prober
        self.generation = int(self.tables.meta["generation"][0])
        self.wishes.update(recall(self.tables, self.checks, configuration.services))
        self.configure(configuration)
        self.nexthops.start()
        self.own.start()

    def configure(self, configuration: Configuration) -> None:
        """Put a new configuration in force.

        Raises: ShuntError if it cannot be; the one before stays in force.
        """
        for _ in self.configuring(configuration):
            pass

    def configuring(self, configuration: Configuration) -> Iterator[None]:
        """The same, with pauses in which others on the event loop may have a turn.

        Until the last one some services are as before. To be gone through before another begins.

        Raises: as `configure`.
        """
        before = self.configuration
        if before is not None:
            check_change(before.settings, configuration.settings)
        try:
            yield from self._put(configuration)
        except ShuntError:
            if before is not None:
                for _ in self._put(before):
                    pass
            self.configuration = before
            raise
        self.generation += 1
        self.tables.meta["generation"][0] = self.generation
        self.errors = []

    def _put(self, configuration: Configuration) -> Iterator[None]:
        before, self.configuration = self.configuration, configuration
        services_before, self.services = self.services, self.own.resolved(configuration.services)
        self._particular = {n: s.mode for n, s in self.services.items() if s.mode in PARTICULAR}
        settings = configuration.settings
        changed = before is None or before.settings != settings
        if before is not None and changed:
            self.datapath.load(settings)
        self.translating.leave_out(settings, self.services.values())
        self.translating.prepare(configuration, anew=changed)
        names: set[str] | None = None
        alike = before is not None and decides(before.settings) == decides(settings)
        if alike and not self._unsure:
            names = differing(services_before.values(), self.services.values())
        size = BATCH
        if before is None and self.services and self._is_fresh():
            names, size = set(self.services), FIRST
        self._unsure = True  # until all of it is in force: after an error everything is looked at
        for some in (
            [None] if names is None else in_batches(self.tables, self.services, names, size)
        ):
            self.upkeep.watch(self.services, some, stack=settings.handover == "device")
            self.upkeep.wire(None if some is None else ())
            self.reconcile(some and [target_name(name, p) for name in some for p in Protocol])
            if not changed:  # a program that was loaded is attached before anything else happens
                yield
        self._unsure = False
        self.upkeep.detour.follow(configuration)
        self.translating.settle(configuration)
        if changed:
            self._attach(settings)
        self.socket_upkeep.reserve(self.services)
        streams.redirect(self, anew=changed)

    def _attach(self, settings: Settings) -> None:
        self.datapath.attach(settings.interfaces, settings.xdp_mode)
        self.socket_upkeep.follow(settings, self.datapath.maps)

    def _is_fresh(self) -> bool:
        """Whether the maps are as they were made: there is nothing to compare with."""
        t = self.tables
        return not (t.placed or t.stale_frontends or t.source_sets.there or self.echo.there)

    def swap_programs(self) -> None:
        """Load the program anew from its file, on the same maps, and swap every interface to it.

        Raises: ShuntError; the program before goes on.
        """
        assert self.configuration is not None
        self.datapath.load(self.configuration.settings)
        self.translating.prepare(self.configuration, anew=True)
        self._attach(self.configuration.settings)
        self.socket_upkeep.reserve(self.services)
        streams.redirect(self, anew=True)

    # Deciding --------------------------------------------------------------------------------

    def condition(self, name: str, endpoint: Endpoint) -> Condition:
        """What is known of a target's backend beyond its configuration."""
        up = self.obstacle(name, endpoint) is None
        if not self.wishes and not len(self.health):  # the case of many backends
            return _UP if up else _DOWN
        key = name.rpartition("/")[0], endpoint
        wish = self.wishes.get(key, Wish())
        up = up and self.checks.is_up(key)
        return Condition(up, wish.drained, wish.weight, self.checks.tenths(key))

    def _counts(self, key: Key) -> bool:
        """Whether a backend's health matters to its service's: it could get new flows."""
        return (
            not self.wishes.get(key, Wish()).drained and self.obstacle(f"{key[0]}/", key[1]) is None
        )

    def obstacle(self, name: str, endpoint: Endpoint) -> ShuntError | None:
        """Why no packet can be sent to a backend at all, health aside."""
        if self.nexthops.complete and not self._particular:
            return None
        hop = self.nexthops.get(endpoint.address)
        if hop is None:
            return None
        owner = name.rpartition("/")[0]
        if isinstance(hop, NextHop):
            return unfit(self._particular.get(owner), endpoint.address, hop)
        service = self.services.get(owner)
        return None if service and service.mode is Mode.LOCAL else hop  # the stack knows the way

    def reconcile(self, only: Iterable[str] | None = None) -> int:
        """Compile, plan, apply: all targets, or those of `only`. Returns how many writes it took.

        Raises: ShuntError if a table is full; nothing has changed then.
        """
        began = time.monotonic()
        names = None if only is None else set(only)
        if names is None:
            self.checks.judge(self.services.values(), self._counts)
            want = targets(self.services.values(), self.condition)
        else:
            owners = {name.rpartition("/")[0] for name in names}
            some = [self.services[name] for name in owners if name in self.services]
            self.checks.judge(some, self._counts)
            want = targets(some, self.condition)
        writes = self.planner.plan(
            want,
            time.monotonic_ns(),
            self.condition,
            names,
            gone=lambda name, endpoint: (name, endpoint) in self._gone,
        )
        self.applier.apply(writes)
        if names is None:
            self.want = want
        else:
            for name in names - want.keys():
                self.want.pop(name, None)
            self.want.update((name, want[name]) for name in names & want.keys())
        self.echo.update(names, self.want, self.tables.placed, self._answers_echo, self._is_at_tc)
        self._gone.clear()
        self.closing.follow(writes)
        if cleared := [write for write in writes if isinstance(write, ClearBackend)]:
            self.upkeep.forget(cleared)
        self.counts.writes += len(writes)
        if writes:
            self.counts.apply_s = time.monotonic() - began
            self.observing.apply_s.observe(self.counts.apply_s)
        self.on_change(names)
        return len(writes)

    def _targets_of(self, *services: str) -> list[str]:
        """Their targets, wanted or still in the maps."""
        names = [target_name(service, p) for service in services for p in Protocol]
        return [n for n in names if n in self.want or n in self.tables.placed]

    def _answers_echo(self, service: str, vip: IPAddress) -> bool | None:
        assert self.configuration is not None
        return answers(self.services[service], vip, self.configuration.settings.echo)

    def _is_at_tc(self, target: Target) -> bool:
        assert self.configuration is not None
        off = self.configuration.settings.xdp_mode == "off"
        return is_at_tc(target.mode, (target.protocol,), off)

    # Events ----------------------------------------------------------------------------------

    def _hops_changed(self, addresses: list[IPAddress]) -> None:
        self.upkeep.wire(addresses)
        t = self.tables
        svcs = np.unique(t.backends["svc"][t.at(addresses)]).tolist()
        touched = {name for name in map(t.name_of, svcs) if name in self.want}
        owners = {name.rpartition("/")[0] for name in touched}
        services = [self.services[name] for name in owners if name in self.services]
        panicking = self.checks.judge(services, self._counts)
        only = {
            name
            for name in touched
            if name.rpartition("/")[0] in panicking
            or any(
                member.up != self.condition(name, member.endpoint).up
                for member in self.want[name].members
            )
        }
        if only:
            self.try_reconcile(only)

    def _addresses_changed(self) -> None:
        assert self.configuration is not None
        self.translating.follow(self.configuration)
        before, self.services = self.services, self.own.resolved(self.configuration.services)
        if names := differing(before.values(), self.services.values()):
            self._unsure |= not self.try_reconcile(self._targets_of(*names))
            self.socket_upkeep.reserve(self.services)

    def try_reconcile(self, only: Iterable[str]) -> bool:
        """Reconcile where nobody waits for an answer: a full table is logged, and False."""
        try:
            self.reconcile(only)
        except ShuntError as e:
            self.counts.refused += 1
            log.error("%s", e)
            return False
        return True

    def _turned(self, service: str, gone: Endpoint | None) -> None:
        """A backend's health or its share of its weight changed."""
        names = self._targets_of(service)
        if gone is not None:
            self._gone |= {(name, gone) for name in names}
        self.try_reconcile(names)

    def after_scan(self) -> None:
        """Shrink what has settled; clear removed backends that nothing names any more; and see who
        uses nat's ports by now.
        """
        t = self.tables
        if self.configuration is not None:
            self.translating.look_again(self.configuration.settings, self.services.values())
        only = {
            name
            for name, place in t.placed.items()
            if name in self.want and place.log2 > self.want[name].log2
        }
        for name in self.scanner.removed():
            place = t.placed[name]
            for i in self.scanner.unreferenced(place):
                endpoint = next(e for e, n in place.backends.items() if n == i)
                self._gone.add((name, endpoint))
                only.add(name)
        if only:
            self.try_reconcile(only)

    # The operator ----------------------------------------------------------------------------

    def wish(
        self,
        service: str,
        endpoint: Endpoint,
        *,
        drained: bool | None = None,
        weight: int | None = None,
    ) -> None:
        """Drain, undrain, or give a backend another weight (0: as configured), at once.

        Raises: ShuntError if a table is full; nothing has changed then.
        """
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
        return await flush(t, svcs)

    async def close(self) -> None:
        """Stop watching; what is in the maps stays in force."""
        self.checks.close()
        await self.nexthops.close()
        self.own.close()
        self.observing.close()
        self.upkeep.close()
        await self.socket_upkeep.close()
        self.streams.close()
        self.sockets.close()
        self.translating.close()
        self.datapath.close()
