# SPDX-License-Identifier: Apache-2.0
"""POST /v1/explain/socket: what would become of a process's call, as things are."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any

import msgspec
import numpy as np
from aiohttp import web
from msgspec import UNSET

from shunt.agent.answers import Refused, answer, body
from shunt.agent.api_types_sockets import ExplainSocket
from shunt.agent.bind_explain import Bind
from shunt.agent.node import Node
from shunt.agent.options import SET_BITS
from shunt.agent.service_views import Json, names
from shunt.agent.socket_asked import Asked, is_mapped, raw, senseless
from shunt.agent.step_views import Told
from shunt.agent.twin import Twin
from shunt.kern import namespace
from shunt.lb import slots as slot
from shunt.lb.compile import unmapped
from shunt.lb.errors import ShuntError
from shunt.lb.model import IPAddress, Protocol
from shunt.sockops.dry import DrySockets

# What a reason means for who asks why, but those of a bind() and those that no question leads to.
REASONS: Mapping[str, str] = {
    "PASS_NOT_OURS": "the call is left as it is: no service has this address and port",
    "PASS_NAMESPACE": "the call is left as it is: only this host's network namespace is covered"
    " (`sockets: host`)",
    "PASS_FAMILY": "the call is left as it is: no backend of service {service} is of a family that"
    " it can address",
    "PASS_SOURCE_UNKNOWN": "the call is left as it is: service {service} serves some clients only,"
    " and which address the socket will have shows later",
    "PASS_BAD_TABLE": "the call is left as it is: the service is just going",
    "PASS_CGROUP": "the call is left as it is: the process is in an excluded control group",
    "PASS_SERVICE": "the call is left as it is: service {service} has `sockets: off`",
    "TO_BACKEND_CONNECT": "the socket is connected to backend {backend} of service {service}",
    "TO_BACKEND_SEND": "the datagram goes to backend {backend} of service {service}",
    "REFUSED_NO_BACKEND": "the call fails with ECONNREFUSED: service {service} has no backend",
    "REFUSED_SOURCE": "the call fails with EPERM: service {service} does not serve this client",
}
UNASKED = ("PASS_CHECK", "REFUSED_NO_MEMORY")


class SocketExplainer:
    """The dry programs of sockets' calls."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._twin = Twin(self._live, self._load)

    def close(self) -> None:
        """Unload it."""
        self._twin.close()

    def _live(self) -> object:
        """Raises: Refused while no call is translated."""
        sockets = self.node.sockets
        if not sockets.maps:
            why = f"sockets are covered by nothing: `sockets: {sockets.scope}`"
            fix = "see `shunt status`; every call sees VIPs as they are, and may bind any port"
            raise Refused(409, ShuntError("no call is translated", why, fix))
        return sockets.maps["sock_clients"]

    def _load(self) -> DrySockets:
        sockets = self.node.sockets
        excludes, netns = bool(sockets.excluded), namespace.cookie()
        maps = self.node.datapath.maps
        return DrySockets(maps, sockets.maps, excludes=excludes, netns=netns)

    async def respond(self, request: web.Request) -> web.Response:
        """Explain one call."""
        fields = ("vip", "port", "protocol", "call", "source", "netns", "cgroup", "ipv6_only")
        asked = await body(request, *fields)
        try:
            wanted = msgspec.convert(asked, ExplainSocket)
            vip = ip_address(wanted.vip)
            source = None if wanted.source is UNSET else ip_address(wanted.source)
        except (msgspec.ValidationError, ValueError) as e:
            raise senseless(str(e)) from e
        _check(wanted)
        dry = await self._twin.ready()
        if wanted.call == "bind":
            return answer(Bind(self.node, wanted, vip).decided(dry))
        return answer(_Call(self.node, wanted, vip, source).decided(dry))


def _check(wanted: ExplainSocket) -> None:
    """Raises: Refused for what no call can be."""
    if wanted.call == "sendto" and wanted.protocol != "udp":
        raise senseless("sendto is UDP's")
    if wanted.call == "bind" and wanted.source is not UNSET:
        raise senseless("what is to be bound is `vip`, with bind: a socket is bound once")
    if wanted.call != "bind" and not wanted.port:
        raise senseless("port 0 can be bound, and nobody can be asked there")


class _Call(Asked):
    """One connect() or sendto(), asked and told."""

    def __init__(
        self, node: Node, asked: ExplainSocket, vip: IPAddress, source: IPAddress | None
    ) -> None:
        super().__init__(node, asked, vip)
        self.source = source

    def decided(self, dry: DrySockets) -> Json:
        """The whole, as api_types_sockets.ExplainedSocket."""
        steps, svc, backend = [], 0, 0
        if self.netns != self.own and self.node.sockets.scope == "host":
            reason = "PASS_NAMESPACE"
        else:
            found, way = dry.ask(self.groups(), **self._ask())
            steps = [told for step in way if (told := self._tell(step))]
            reasons = names(self.node.sockets.btf, "sock_reason", "SOCK_")
            reason = reasons(int(found["reason"])).name
            svc, backend = int(found["svc"]), int(found["backend"])
            if reason == "TO_BACKEND_CONNECT" and found["sources"]:
                reason, told = self._source(int(found["sources"]), backend, reason)
                steps.append(told)
        if reason == "TO_BACKEND_CONNECT" and self.asked.call == "sendto":
            reason = "TO_BACKEND_SEND"
        service, named = self._service(svc), self._backend(backend)
        if reason == "TO_BACKEND_CONNECT" and self._asks_for_redirection(service):
            steps.append(self._stream())
        text = REASONS[reason].format(service=service or "?", backend=named)
        shown = named if reason.startswith("TO_BACKEND") else ""
        return self.concluded(reason, text, steps, service=service, backend=shown)

    def _ask(self) -> Json:
        return {
            "netns": self.netns,
            "now_ns": time.monotonic_ns(),
            "vip": raw(self.address),
            "port": self.asked.port,
            "proto": Protocol[self.asked.protocol.upper()],
            "families": self._families(),
            "entropy": random.getrandbits(32),
        }

    def _families(self) -> int:
        """As families_of() of sockops/family.h, and sendmsg() of either family."""
        family: Any = self.node.sockets.btf.enum("sock_family", "SOCK_")
        if self.address.version == 4:
            return int(family.IPV4)
        if self.asked.call == "sendto":
            return int(family.IPV4 if is_mapped(self.address) else family.IPV6)
        if self.source is None or not int(self.source):
            return int(family.IPV6 if self.asked.ipv6_only else family.IPV4 | family.IPV6)
        one = self.source.version == 4 or is_mapped(self.source)
        return int(family.IPV4 if one else family.IPV6)

    def _source(self, source_set: int, backend: int, reason: str) -> tuple[str, Json]:
        """As check_source() of sockops/client.h. The kernel looks it up in the map itself."""
        own = self.source
        if own is None or not int(own):
            hop = self.tables.nexthops[int(self.tables.backends["nexthop"][backend])]
            saddr = hop["saddr"].tobytes()
            own = unmapped(saddr) if self.netns == self.own and any(saddr) else None
        if own is None:
            text = "which address the socket will have is not known here"
            return "PASS_SOURCE_UNKNOWN", {"step": "source", "text": text, "facts": {}}
        sources = self.tables.maps["sources"]
        key = sources.new_keys(1)
        key["prefix_bits"], key["set"], key["addr"] = SET_BITS + 128, source_set, raw(own)
        rule = sources.lookup(key)
        served = rule is not None and bool(rule["allow"])
        self.packet["source"] = str(own)
        text, facts = self._on_source(int(served), source_set)
        told = {"step": "source", "text": text, "facts": {**facts, "source": str(own)}}
        return (reason if served else "REFUSED_SOURCE"), told

    def _asks_for_redirection(self, name: str) -> bool:
        service = self.node.services.get(name)
        return self.asked.protocol == "tcp" and service is not None and service.redirect

    def _stream(self) -> Json:
        """Whether what is sent passes TCP by. Where the other end is shows when it is there."""
        attached = self.node.streams.attached()
        text = "if the backend's end is a socket of this node, what both send passes TCP by"
        if not attached:
            text = "what is sent goes by TCP: `redirect` is set, but not in force (`shunt status`)"
        return {"step": "stream", "text": text, "facts": {"attached": attached}}

    # Where a socket's steps are told in other words than a packet's -----------------------------

    def _on_hash(self, value: int, log2: int) -> Told:
        number, of = (value << log2) >> 32, 1 << log2
        text = f"any of the service's {of} slots will do; this time {number}"
        return text, {"slot": number, "slots": of}

    def _on_slot(self, index: int, word: int) -> Told:
        owner = int(slot.cur(np.array([word], np.uint64))[0])
        return f"it is that of {self._owner(owner)}", {
            "index": index,
            "current": self._backend(owner),
        }

    def _on_client(self, backend: int, known: int) -> Told:
        said = "is" if known else "would be"
        text = f"the network namespace {said} remembered, with {self._owner(backend)}"
        return text, {"backend": self._backend(backend), "known": bool(known)}
