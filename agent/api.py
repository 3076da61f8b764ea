# SPDX-License-Identifier: Apache-2.0
"""The local API: HTTP and JSON over a Unix socket. docs/cli.md lists the routes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
from aiohttp import web

from shunt.agent import (
    flow_views,
    health_views,
    maglev_views,
    metrics,
    nat_ports,
    openapi,
    raw_views,
    service_views,
    views,
)
from shunt.agent.answers import Refused, answer, answer_errors, body
from shunt.agent.changes import Changes
from shunt.agent.edits import Edits, tagged
from shunt.agent.explain import Explainer
from shunt.agent.intent import Intent
from shunt.agent.monitor import Monitor
from shunt.agent.node import Node
from shunt.agent.peers import only_ours
from shunt.agent.samples import Samples
from shunt.agent.service_views import Json
from shunt.agent.socket_explain import SocketExplainer
from shunt.agent.socket_views import SocketViews
from shunt.agent.unix_socket import listen
from shunt.agent.wishes import WEIGHT_MAX
from shunt.lb.errors import ShuntError
from shunt.lb.lookup import find_backend, find_service
from shunt.lb.model import Configuration, Service

LIMIT, LIMIT_MAX = 1000, 100_000
BODY_MAX = 1 << 16
# A watcher that is connected may keep the daemon from ending for so long.
SHUTDOWN_S = 1.0


class Api:
    """The server, on the running event loop."""

    def __init__(self, node: Node, samples: Samples, intent: Intent) -> None:
        self.node, self.intent = node, intent
        self.changes: Changes | None = None
        self.explainer = Explainer(node)
        self.socket_explainer, self.sockets = SocketExplainer(node), SocketViews(node)
        self.monitor = Monitor(node, samples)
        self._runner: web.AppRunner | None = None
        self._path: Path | None = None

    async def start(self, path: Path) -> None:
        """Listen at `path`. A socket that nobody listens on any more is replaced.

        Raises: ShuntError if somebody does, or if the path cannot be used.
        """
        app = web.Application(middlewares=[answer_errors, only_ours], client_max_size=BODY_MAX)
        app.add_routes(self.routes())
        self.changes = Changes(self.node)
        self.node.on_change = self.changes.note
        listening = listen(path)
        runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=SHUTDOWN_S
        )
        try:
            await runner.setup()
            await web.SockSite(runner, listening).start()
        except BaseException:
            listening.close()
            raise
        self._runner, self._path = runner, path

    async def close(self) -> None:
        """Stop listening; open requests are answered, watchers' streams end."""
        self.monitor.close()
        if self.changes is not None:
            self.changes.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        for loaded in (self.explainer, self.socket_explainer, self.sockets):
            loaded.close()

    def routes(self) -> list[web.RouteDef]:
        """Every route; openapi.ROUTES describes each."""
        backend = "/v1/services/{service}/backends/{backend}"
        return [
            web.get("/v1/status", self._status),
            web.get("/v1/errors", self._errors),
            web.get("/v1/metrics", self._metrics),
            web.get("/v1/services", self._services),
            web.get("/v1/services/{service}", self._service),
            *Edits(self.node, self.intent).routes(),
            web.get("/v1/backends", self._backends),
            web.get("/v1/health", self._health),
            web.post(f"{backend}/drain", self._drain),
            web.post(f"{backend}/undrain", self._undrain),
            web.put(f"{backend}/weight", self._weight),
            web.get("/v1/services/{service}/maglev", self._maglev),
            web.post("/v1/services/{service}/maglev/simulate", self._simulate),
            web.get("/v1/bpf/lb", self._bpf_lb),
            web.get("/v1/bpf/flows", self._bpf_flows),
            web.get("/v1/flows", self._flows),
            web.post("/v1/flows/flush", self._flush),
            web.get("/v1/nat", self._nat),
            web.get("/v1/nat/top", self._nat_top),
            web.get("/v1/monitor", self.monitor.respond),
            web.post("/v1/explain", self.explainer.respond),
            web.post("/v1/explain/socket", self.socket_explainer.respond),
            web.get("/v1/sockets", self._sockets),
            web.get("/v1/watch", self._watch),
            web.get("/v1/openapi.json", self._openapi),
            web.post("/v1/reload", self._reload),
            web.post("/v1/programs/swap", self._swap),
        ]

    async def _openapi(self, _request: web.Request) -> web.Response:
        return web.Response(body=openapi.document(), content_type="application/json")

    async def _status(self, _request: web.Request) -> web.Response:
        files = self.intent.files
        places = {
            "config_file": files.config,
            "services_directory": files.services,
            "state_directory": self.intent.store.directory,
        }
        where = {name: str(path.absolute()) for name, path in places.items()}
        return answer({**views.status(self.node), **where})

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        return await metrics.respond(self.node, request)

    async def _errors(self, _request: web.Request) -> web.Response:
        return answer({"errors": [views.error_of_text(text) for text in self.node.errors]})

    async def _services(self, _request: web.Request) -> web.Response:
        return tagged(answer({"services": await service_views.services(self.node)}), self.node)

    async def _service(self, request: web.Request) -> web.Response:
        found = self._find(request.match_info["service"])
        return tagged(answer(await service_views.service(self.node, found)), self.node)

    async def _backends(self, request: web.Request) -> web.Response:
        name = self._asked(request, "service")
        of = self.node.services.values() if name is None else (self._find(name),)
        return answer({"backends": await service_views.backends(self.node, of)})

    async def _health(self, request: web.Request) -> web.Response:
        name = self._asked(request, "service")
        of = self.node.services.values() if name is None else (self._find(name),)
        return answer(health_views.health(self.node, of))

    @property
    def _configuration(self) -> Configuration:
        assert self.node.configuration is not None
        return self.node.configuration

    def _find(self, name: str) -> Service:
        try:
            return self.node.services[find_service(self._configuration, name).name]
        except ShuntError as e:
            raise Refused(404, e) from e

    def _asked(self, request: web.Request, key: str) -> str | None:
        """A parameter of the query; every other than those a route knows is a mistake."""
        known = {
            "/v1/backends": {"service"},
            "/v1/health": {"service"},
            "/v1/watch": {"since"},
        }
        allowed = known.get(request.path, {"service", "limit"})
        for name in request.query:
            if name not in allowed:
                raise Refused(
                    400,
                    ShuntError(
                        f"{request.path} has no parameter {name}",
                        f"it has: {', '.join(sorted(allowed))}",
                        "correct the request",
                    ),
                )
        return request.query.get(key) or None

    async def _drain(self, request: web.Request) -> web.Response:
        return self._wish(request, drained=True)

    async def _undrain(self, request: web.Request) -> web.Response:
        return self._wish(request, drained=False)

    async def _weight(self, request: web.Request) -> web.Response:
        weight = (await body(request, "weight")).get("weight")
        if not isinstance(weight, int) or isinstance(weight, bool):
            raise Refused(
                400,
                ShuntError(
                    "the request has no weight",
                    f"`weight` is {weight!r}; it must be a whole number",
                    f'send {{"weight": N}}, N from 1 to {WEIGHT_MAX}, or 0 for as configured',
                ),
            )
        return self._wish(request, weight=weight)

    def _wish(
        self, request: web.Request, *, drained: bool | None = None, weight: int | None = None
    ) -> web.Response:
        found = self._find(request.match_info["service"])
        try:
            wanted = find_backend(self._configuration, found.name, request.match_info["backend"])
        except ShuntError as e:
            raise Refused(404, e) from e
        if weight is not None and not 0 <= weight <= WEIGHT_MAX:
            raise Refused(
                422,
                ShuntError(
                    f"weight {weight} of backend {wanted}",
                    f"a weight is from 1 to {WEIGHT_MAX}; 0 means as configured",
                    f"give a weight in that range; to send it no new flows: shunt backend drain"
                    f" {found.name} {wanted}",
                ),
            )
        try:
            self.node.wish(found.name, wanted, drained=drained, weight=weight)
        except ShuntError as e:  # a table is full
            raise Refused(409, e) from e
        return answer(service_views.backend(self.node, found, wanted))

    async def _maglev(self, request: web.Request) -> web.Response:
        return answer(maglev_views.show(self.node, self._find(request.match_info["service"])))

    async def _simulate(self, request: web.Request) -> web.Response:
        found, asked = self._find(request.match_info["service"]), await body(request)
        try:
            return answer(maglev_views.simulated(self.node, found, asked))
        except ShuntError as e:
            raise Refused(422, e) from e

    async def _bpf_lb(self, request: web.Request) -> web.Response:
        return await self._listing(request, raw_views.frontends)

    async def _bpf_flows(self, request: web.Request) -> web.Response:
        return await self._listing(request, raw_views.flows)

    async def _flows(self, request: web.Request) -> web.Response:
        return await self._listing(request, flow_views.flows)

    async def _nat(self, request: web.Request) -> web.Response:
        return await self._listing(request, flow_views.translations)

    async def _sockets(self, request: web.Request) -> web.Response:
        return await self._listing(request, lambda _node, *which: self.sockets.sockets(*which))

    async def _nat_top(self, request: web.Request) -> web.Response:
        last = self.node.scanner.last
        use = last.ports if last else None
        return answer(nat_ports.top(self.node.tables, use, self._limit(request)))

    async def _listing(
        self, request: web.Request, listing: Callable[[Node, str | None, int], Awaitable[Json]]
    ) -> web.Response:
        name = self._asked(request, "service")
        if name is not None:
            self._find(name)
        return answer(await listing(self.node, name, self._limit(request)))

    @staticmethod
    def _limit(request: web.Request) -> int:
        text = request.query.get("limit", str(LIMIT))
        if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= LIMIT_MAX:
            raise Refused(
                400,
                ShuntError(
                    f"limit {text} is not possible",
                    f"a limit is from 1 to {LIMIT_MAX}",
                    "give one in that range; a service narrows what is listed",
                ),
            )
        return int(text)

    async def _flush(self, request: web.Request) -> web.Response:
        name = (await body(request, "service")).get("service")
        if name is not None:
            name = self._find(str(name)).name
        return answer({"deleted": await self.node.flush_flows(name)})

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        """One JSON object a line; see agent/changes.py."""
        text = self._asked(request, "since")
        if text is not None and not (text.isascii() and text.isdigit() and len(text) < 20):
            raise Refused(
                400,
                ShuntError(
                    f"since {text[:40]} is no revision",
                    "it is a number, the `revision` of a line that was seen",
                    "give one, or leave it away to be told how things are first",
                ),
            )
        assert self.changes is not None
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        try:
            async for lines in self.changes.watch(None if text is None else int(text)):
                await response.write(b"".join(msgspec.json.encode(x) + b"\n" for x in lines))
            await response.write_eof()
        except ConnectionError:
            pass  # the reader has gone
        return response

    async def _reload(self, _request: web.Request) -> web.Response:
        errors = [views.error_of_text(text) for text in await self.intent.load()]
        if errors:
            raise Refused(
                422,
                ShuntError(
                    f"the configuration is refused: {len(errors)} error{'s' * (len(errors) != 1)}",
                    f"generation {self.node.generation} is still in force",
                    "correct them; `shunt config check` lists each with its file and line",
                ),
                errors,
            )
        return answer({"generation": self.node.generation})

    async def _swap(self, _request: web.Request) -> web.Response:
        try:
            self.node.swap_programs()
        except ShuntError as e:
            raise Refused(409, e) from e
        return answer({"interfaces": views.interfaces(self.node)})
