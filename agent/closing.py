# SPDX-License-Identifier: Apache-2.0
"""Sockets of this host whose backends have gone are closed, so that their processes connect again.

The kernel's programs decide which (sockops/stale.py); here is decided when: after a backend went,
once the tables say so, and when shuntd starts.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from shunt.agent.events import Event, about
from shunt.agent.troubles import Troubles
from shunt.agent.writes import ClearBackend, SetBackend, Write
from shunt.kern.maps import Map
from shunt.kern.objects import Program
from shunt.lb.errors import ShuntError
from shunt.lb.model import Protocol, Settings
from shunt.sockops.attach import Sockets
from shunt.sockops.stale import Method, Stale, Swept, barred, method, refusal

log = logging.getLogger("shunt")

# Between a call's look into the tables and its socket's being connected a process may have to wait
# for a processor: after so long another sweep finds what was chosen before the change.
AGAIN_S = 1.0
# Sweeps take at most this share of the time, however often backends go.
SHARE = 0.1
WHAT = "connections to backends that have gone are not closed"

T = TypeVar("T")


@dataclass
class _Wanted:
    """What the next sweep is to be loaded with. Owns its maps, which others close meanwhile."""

    maps: dict[str, Map]
    tcp: bool

    def close(self) -> None:
        for each in self.maps.values():
            each.close()


class Closing:
    """Sweeps, one at a time, each in a thread of its own: it goes into other network namespaces."""

    def __init__(self, sockets: Sockets, troubles: Troubles) -> None:
        self.sockets, self._troubles = sockets, troubles
        self.which = "off"  # as the settings have it; off without programs at sockets, too
        self.closed: Counter[Protocol] = Counter()  # since shuntd started
        self.sweeps = 0
        self.last: Swept | None = None
        self.elsewhere = False  # whether those of other network namespaces are to be, too
        self._barred: ShuntError | None = None
        self._told = False
        self._stale: Stale | None = None
        self._anew: _Wanted | None = None
        self._due, self._ended = asyncio.Event(), asyncio.Event()
        self._again: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def by(self) -> Method | None:
        """How; None before the first sweep, or if there is no way."""
        return self._stale.by if self._stale else None

    @property
    def barred(self) -> ShuntError | None:
        """What keeps this process from other network namespaces, if it is to go there."""
        return self._barred if self.elsewhere else None

    @property
    def programs(self) -> list[Program]:
        """Those that are loaded."""
        return self._stale.programs if self._stale else []

    def follow_settings(self, settings: Settings, maps: Mapping[str, Map]) -> None:
        """Sweep by the socket programs that are in force now."""
        own = self.sockets.maps
        self.which = settings.sockets_close if own else "off"
        self.elsewhere = self.which != "off" and settings.sockets == "all"
        if self._anew:
            self._anew.close()
        used = {} if self.which == "off" else {**maps, **own}
        held = {name: Map(os.dup(each.fd), each.spec) for name, each in used.items()}
        self._anew = _Wanted(held, tcp=self.which == "all")
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._sweeping())
            self._task.add_done_callback(_tell)
        self._due.set()

    def follow(self, writes: Sequence[Write]) -> None:
        """To be called when these are in force."""
        if self.which == "off" or not any(isinstance(w, ClearBackend | SetBackend) for w in writes):
            return
        self._due.set()
        if self._again is not None:
            self._again.cancel()
        self._again = asyncio.get_running_loop().call_later(AGAIN_S, self._due.set)

    async def _sweeping(self) -> None:
        pause_s = 0.0
        while not self._ended.is_set():
            await self._due.wait()
            self._due.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), pause_s)
                break
            trouble: ShuntError | None = None
            try:
                await self._load()
                if self._stale is not None:
                    swept = await _in_thread(self._stale.sweep, self._goes_on)
                    pause_s = swept.took_s * (1 / SHARE - 1)
                    self._note(swept)
                    trouble = refusal(swept, self._barred) if swept.left else None
            except ShuntError as e:
                trouble = e
            except OSError as e:
                trouble = ShuntError(WHAT, str(e), "see `shunt doctor` for what this kernel lacks")
            self._troubles.tell("closing", trouble)

    def _goes_on(self) -> bool:
        return not self._ended.is_set()

    async def _load(self) -> None:
        """Follow what `follow_settings` said last."""
        if self._anew is None:
            return
        anew, self._anew = self._anew, None
        before, self._stale = self._stale, None
        if before is not None:
            before.close()
        try:
            if anew.maps:
                self._stale, self._barred = await _in_thread(_load, anew)
                if self.barred and not self._told:
                    log.warning("%s", self.barred)
                self._told = self.barred is not None
        finally:
            anew.close()

    def _note(self, swept: Swept) -> None:
        self.sweeps += 1
        self.last = swept
        self.closed += swept.closed
        if swept.closed.total():
            counts = {p.name: swept.closed[p] for p in (Protocol.UDP, Protocol.TCP)}
            log.info(
                "closed connections to backends that have gone: %s"
                " (%s; network namespaces: %d; %.1f ms)",
                ", ".join(f"{number} {name}" for name, number in counts.items() if number),
                self.by,
                swept.namespaces,
                swept.took_s * 1000,
                extra=about(Event.SOCKETS_CLOSED, **counts, left=swept.left),
            )

    async def close(self) -> None:
        """After the sweep that is under way, which ends early."""
        if self._again is not None:
            self._again.cancel()
        self._ended.set()
        self._due.set()
        if self._task is not None:
            await asyncio.wait([self._task])
        if self._anew is not None:
            self._anew.close()
        if self._stale is not None:
            self._stale.close()
            self._stale = None


def _tell(task: asyncio.Task[None]) -> None:
    """A defect of ours; all else goes on."""
    if not task.cancelled() and (error := task.exception()):
        log.error("%s any more", WHAT, exc_info=error)


def _load(wanted: _Wanted) -> tuple[Stale, ShuntError | None]:
    return Stale(wanted.maps, method(), tcp=wanted.tcp), barred()


async def _in_thread(work: Callable[..., T], *arguments: object) -> T:
    """In a thread that ends with it: one that could not get back would be in the way of others."""
    pool = ThreadPoolExecutor(1, "shunt-closing")
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, work, *arguments)
    finally:
        pool.shutdown(wait=False)
