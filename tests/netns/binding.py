# SPDX-License-Identifier: Apache-2.0
"""What a real bind() ends in."""

from __future__ import annotations

import socket


def bound(sock: socket.socket, address: str, port: int, *, only: bool = False) -> int:
    """The errno; 0 if it went well. `only`: with IPV6_V6ONLY."""
    if only:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        sock.bind((address, port))
    except OSError as e:
        return e.errno or -1
    return 0
