# SPDX-License-Identifier: Apache-2.0
"""What changes of services and backends, told as it happens: GET /v1/watch.

Every change has a revision, one above the last; they begin at the time of the start in
microseconds, so that those of a daemon before never look like this one's. Who comes back with a
revision that is still remembered gets what was since; everybody else is told how things are first.
Until somebody watches for the first time, nothing is compared and nothing is kept.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from itertools import islice

from shunt.agent import service_views
from shunt.agent.node import Node
from shunt.agent.service_views import Json

log = logging.getLogger("shunt")

KEPT = 10_000
# So many services are compared before others on the event loop get a turn.
BATCH = 50

Seen = tuple[Json, dict[str, Json]]  # a service, and its backends by name


class Changes:
    """Compares what the node is with what was told, and remembers the differences."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.revision = time.time_ns() // 1000
        self._log: deque[Json] = deque(maxlen=KEPT)
        self._known: dict[str, Seen] = {}
        self._dirty: set[str] = set()
        self._wake, self._news = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def note(self, targets: Iterable[str] | None) -> None:
        """The node has reconciled some targets, or all. Costs next to nothing."""
        if self._task is None:
            return
        if targets is None:
            self._dirty |= self._known.keys() | self.node.services.keys()
        else:
            self._dirty |= {name.rpartition("/")[0] for name in targets}
        self._wake.set()

    def close(self) -> None:
        """Every watcher's stream ends."""
        self._closed = True
        self._tell()
        if self._task is not None:
            self._task.cancel()

    async def watch(self, since: int | None) -> AsyncIterator[list[Json]]:
        """Changes after a revision, in order, until the daemon ends."""
        if self._task is None:
            self._task = asyncio.create_task(self._comparing())
            self.note(None)
        while self._dirty and not self._closed:
            await self._news.wait()
        position = -1 if since is None else since
        told = False
        while not self._closed:
            if not self._remembers(position):
                position = self.revision
                yield self._snapshot()
                told = False
            news = self._since(position)
            position = self.revision
            if news:
                yield news
            if not told:
                yield [{"revision": position, "type": "synced"}]
                told = True
            elif not news:
                await self._news.wait()

    def _remembers(self, revision: int) -> bool:
        oldest = self._log[0]["revision"] if self._log else self.revision + 1
        return bool(oldest - 1 <= revision <= self.revision)

    def _since(self, revision: int) -> list[Json]:
        count = self.revision - revision
        return list(islice(self._log, len(self._log) - count, None)) if count else []

    def _snapshot(self) -> list[Json]:
        """How everything is. What the watcher knew before is void."""
        revision = {"revision": self.revision}
        lines: list[Json] = [revision | {"type": "snapshot"}]
        for service, backends in self._known.values():
            lines.append(revision | {"type": "service", "change": "present", **service})
            lines += [revision | {"type": "backend", "change": "present", **b}
                      for b in backends.values()]  # fmt: skip
        return lines

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def _comparing(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._dirty:
                try:
                    self._compare([self._dirty.pop() for _ in range(min(BATCH, len(self._dirty)))])
                except Exception:
                    log.exception("watchers miss a change")
                await asyncio.sleep(0)
            self._tell()

    def _compare(self, names: Iterable[str]) -> None:
        for name in dict.fromkeys(names):
            found = self.node.services.get(name)
            self._differ(name, service_views.watched(self.node, found) if found else None)

    def _differ(self, name: str, now: Seen | None) -> None:
        before = self._known.pop(name, None)
        if now is not None:
            self._known[name] = now
        old, new = before or ({}, {}), now or ({}, {})
        for key in sorted(old[1].keys() - new[1].keys()):
            self._add("backend", "removed", {"service": name, "backend": key})
        if now is None and before is not None:
            self._add("service", "removed", {"service": name})
        elif old[0] != new[0]:
            self._add("service", "changed" if before else "added", new[0])
        for key, backend in new[1].items():
            if old[1].get(key) != backend:
                self._add("backend", "changed" if key in old[1] else "added", backend)

    def _add(self, kind: str, change: str, what: Json) -> None:
        self.revision += 1
        self._log.append({"revision": self.revision, "type": kind, "change": change, **what})
