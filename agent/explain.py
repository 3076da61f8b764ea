# SPDX-License-Identifier: Apache-2.0
"""POST /v1/explain: packets through the dry program, on the maps that are in force."""

from __future__ import annotations

import asyncio
import base64
import binascii
import socket

import msgspec
from aiohttp import web

from shunt.agent.answers import Refused, answer, body
from shunt.agent.api_types_explain import Explain
from shunt.agent.node import Node
from shunt.agent.samples import describe
from shunt.agent.service_views import Json
from shunt.agent.step_views import Teller
from shunt.agent.views import error
from shunt.lb.errors import ShuntError
from shunt.xdp import hooks
from shunt.xdp.dry import DryRun
from shunt.xdp.hook_source import Position

# So many packets before others on the event loop get a turn.
BATCH = 20


class Explainer:
    """The dry program, loaded when it is asked for first, and again for each new live one."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._dry: DryRun | None = None
        self._config: object = None  # of the program that it is the twin of
        self._loading = asyncio.Lock()

    def close(self) -> None:
        """Unload it."""
        if self._dry is not None:
            self._dry.close()
            self._dry = None

    async def respond(self, request: web.Request) -> web.Response:
        """Explain each frame of the request."""
        asked = await body(request, "frames", "interface")
        try:
            wanted = msgspec.convert(asked, Explain)
            frames = [base64.b64decode(frame, validate=True) for frame in wanted.frames]
        except (msgspec.ValidationError, binascii.Error, ValueError) as e:
            problem = ShuntError(
                "the request is not one for explain",
                str(e),
                'send {"frames": [BASE64, ...]}, from 1 to 1000 of them',
            )
            raise Refused(422, problem) from e
        interface, ifindex = self._interface(wanted.interface or None)
        seen_by = [_unrun(*hook) for hook in hooks.in_force(self.node.datapath.bpffs)]
        packets = []
        for n, frame in enumerate(frames):
            if n % BATCH == 0:
                await asyncio.sleep(0)
            packets.append(self._explain(await self._ready(), frame, ifindex, seen_by))
        return answer({"interface": interface, "packets": packets})

    def _interface(self, name: str | None) -> tuple[str, int]:
        assert self.node.configuration is not None
        attached = self.node.configuration.settings.interfaces
        chosen = name or next(iter(attached))
        if chosen not in attached:
            why = f"shuntd is attached to {', '.join(attached)}; what comes in elsewhere is not its"
            raise Refused(404, ShuntError(f"shuntd is not on interface {chosen}", why, "name one"))
        try:
            return chosen, socket.if_nametoindex(chosen)
        except OSError as e:
            problem = ShuntError(f"interface {chosen} has gone", str(e), "see `ip link`")
            raise Refused(404, problem) from e

    async def _ready(self) -> DryRun:
        """Raises: ShuntError if the kernel refuses the program."""
        datapath = self.node.datapath
        async with self._loading:
            while self._dry is None or self._config is not datapath.config:
                self.close()
                self._config = datapath.config
                # The verifier takes most of a second over it.
                self._dry = await asyncio.to_thread(datapath.dry_run)
        return self._dry

    def _explain(self, dry: DryRun, frame: bytes, ifindex: int, before: list[Json]) -> Json:
        try:
            tried = dry.run(frame, ifindex)
        except OSError as e:
            problem = ShuntError(
                f"a frame of {len(frame)} bytes cannot be tried",
                f"{e.strerror}: the kernel tries what has an Ethernet header and fits its buffers",
                "send whole frames, as they are on the wire",
            )
            return {
                "packet": describe(frame),
                "verdict": None,
                "reason": None,
                "service": "",
                "backend": "",
                "text": problem.what,
                "out": None,
                "steps": [],
                "problem": error(problem),
            }
        found = Teller(self.node, frame, tried).explained()
        found["steps"] = before + found["steps"]
        return found


def _unrun(name: str, position: Position) -> Json:
    text = f"hook {name} ({position}) sees it too, and may decide otherwise: it is not run here"
    return {"step": "hook", "text": text, "facts": {"hook": name, "position": position.value}}
