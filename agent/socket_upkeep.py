# SPDX-License-Identifier: Apache-2.0
"""What the programs of sockets are told of while they run: control groups that come and go, and the
ports of this node's addresses; and the binds that they refused, put into the log."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shunt.agent.closing import Closing
from shunt.agent.events import Event, about, log
from shunt.agent.troubles import Troubles
from shunt.ipam.node import holders, node_ports
from shunt.kern.inotify import Watch
from shunt.kern.maps import Map
from shunt.kern.ring import Ring
from shunt.lb.compile import unmapped
from shunt.lb.errors import ShuntError
from shunt.lb.model import IPAddress, Port, Protocol, Service, Settings
from shunt.sockops.attach import Sockets

# The ring has room for some seventy: so many are told in a second at most.
TELL_S = 1.0
# A program that tries again and again is told of once in so long.
AGAIN_S = 60.0
# What to do about a bind() that was refused.
INSTEAD = (
    "let the program listen on another port or on an address that the service has not, or write"
    " `sockets: {node_ports: share}`"
)


class SocketUpkeep:
    """Of one node, on the running event loop."""

    def __init__(self, sockets: Sockets, closing: Closing, troubles: Troubles) -> None:
        self.sockets, self.closing, self.troubles = sockets, closing, troubles
        self._services: Mapping[str, Service] = {}
        # By program, address and port: when it was told, and how often it came since.
        self._told: dict[tuple[str, bytes, Port], tuple[float, int]] = {}
        self._watch: Watch | None = None
        self._ring: Ring | None = None
        self._timer: asyncio.TimerHandle | None = None

    def follow(self, settings: Settings, maps: Mapping[str, Map]) -> None:
        """Cover the sockets that the settings name. If that fails packets are balanced as ever."""
        self._let_go()
        refused: ShuntError | None = None
        try:
            self.sockets.follow(settings, maps)
        except ShuntError as e:
            refused = e
        try:
            self._listen()  # also to what was attached before, and goes on
        except ShuntError as e:
            refused = refused or e
        self.troubles.tell("sockets", refused)
        self.closing.follow_settings(settings, maps)

    def reserve(self, services: Mapping[str, Service]) -> None:
        """Which ports this node's addresses have, of the services that are in force."""
        self._services = services
        self.sockets.reserve(words(node_ports(services.values())))

    async def close(self) -> None:
        """Let go; the programs go on."""
        await self.closing.close()
        self._let_go()

    def _let_go(self) -> None:
        """Of what is listened to."""
        if self._timer is not None:
            self._timer.cancel()
        if self._ring is not None:
            self._ring.close()
        if self._watch is not None:
            asyncio.get_running_loop().remove_reader(self._watch.fileno())
            self._watch.close()
        self._timer = self._ring = self._watch = None

    def _listen(self) -> None:
        loop = asyncio.get_running_loop()
        if self.sockets.reserves:
            self._ring = Ring(self.sockets.maps["sock_refused"].fd, self._tell)
            self._timer = loop.call_later(TELL_S, self._read)
        if self.sockets.cgroup is not None and self.sockets.excluded:
            self._watch = Watch(_paths(self.sockets.cgroup, self.sockets.excluded))
            loop.add_reader(self._watch.fileno(), self._look_again)
            self.sockets.look_at_groups()  # what came before the watch was there

    def _look_again(self) -> None:
        assert self._watch is not None
        if self._watch.read():
            self.sockets.look_at_groups()

    def _read(self) -> None:
        assert self._ring is not None
        self._ring.consume()
        self._timer = asyncio.get_running_loop().call_later(TELL_S, self._read)

    def _tell(self, record: bytes) -> None:
        """Name the port that was refused, and to whom: struct bind_refused."""
        refused = np.frombuffer(record, self.sockets.btf.struct("bind_refused"), 1)[0]
        program = refused["comm"].tobytes().partition(b"\0")[0].decode(errors="replace")
        port = Port(int(refused["port"]), Protocol(int(refused["proto"])))
        key, now = (program, refused["addr"].tobytes(), port), time.monotonic()
        before, times = self._told.get(key, (-AGAIN_S, 0))
        if now - before < AGAIN_S:
            self._told[key] = before, times + 1
            return
        self._told = {k: v for k, v in self._told.items() if now - v[0] < 2 * AGAIN_S}
        self._told[key] = now, 0
        address = unmapped(key[1]) if any(key[1]) else None
        versions = (4, 6) if address is None else (address.version,)
        found = holders(self._services.values(), port, versions)
        _log(refused, program, address, port, times, ", ".join(found[:3]) or "(just removed)")


def unreached(port: Port, owners: str) -> str:
    """Why nobody may listen on a port of services that have it."""
    return (
        f"{port} is a port of service {owners} on this node's addresses: what clients send there"
        " would never reach a listener"
    )


def _log(
    refused: Any, program: str, address: IPAddress | None, port: Port, times: int, owners: str
) -> None:
    pid = int(refused["pid"])
    where = f"{address or 'every address'}, port {port}"
    before = f" (and {times} times before)" if times else ""
    error = ShuntError(
        f"bind() of {program!r} (pid {pid}) to {where} was refused{before}",
        unreached(port, owners),
        INSTEAD,
    )
    fields = {"port": port, "program": program, "pid": pid, "service": owners}
    log.warning("%s", error, extra=about(Event.BIND_REFUSED, **fields))


def _paths(root: Path, groups: Iterable[str]) -> list[Path]:
    return [root / group.lstrip("/") for group in groups]


def words(ports: Collection[tuple[int, Port]]) -> Any:
    """Map sock_node_ports, of (IP version, port)s."""
    words = np.zeros(4096, np.uint64)
    for version, port in ports:
        which = (version == 6) << 1 | (port.protocol is Protocol.UDP)
        words[which << 10 | port.port >> 6] |= np.uint64(1 << (port.port & 63))
    return words
