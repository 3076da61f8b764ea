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
from shunt.agent.twin import Twin
from shunt.agent.views import error
from shunt.kern.tc import Direction
from shunt.lb.errors import ShuntError
from shunt.tc.translation import Translation
from shunt.xdp import hooks
from shunt.xdp.dry import DryRun
from shunt.xdp.hook_source import Position

# So many packets before others on the event loop get a turn.
BATCH = 20


class Explainer:
    """XDP's dry program, and TC's on the way in and out."""

    def __init__(self, node: Node) -> None:
        self.node = node
        # The node comes to have its programs later than this.
        self._xdp = Twin(lambda: node.datapath.config, self._load_xdp)
        self._tc = {way: self._translation(way) for way in Direction}

    def _load_xdp(self) -> DryRun:
        return self.node.datapath.dry_run()

    def _translation(self, way: Direction) -> Twin[DryRun]:
        def live() -> Translation:
            return self.node.translating.translation

        return Twin(lambda: live().config, lambda: live().dry_run(way))

    def close(self) -> None:
        """Unload them."""
        for twin in (self._xdp, *self._tc.values()):
            twin.close()

    async def respond(self, request: web.Request) -> web.Response:
        """Explain each frame of the request."""
        asked = await body(request, "frames", "interface", "leaving")
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
        twins = self._twins(wanted.leaving)
        seen_by = [] if wanted.leaving else self._hooks()
        packets = []
        for n, frame in enumerate(frames):
            if n % BATCH == 0:
                await asyncio.sleep(0)
            found = await self._explain(twins, frame, ifindex, wanted.leaving)
            found["steps"] = seen_by + found["steps"]
            packets.append(found)
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

    def _twins(self, leaving: bool) -> list[Twin[DryRun]]:
        """The programs that see a packet, one after the other."""
        assert self.node.configuration is not None
        needed = self.node.translating.needed
        if leaving:
            if not needed:
                why = "no service needs TC, and nobody is masqueraded: nothing sees what leaves"
                raise Refused(409, ShuntError("TC's programs are not loaded", why, "ask without"))
            return [self._tc[Direction.EGRESS]]
        off = self.node.configuration.settings.xdp_mode == "off"
        return [*([] if off else [self._xdp]), *([self._tc[Direction.INGRESS]] if needed else [])]

    def _hooks(self) -> list[Json]:
        return [_unrun(*hook) for hook in hooks.in_force(self.node.datapath.bpffs)]

    async def _explain(
        self, twins: list[Twin[DryRun]], frame: bytes, ifindex: int, leaving: bool
    ) -> Json:
        """By the last program that has something to say."""
        found: Json = {}
        for twin in twins:
            dry = await twin.ready()
            try:
                tried = dry.run(frame, ifindex)
            except OSError as e:
                # TC never sees some that XDP does: what is shorter than its IP header.
                return found or _untried(frame, e)
            told = Teller(self.node, frame, tried, leaving=leaving).explained()
            if not found:
                found = told
            elif told["reason"] != "PASS_NOT_OURS" or found["reason"] == "PASS_TO_TC":
                then = {"step": "program", "text": "TC, behind XDP", "facts": {}}
                found = {**told, "steps": [*found["steps"], then, *told["steps"]]}
            if found["verdict"] != "pass":
                break
        return found


def _untried(frame: bytes, e: OSError) -> Json:
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


def _unrun(name: str, position: Position) -> Json:
    text = f"hook {name} ({position}) sees it too, and may decide otherwise: it is not run here"
    return {"step": "hook", "text": text, "facts": {"hook": name, "position": position.value}}
