# SPDX-License-Identifier: Apache-2.0
"""The health of all backends of a node: what is checked, what was found, and what follows."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from shunt.agent.events import turned
from shunt.agent.probes.attempt import Target
from shunt.agent.probes.schedule import Prober, Ways
from shunt.agent.starts import Key, Starts
from shunt.lb.compile import Endpoint
from shunt.lb.health import Health, Result, Rules, Turn
from shunt.lb.model import Protocol, Service
from shunt.lb.standing import STEPS, Panic, SlowStarts, panic

log = logging.getLogger("shunt")

__all__ = ["Checks", "Key", "probe", "rules"]

DATAGRAMS = ("dns", "udp")


class Checks:
    """Checks backends and keeps what is known of them.

    `turned` is called when a service's targets are to be made again; its second argument is a
    backend that is gone. `trouble` is the prober's.
    """

    def __init__(self, turned: Callable[[str, Endpoint | None], None], state: Path) -> None:
        """`state` is the directory for what a later process is to know."""
        self._turned = turned
        self.health: Health[Key] = Health()
        self.slow: SlowStarts[Key] = SlowStarts()
        self.starts = Starts(state, self.slow.begun)
        self.panic: dict[str, Panic] = {}
        self._services: Mapping[str, Service] = {}
        self._known: set[str] = set()  # services that were in force before
        self._steps: dict[Key, asyncio.TimerHandle] = {}
        self._calming: dict[str, asyncio.TimerHandle | None] = {}  # None: for long enough

    def start(self, trouble: Callable[[Key], str], ways: Ways[Key]) -> None:
        """Begin, on the running event loop."""
        self.prober: Prober[Key] = Prober(self._probed, trouble, ways)

    def close(self) -> None:
        """Check nothing more."""
        self.prober.close()
        self.starts.close()
        for step in self._steps.values():
            step.cancel()
        self._steps.clear()
        for name in list(self._calming):
            self._stay(name)

    def recall(self, service: Service, endpoint: Endpoint, up: bool, began_s: float | None) -> None:
        """What a predecessor knew: was it up, and when did its slow start begin, if it did."""
        if not service.health:
            return
        key = service.name, endpoint
        self.health.watch(key, rules(service), time.monotonic(), up)
        if up and began_s is not None:
            self._begin_slowly(key, service.health.slow_start_s, began_s)

    def watch(
        self,
        services: Mapping[str, Service],
        names: Collection[str] | None,
        placed: Iterable[Key],
    ) -> None:
        """Check the backends of these services, and those in `placed` that were removed.

        Of all services if no `names` are given; `placed` are theirs.
        """
        now_s, placed = time.monotonic(), list(placed)
        self._services = services
        probes: dict[Key, Target] = {}
        for name in services if names is None else names:
            service = services.get(name)
            for backend in service.backends if service is not None and service.health else ():
                assert service is not None
                key = name, Endpoint(backend.address, backend.port)
                added = name in self._known and self.health.state(key) is None
                self.health.watch(key, rules(service), now_s)
                probes[key] = probe(service, key[1])
                if added:
                    self._begin_slowly(key, self._slow_start_s(name), now_s)
        for key in placed:
            owner = services.get(key[0])
            if key not in probes and owner is not None and owner.health:
                self.health.remove(key)
                probes[key] = probe(owner, key[1])
        gone = [key for key in (self.health if names is None else placed) if key not in probes]
        for key in gone:
            self.health.forget(key)
            self._end_slowly(key)
        for key in [k for k in self._steps if not self._slow_start_s(k[0])]:
            self._end_slowly(key)
        for name in self.panic.keys() - services.keys():
            del self.panic[name]
            self._stay(name)
        self._known.update(services if names is None else names)
        self._known.intersection_update(services)
        if names is None:
            self.prober.set_targets(probes)
        else:
            self.prober.change(probes, gone)

    def forget(self, key: Key) -> None:
        """Nothing stands for this backend any more."""
        self.health.forget(key)
        self._end_slowly(key)
        self.prober.change({}, [key])

    def judge(self, services: Iterable[Service], counts: Callable[[Key], bool]) -> set[str]:
        """See which of these services are in panic; the names of those that changed.

        Backends that `counts` refuses are left out: drained ones, say, get nothing new anyway.
        """
        changed: set[str] = set()
        # Almost always all backends of almost all services are well.
        failing = {name for name, _ in self.health.down} | self.panic.keys()
        for service in services:
            if service.name not in failing:
                continue
            ups = self._ups(service, counts)
            found = panic(ups, service.health.panic_threshold) if service.health else None
            before = self.panic.get(service.name)
            if found is None and before is not None and not self._calms(service, ups):
                found = Panic(sum(ups), len(ups))
            elif found is not None:
                self._stay(service.name)
            if found is not None:
                self.panic[service.name] = found
            else:
                self.panic.pop(service.name, None)
            if (found is None) == (before is None):
                continue
            changed.add(service.name)
            if found is not None:
                log.warning(
                    "service %s panics: %d of %d backends are up; all are treated as up",
                    service.name,
                    found.up,
                    found.backends,
                )
            else:
                log.info("service %s panics no more", service.name)
        return changed

    def _ups(self, service: Service, counts: Callable[[Key], bool]) -> list[bool]:
        """Which of the backends that count are up."""
        keys = [(service.name, Endpoint(b.address, b.port)) for b in service.backends]
        return [self.health.is_up(key) for key in keys if counts(key)]

    def _calms(self, service: Service, ups: Sequence[bool]) -> bool:
        """Whether a panic ends for which there is no reason any more.

        Not before all backends had time to show that they are well: the connections of those
        whose turn comes later would be lost to the first one that is up.
        """
        name, check = service.name, service.health
        if check is None or not check.panic_threshold or all(ups):
            self._stay(name)
            return True
        if name not in self._calming:
            wait_s = check.rise * check.interval_s * (1 + check.jitter) + check.timeout_s
            loop = asyncio.get_running_loop()
            self._calming[name] = loop.call_later(wait_s, self._calm, name)
        if self._calming[name] is not None:
            return False
        del self._calming[name]
        return True

    def _calm(self, name: str) -> None:
        self._calming[name] = None
        self._turned(name, None)

    def _stay(self, name: str) -> None:
        """Whether it calms begins anew."""
        timer = self._calming.pop(name, None)
        if timer is not None:
            timer.cancel()

    def is_up(self, key: Key) -> bool:
        """Whether a backend is treated as up, as far as health goes."""
        if self.health.is_up(key):
            return True
        state = self.health.state(key)
        return key[0] in self.panic and state is not None and not state.removed

    def tenths(self, key: Key) -> int:
        """How much of its weight a backend has, of 10."""
        return self.slow.tenths(key, time.monotonic()) if key in self.slow else STEPS

    def _probed(self, key: Key, result: Result) -> None:
        for transition in self.health.result(key, result):
            service, endpoint = transition.key
            turned(service, endpoint, transition.turn, transition.reason)
            self._end_slowly(key)
            if transition.turn is Turn.UP:
                self._begin_slowly(key, self._slow_start_s(service), time.monotonic())
            self._turned(service, endpoint if transition.turn is Turn.GONE else None)

    # Slow start --------------------------------------------------------------------------------

    def _slow_start_s(self, service: str) -> float:
        owner = self._services.get(service)
        return owner.health.slow_start_s if owner is not None and owner.health else 0.0

    def _begin_slowly(self, key: Key, duration_s: float, began_s: float) -> None:
        if duration_s > time.monotonic() - began_s:
            self.slow.begin(key, began_s, duration_s)
            self.starts.changed()
            self._plan_step(key)

    def _plan_step(self, key: Key) -> None:
        wait_s = self.slow.next_s(key, time.monotonic())
        self._steps[key] = asyncio.get_running_loop().call_later(wait_s, self._step, key)

    def _step(self, key: Key) -> None:
        if self.slow.tenths(key, time.monotonic()) < STEPS:
            self._plan_step(key)
        else:
            self._end_slowly(key)
        self._turned(key[0], None)

    def _end_slowly(self, key: Key) -> None:
        if key not in self.slow:
            return
        self.slow.forget(key)
        self.starts.changed()
        step = self._steps.pop(key, None)
        if step is not None:
            step.cancel()


def rules(service: Service) -> Rules:
    """How results turn a backend of this service."""
    check = service.health
    assert check is not None
    return Rules(check.rise, check.fall, service.tcp_idle_s)


def probe(service: Service, endpoint: Endpoint) -> Target:
    """What to check of a backend: at the check's port, its own, or the first one that fits."""
    check = service.health
    assert check is not None
    wanted = Protocol.UDP if check.kind in DATAGRAMS else Protocol.TCP
    fit = [p.port for p in service.ports if p.protocol is wanted and p.port]
    port = check.port or endpoint.port or (fit or [p.port for p in service.ports])[0]
    return Target(
        endpoint.address,
        port,
        check.interval_s,
        check.timeout_s,
        check.jitter,
        check.how,
        service.vips if check.via == "vip" else (),
    )
