# SPDX-License-Identifier: Apache-2.0
"""Who is at the other end of the socket, asked of the kernel for every request.

The socket's mode keeps others out already. It is one chmod, or one descriptor handed on before a
group was left, away from not doing so.
"""

from __future__ import annotations

import errno
import grp
import os
import socket
import struct
from collections.abc import Collection
from dataclasses import dataclass

from aiohttp import web

from shunt.agent.answers import Handler, Refused
from shunt.agent.unix_socket import GROUP
from shunt.lb.errors import ShuntError

# include/uapi/asm-generic/socket.h, since Linux 4.13; Python has no name for it.
SO_PEERGROUPS = 59
# Python's getsockopt takes no larger buffer: 256 groups.
GROUPS_BYTES = 1024
_UCRED = struct.Struct("iII")


@dataclass(frozen=True)
class Peer:
    """A process as it was when it connected."""

    pid: int
    uid: int
    groups: frozenset[int]


def peer_of(connected: socket.socket) -> Peer:
    """Who connected; of one in more than 256 groups only its own group is known.

    Raises: OSError if this is no Unix socket.
    """
    raw = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(raw)
    try:
        more = connected.getsockopt(socket.SOL_SOCKET, SO_PEERGROUPS, GROUPS_BYTES)
    except OSError as e:
        if e.errno != errno.ERANGE:
            raise
        more = b""
    return Peer(pid, uid, frozenset({gid, *struct.unpack(f"{len(more) // 4}I", more)}))


def may_use(peer: Peer, owner: int, groups: Collection[int]) -> bool:
    """Root, the daemon's own user, and the members of the group, if there is one."""
    return peer.uid in (0, owner) or not peer.groups.isdisjoint(groups)


def _groups() -> list[int]:
    try:
        return [grp.getgrnam(GROUP).gr_gid]
    except KeyError:
        return []


@web.middleware
async def only_ours(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse whom the socket is not for."""
    connected = request.transport.get_extra_info("socket") if request.transport else None
    if connected is None:  # it has gone meanwhile
        raise ConnectionResetError
    peer = peer_of(connected)
    if not may_use(peer, os.geteuid(), _groups()):
        raise Refused(
            403,
            ShuntError(
                f"user {peer.uid} may not use this socket",
                f"it is for root and the members of the group {GROUP}",
                f"use sudo, or join the group {GROUP}: usermod -aG {GROUP} $USER",
            ),
        )
    return await handler(request)
