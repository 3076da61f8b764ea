# SPDX-License-Identifier: Apache-2.0
"""Whether a device has a carrier, cheap enough for each health check to ask."""

from __future__ import annotations

import fcntl
import socket
import struct
import time
from array import array

SIOCGIFFLAGS, SIOCETHTOOL = 0x8913, 0x8946  # linux/sockios.h
ETHTOOL_GLINK = 0x0A  # linux/ethtool.h
IFF_UP, IFF_RUNNING = 1 << 0, 1 << 6  # linux/if.h
# An answer holds so long; it is there well before a check that the loss concerns is over.
KEEP_S = 0.02
_FLAGS = struct.Struct("16sh22x")
_POINTER = struct.Struct("16sQ16x")


class Carrier:
    """Asks in the network namespace of the thread that made it."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._known: dict[str, tuple[float, bool]] = {}

    def present(self, device: str) -> bool:
        """False also for a device that has gone, or is switched off."""
        now_s = time.monotonic()
        asked_s, found = self._known.get(device, (float("-inf"), False))
        if now_s - asked_s > KEEP_S:
            found = self._running(device) and self._link(device)
            self._known[device] = now_s, found
        return found

    def _running(self, device: str) -> bool:
        try:
            answer = fcntl.ioctl(self._socket, SIOCGIFFLAGS, _FLAGS.pack(device.encode(), 0))
        except OSError:
            return False
        flags: int = _FLAGS.unpack(answer)[1]
        return flags & (IFF_UP | IFF_RUNNING) == IFF_UP | IFF_RUNNING

    def _link(self, device: str) -> bool:
        """What the driver says: IFF_RUNNING follows only up to a second after a loss."""
        value = array("I", (ETHTOOL_GLINK, 1))
        try:
            request = _POINTER.pack(device.encode(), value.buffer_info()[0])
            fcntl.ioctl(self._socket, SIOCETHTOOL, request)
        except OSError:
            return True  # a driver that cannot say
        return value[1] != 0

    def close(self) -> None:
        self._socket.close()
