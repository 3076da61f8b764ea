# SPDX-License-Identifier: Apache-2.0
"""Whether a device has a carrier (netdevice(7)): some 2 us, so that each health check can ask."""

from __future__ import annotations

import fcntl
import socket
import struct

SIOCGIFFLAGS = 0x8913  # linux/sockios.h
IFF_UP, IFF_RUNNING = 1 << 0, 1 << 6  # linux/if.h
_IFREQ = struct.Struct("16sh22x")


class Carrier:
    """Asks in the network namespace of the thread that made it."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def present(self, device: str) -> bool:
        """False also for a device that has gone, or is switched off."""
        request = _IFREQ.pack(device.encode(), 0)
        try:
            answer = fcntl.ioctl(self._socket, SIOCGIFFLAGS, request)
        except OSError:
            return False
        flags: int = _IFREQ.unpack(answer)[1]
        return flags & (IFF_UP | IFF_RUNNING) == IFF_UP | IFF_RUNNING

    def close(self) -> None:
        self._socket.close()
