# SPDX-License-Identifier: Apache-2.0
"""Memory that is not there until a test says so: who copies to it waits, with all that it locked.

By userfaultfd; the numbers are of linux/userfaultfd.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import select
import struct
from collections.abc import Iterator
from pathlib import Path

_NEW, _API, _REGISTER = 0xAA00, 0xC018AA3F, 0xC020AA00
_MODE_MISSING = 1


class Page:
    """One page; the kernel stops whoever comes to it first."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with Path("/dev/userfaultfd").open("rb") as device:
            self._fd = fcntl.ioctl(device, _NEW, os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.ioctl(self._fd, _API, struct.pack("=QQQ", 0xAA, 0, 0))
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        asked = struct.pack("=QQQQ", start, mmap.PAGESIZE, _MODE_MISSING, 0)
        fcntl.ioctl(self._fd, _REGISTER, asked)

    def somebody_waits(self, timeout_s: float = 10) -> bool:
        """Wait until somebody does."""
        return bool(select.select([self._fd], [], [], timeout_s)[0])

    def let_go(self) -> None:
        """It is there, and zero. Not an error if it was before."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


@contextlib.contextmanager
def absent_page() -> Iterator[Page]:
    page = Page()
    try:
        yield page
    finally:
        page.let_go()
