# SPDX-License-Identifier: Apache-2.0
"""What the kernel tells of its own accord: neighbours, links, addresses and routes that change."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, Self

from pyroute2.netlink import rtnl  # type: ignore[import-untyped]
from pyroute2.netlink.rtnl.marshal import MarshalRtnl  # type: ignore[import-untyped]

from shunt.kern.neighbours import Neighbour, to_neighbour
from shunt.kern.netlink import FAMILIES, NETLINK_ADD_MEMBERSHIP, SOL_NETLINK

# enum rtnetlink_groups
_GROUPS = {
    "LINK": 1,
    "NEIGH": 3,
    "IPV4_IFADDR": 5,
    "IPV4_ROUTE": 7,
    "IPV4_RULE": 8,
    "IPV6_IFADDR": 9,
    "IPV6_ROUTE": 11,
    "IPV6_RULE": 19,
    "NEXTHOP": 32,
}
RTM_NEWNEXTHOP, RTM_DELNEXTHOP = 104, 105
ADDRESSES = ("IPV4_IFADDR", "IPV6_IFADDR")
LINKS = ("LINK",)
# Room for a burst; what does not fit becomes a Resync.
_BUFFER_BYTES = 1 << 20
_RECEIVE_BYTES = 1 << 16
_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port


@dataclass(frozen=True, slots=True)
class NeighbourChanged:
    """One neighbour's entry is new or different; `gone`: it was deleted."""

    neighbour: Neighbour
    gone: bool = False


@dataclass(frozen=True, slots=True)
class RouteChanged:
    """A route to this prefix came, went or changed."""

    prefix: IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class PathsChanged:
    """Links, addresses, rules or next-hop objects changed: any route may lead elsewhere now."""


@dataclass(frozen=True, slots=True)
class Resync:
    """The kernel had more to tell than fitted: whatever was read before may be out of date."""


Event = NeighbourChanged | RouteChanged | PathsChanged | Resync

_KINDS = {
    rtnl.RTM_NEWNEIGH: "neighbour",
    rtnl.RTM_DELNEIGH: "neighbour",
    rtnl.RTM_NEWROUTE: "route",
    rtnl.RTM_DELROUTE: "route",
    rtnl.RTM_NEWLINK: "paths",
    rtnl.RTM_DELLINK: "paths",
    rtnl.RTM_NEWADDR: "paths",
    rtnl.RTM_DELADDR: "paths",
    rtnl.RTM_NEWRULE: "paths",
    rtnl.RTM_DELRULE: "paths",
    RTM_NEWNEXTHOP: "paths",
    RTM_DELNEXTHOP: "paths",
}


class Events:
    """A socket that hears of changes in the network namespace of the thread that makes it."""

    def __init__(
        self, buffer_bytes: int = _BUFFER_BYTES, groups: Iterable[str] = tuple(_GROUPS)
    ) -> None:
        """`groups`: of which changes to hear; those of _GROUPS."""
        self._socket = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
            socket.NETLINK_ROUTE,
        )
        try:
            # SO_RCVBUFFORCE, past the host's limit, where we may; else as much as it allows.
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, 33, buffer_bytes)
            except PermissionError:
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
            self._socket.bind((0, 0))
            for name in groups:
                self._socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, _GROUPS[name])
        except OSError:
            self._socket.close()
            raise
        self._marshal = MarshalRtnl()

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self, most: int = 256) -> list[Event]:
        """What has come, without waiting; at most so many datagrams, so that others get a turn.

        Equal events are told once, a neighbour's last word only.
        """
        events: dict[object, Event] = {}
        for _ in range(most):
            try:
                data = self._socket.recv(_RECEIVE_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                events[Resync] = Resync()
                continue
            for event in self._decode(data):
                if isinstance(event, NeighbourChanged):
                    events[event.neighbour.ifindex, event.neighbour.address] = event
                else:
                    events[event] = event
        return list(events.values())

    def _decode(self, data: bytes) -> Iterator[Event]:
        """Only neighbours and routes are looked into: a router's links and rules are many."""
        offset = 0
        while offset + _HEADER.size <= len(data):
            length, kind = _HEADER.unpack_from(data, offset)[:2]
            if length < _HEADER.size:
                return
            what = _KINDS.get(kind)
            if what == "paths":
                yield PathsChanged()
            elif what is not None:
                for message in self._marshal.parse(data[offset : offset + length]):
                    event = _neighbour(message, kind) if what == "neighbour" else _route(message)
                    if event is not None:
                        yield event
            offset += (length + 3) & ~3


def _neighbour(message: Any, kind: int) -> NeighbourChanged | None:
    neighbour = to_neighbour(message)
    if neighbour is None:
        return None
    return NeighbourChanged(neighbour, gone=kind == rtnl.RTM_DELNEIGH)


def _route(message: Any) -> RouteChanged | None:
    if message["family"] not in FAMILIES.values():
        return None
    anywhere = "0.0.0.0" if message["family"] == socket.AF_INET else "::"
    destination = message.get_attr("RTA_DST") or anywhere
    return RouteChanged(ip_network(f"{destination}/{message['dst_len']}", strict=False))
