# SPDX-License-Identifier: Apache-2.0
"""A ring buffer that programs write and this process reads."""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable
from typing import Self

from shunt.kern import libbpf


class Ring:
    """The reading side of a BPF_MAP_TYPE_RINGBUF. There can be one reader at a time.

    `fileno()` is readable when records have come (put it into an event loop), `consume()` then
    hands each to the callback as bytes.
    """

    def __init__(self, map_fd: int, callback: Callable[[bytes], object]) -> None:
        """Raises: OSError if the map is no ring buffer."""
        self._callback = callback
        self._error: BaseException | None = None
        self._function = libbpf.SampleFn(self._take)  # libbpf keeps the pointer
        self._ring = libbpf.pointer_call("ring_buffer__new", map_fd, self._function, None, None)

    def _take(self, _context: int | None, data: int, size: int) -> int:
        # An exception cannot pass through C: it ends consume(), and is raised from there.
        try:
            self._callback(c.string_at(data, size))
        except BaseException as error:  # noqa: BLE001
            self._error = error
            return -1
        return 0

    def fileno(self) -> int:
        return libbpf.call("ring_buffer__epoll_fd", self._ring)

    def consume(self) -> int:
        """Hand over every record there is; returns how many.

        Raises: what the callback raised; the records after that one are still in the ring.
                ValueError if it is closed.
        """
        if not self._ring:
            raise ValueError("the ring is closed")
        count = int(libbpf.lib().ring_buffer__consume(self._ring))
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if count < 0:
            raise OSError(-count, "ring_buffer__consume")
        return count

    def close(self) -> None:
        if self._ring:
            libbpf.lib().ring_buffer__free(self._ring)
            self._ring = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
