# SPDX-License-Identifier: Apache-2.0
"""Calls of sockets by way of io_uring, one at a time, without its library.

Source: linux/io_uring.h, and io_uring_setup(2).
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import struct
from collections.abc import Iterator

_SETUP, _ENTER = 425, 426  # system calls, the same on every architecture
_GETEVENTS = 1
_CQ_RING, _SQES = 0x8000000, 0x10000000  # what to map
_SQE = struct.Struct("=BBHiQQI4xQ24x")  # opcode, flags, ioprio, fd, off, addr, len, user data
SENDMSG, RECVMSG, CONNECT = 9, 10, 16
_TAG = 0x5347

_libc = ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: object) -> int:
    done = int(_libc.syscall(number, *arguments))
    if done < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"io_uring: {os.strerror(code)}")
    return done


class Ring:
    """A ring of one entry."""

    def __init__(self) -> None:
        params = ctypes.create_string_buffer(120)
        self.fd = _call(_SETUP, 1, params)
        words = struct.unpack("=30I", params.raw)
        sq_entries, cq_entries = words[0], words[1]
        self._sq, self._cq = words[10:17], words[20:26]  # io_sqring_offsets, io_cqring_offsets
        self._sq_ring = self._map(self._sq[6] + 4 * sq_entries, 0)
        self._cq_ring = self._map(self._cq[5] + 16 * cq_entries, _CQ_RING)
        self._sqes = self._map(64 * sq_entries, _SQES)

    def _map(self, size: int, what: int) -> mmap.mmap:
        return mmap.mmap(self.fd, size, flags=mmap.MAP_SHARED, offset=what)

    def close(self) -> None:
        for mapped in (self._sq_ring, self._cq_ring, self._sqes):
            mapped.close()
        os.close(self.fd)

    def do(self, opcode: int, fd: int, address: int, length: int = 0, offset: int = 0) -> int:
        """Have one done, and wait for it; what the call would have returned.

        Raises: OSError, as the call's own.
        """
        self._sqes[:64] = _SQE.pack(opcode, 0, 0, fd, offset, address, length, _TAG)
        tail = _word(self._sq_ring, self._sq[1])
        mask = _word(self._sq_ring, self._sq[2])
        struct.pack_into("=I", self._sq_ring, self._sq[6] + 4 * (tail & mask), 0)
        struct.pack_into("=I", self._sq_ring, self._sq[1], tail + 1)
        _call(_ENTER, self.fd, 1, 1, _GETEVENTS, None, 0)
        head = _word(self._cq_ring, self._cq[0])
        at = self._cq[5] + 16 * (head & _word(self._cq_ring, self._cq[2]))
        tag, result = struct.unpack_from("=Qi", self._cq_ring, at)
        struct.pack_into("=I", self._cq_ring, self._cq[0], head + 1)
        assert tag == _TAG
        if result < 0:
            raise OSError(-result, f"by io_uring: {os.strerror(-result)}")
        return int(result)


def _word(ring: mmap.mmap, offset: int) -> int:
    return int(struct.unpack_from("=I", ring, offset)[0])


@contextlib.contextmanager
def ring() -> Iterator[Ring]:
    made = Ring()
    try:
        yield made
    finally:
        made.close()
