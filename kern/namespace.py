# SPDX-License-Identifier: Apache-2.0
"""Network namespaces, as programs know them."""

from __future__ import annotations

import socket

SO_NETNS_COOKIE = 71  # asm-generic/socket.h; Python does not have it


def cookie() -> int:
    """Of the namespace that this thread is in: what bpf_get_netns_cookie() gives for its sockets.

    Raises: OSError.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), "little")
