# SPDX-License-Identifier: Apache-2.0
"""GET /v1/sockets: the sockets of this host that have backends in VIPs' places, and the other ends
of streams. Changes nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shunt.agent.node import Node
from shunt.agent.service_views import Json
from shunt.agent.stream_views import OFF, UNPAIRED, Ends
from shunt.kern import cgroup, namespace
from shunt.lb.compile import Endpoint, unmapped
from shunt.lb.model import ANY_PORT, Frontend, Protocol
from shunt.sockops.listing import Listing

NETNS_DIR = Path("/run/netns")
BATCH = 500  # rows before others on the event loop get a turn
# The kernel's TCP_* of net/tcp_states.h, which UDP has, too.
TCP_STATES = (
    *("", "established", "syn-sent", "syn-recv", "fin-wait-1", "fin-wait-2", "time-wait"),
    *("close", "close-wait", "last-ack", "listen", "closing", "new-syn-recv"),
)


class SocketViews:
    """Lists them on demand; the program is loaded when it is asked for first."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._listing: Listing | None = None
        self._busy = asyncio.Lock()

    def close(self) -> None:
        """Unload it."""
        if self._listing is not None:
            self._listing.close()
            self._listing = None

    async def sockets(self, service: str | None, limit: int) -> Json:
        """In no order. `more`: there are more than `limit`.

        Raises: ShuntError if the kernel refuses the program.
        """
        maps = self.node.sockets.maps
        if not maps:
            return {"sockets": [], "more": False}
        async with self._busy:
            if self._listing is None:
                self._listing = await asyncio.to_thread(Listing)
            streams = self.node.streams.maps
            ends = Ends(self._listing.ends(streams), streams, self._listing.btf)
            rows = self._listing.rows(maps)
        root = self.node.sockets.cgroup
        groups = await asyncio.to_thread(cgroup.paths, root) if root is not None else {}
        name_of = _spaces()
        found: list[Json] = []
        for n, row in enumerate(rows):
            if n % BATCH == BATCH - 1:
                await asyncio.sleep(0)
            owner = self._service(row)
            if service is not None and owner != service:
                continue
            found += self._ends(row, owner, ends, lambda sock: _own(sock, groups, name_of))
            if len(found) > limit:
                return {"sockets": found[:limit], "more": True}
        return {"sockets": found, "more": False}

    def _service(self, row: Any) -> str:
        """Whose VIP it is now; empty if nobody's any more."""
        tables, vip = self.node.tables, unmapped(row["vip"].tobytes())
        for port in (int(row["vip_port"]), ANY_PORT):
            svc = tables.frontends.get(Frontend(vip, port, Protocol(int(row["proto"]))))
            if svc:
                return tables.name_of(svc).rpartition("/")[0]
        return ""

    def _backend_state(self, row: Any) -> str:
        """Of the backend that was given: its id may be another's by now."""
        tables = self.node.tables
        record, flag = tables.backends[int(row["backend"])], tables.flag
        flags = int(record["flags"])
        if not flags & flag.known or record["addr"].tobytes() != row["addr"].tobytes():
            return "gone"
        if flags & flag.removed:
            return "removed"
        if not flags & flag.up:
            return "failing"
        return "draining" if flags & flag.drained else "up"

    def _ends(self, row: Any, owner: str, ends: Ends, own: Callable[[Any], Json]) -> Iterator[Json]:
        """A socket and, if it is one of a stream's, the other end."""
        given = self._given(row, owner)
        client = ends.client(int(row["cookie"])) if row["connected"] else None
        service = self.node.services.get(owner)
        if client is not None:
            stream = ends.shown(client)
        elif given["protocol"] == "tcp" and service is not None and service.redirect:
            stream = UNPAIRED
        else:
            stream = OFF
        yield {**given, **own(row), "end": "client", **stream}
        server = None if client is None else ends.server(client)
        if server is not None:
            yield {**given, **own(server["socket"]), "end": "server", **ends.shown(server)}

    def _given(self, row: Any, owner: str) -> Json:
        """What a client's socket has in a VIP's place; true of its connection."""
        since_s = max(0, time.monotonic_ns() - int(row["seen_ns"])) / 1e9
        return {
            "protocol": Protocol(int(row["proto"])).name.lower(),
            "vip": str(unmapped(row["vip"].tobytes())),
            "vip_port": int(row["vip_port"]),
            "service": owner,
            "backend": str(Endpoint(unmapped(row["addr"].tobytes()), int(row["port"]))),
            "backend_state": self._backend_state(row),
            "connected": bool(row["connected"]),
            "since_s": round(since_s, 1),
        }


def _own(row: Any, groups: Mapping[int, str], name_of: Callable[[int, int], str]) -> Json:
    """What is a socket's own."""
    state = int(row["state"])
    return {
        "local": str(unmapped(row["own"].tobytes())),
        "local_port": int(row["own_port"]),
        "state": TCP_STATES[state] if state < len(TCP_STATES) else str(state),
        "netns": name_of(int(row["netns"]), int(row["netns_inum"])),
        "netns_cookie": int(row["netns"]),
        "cgroup": groups.get(int(row["cgroup"]), ""),
        "uid": int(row["uid"]),
        "inode": int(row["inode"]),
    }


def _spaces() -> Callable[[int, int], str]:
    """What network namespaces are called, by their cookie and number."""
    own, named = namespace.cookie(), namespace.named(NETNS_DIR)

    def name(cookie: int, inum: int) -> str:
        return "host" if cookie == own else named.get(inum, f"net:[{inum}]")

    return name
