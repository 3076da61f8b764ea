# SPDX-License-Identifier: Apache-2.0
"""Prometheus metrics: read from the maps when they are asked for. docs/metrics.md lists them.

A scrape is written family by family in small batches: what it takes in memory does not depend on
how many services there are, and others on the event loop get their turn between two batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from itertools import chain

from aiohttp import web
from prometheus_client import ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from shunt.agent.metric_families import Family, render
from shunt.agent.metrics_node import NODE
from shunt.agent.metrics_services import BACKENDS, SERVICES
from shunt.agent.node import Node
from shunt.lb.errors import ShuntError
from shunt.lb.model import Settings

log = logging.getLogger("shunt")

BY_DETAIL: dict[str, tuple[Family, ...]] = {
    "node": NODE,
    "services": NODE + SERVICES,
    "backends": NODE + SERVICES + BACKENDS,
}
# More scrapes at once are refused: each costs time, and nobody has so many servers.
SCRAPES_MAX = 4
SHUTDOWN_S = 1.0
_process = ProcessCollector(registry=None)


async def exposition(node: Node) -> AsyncIterator[bytes]:
    """All metrics of the configured detail in the text format, in parts."""
    assert node.configuration is not None
    families = BY_DETAIL[node.configuration.settings.metrics_detail]
    yield render(*node.observing.apply_s.collect(), *_process.collect())
    for part in chain.from_iterable(family.chunks(node) for family in families):
        yield part
        await asyncio.sleep(0)


async def respond(node: Node, request: web.Request) -> web.StreamResponse:
    """Answer a request with the metrics."""
    response = web.StreamResponse(headers={"Content-Type": CONTENT_TYPE_LATEST})
    response.enable_chunked_encoding()
    await response.prepare(request)
    with contextlib.suppress(ConnectionError):  # the reader has gone
        async for part in exposition(node):
            await response.write(part)
        await response.write_eof()
    return response


class Endpoint:
    """The metrics on the network, where the configuration wants them."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._runner: web.AppRunner | None = None
        self._where: tuple[str, int] | None = None
        self._scrapes = asyncio.Semaphore(SCRAPES_MAX)

    async def follow(self, settings: Settings) -> None:
        """Listen where `settings` say, and nowhere else. What cannot be had is told in the status.

        Forwarding never depends on it.
        """
        self.node.observing.want_statistics(settings.program_times)
        wanted = settings.metrics_listen
        where = (str(wanted[0]), wanted[1]) if wanted else None
        self.node.observing.troubles.tell("metrics", None)
        if where == self._where:
            return
        await self.close()
        if where is None:
            return
        app = web.Application()
        app.add_routes([web.get("/metrics", self._scrape)])
        runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN_S
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, *where).start()
        except OSError as e:
            await runner.cleanup()
            self._refused(where, e)
            return
        self._runner, self._where = runner, where
        log.info("metrics: http://%s/metrics", _host(where))

    def _refused(self, where: tuple[str, int], e: OSError) -> None:
        error = ShuntError(
            f"metrics.listen {_host(where)} cannot be had",
            e.strerror or str(e),
            f"see who has it: ss -ltnp sport = :{where[1]}; then shunt config reload",
        )
        self.node.observing.troubles.tell("metrics", error)

    async def _scrape(self, request: web.Request) -> web.StreamResponse:
        if self._scrapes.locked():
            raise web.HTTPServiceUnavailable(text=f"{SCRAPES_MAX} scrapes at once are enough\n")
        async with self._scrapes:
            return await respond(self.node, request)

    async def close(self) -> None:
        """Listen no more."""
        if self._runner is not None:
            await self._runner.cleanup()
        self._runner = self._where = None


def _host(where: tuple[str, int]) -> str:
    address, port = where
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
