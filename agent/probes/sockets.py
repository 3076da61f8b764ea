# SPDX-License-Identifier: Apache-2.0
"""Sockets of checks, to a backend's own address or by way of a VIP."""

from __future__ import annotations

import asyncio
import socket
import struct
from ipaddress import ip_address

from shunt.agent.probes.attempt import Target
from shunt.lb.model import IPAddress

RESET_ON_CLOSE = struct.pack("ii", 1, 0)
FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
IP_BIND_ADDRESS_NO_PORT = 24
# By way of a VIP segments go through the loopback device, whose MTU says nothing. These fit in
# IPv6's smallest MTU, with an outer header.
SEGMENT_BYTES = 1180


def open_socket(target: Target, kind: int) -> socket.socket:
    """A socket that does not block; a connection is reset when it is closed, so that neither side
    keeps a TIME_WAIT.

    Raises: OSError.
    """
    made = socket.socket(FAMILIES[target.address.version], kind | socket.SOCK_NONBLOCK)
    try:
        if kind == socket.SOCK_STREAM:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        if target.way is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, target.way.mark)
            # The kernel would choose the VIP itself.
            made.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            made.bind((str(target.way.source), 0))
            if kind == socket.SOCK_STREAM:
                made.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT_BYTES)
    except OSError:
        made.close()
        raise
    return made


async def connected(target: Target) -> socket.socket:
    """A connection. Raises: OSError."""
    made = open_socket(target, socket.SOCK_STREAM)
    try:
        await asyncio.get_running_loop().sock_connect(made, (str(target.address), target.port))
    except BaseException:
        made.close()
        raise
    return made


def own_address(towards: IPAddress) -> IPAddress | None:
    """The address that this host's packets to another are from; None if there is no way to it.

    For an address of this host that is the same one.
    """
    with socket.socket(FAMILIES[towards.version], socket.SOCK_DGRAM) as asking:
        try:
            asking.connect((str(towards), 9))  # nothing is sent
        except OSError:
            return None
        return ip_address(asking.getsockname()[0])
