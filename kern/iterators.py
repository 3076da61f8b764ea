# SPDX-License-Identifier: Apache-2.0
"""Programs that the kernel runs once for each of its own objects: sockets, elements of a map."""

from __future__ import annotations

import ctypes as c
import os

from shunt.kern import libbpf

READ_BYTES = 1 << 16


class _MapInfo(c.Structure):
    """union bpf_iter_link_info, as iterators over a map's elements use it."""

    _fields_ = (("map_fd", libbpf.U), ("rest", libbpf.U * 3))


def attach(prog_fd: int, map_fd: int = -1) -> int:
    """A link that `run` takes; over the elements of a map if one is given.

    Raises: OSError.
    """
    opts = libbpf.LinkCreateOpts(sz=c.sizeof(libbpf.LinkCreateOpts))
    info = _MapInfo(map_fd=max(map_fd, 0))
    if map_fd >= 0:
        opts.iter_info, opts.iter_info_len = c.addressof(info), c.sizeof(info)
    return libbpf.call("bpf_link_create", prog_fd, 0, libbpf.BPF_TRACE_ITER, opts)


def run(link_fd: int) -> bytes:
    """Go once over all objects; what the program wrote. Of what belongs to a network namespace:
    over those of the thread's.

    Raises: OSError.
    """
    fd = libbpf.call("bpf_iter_create", link_fd)
    try:
        parts: list[bytes] = []
        while True:
            try:
                part = os.read(fd, READ_BYTES)
            except BlockingIOError:  # the kernel has looked at a million without a word
                continue
            if not part:
                return b"".join(parts)
            parts.append(part)
    finally:
        os.close(fd)


def run_once(prog_fd: int, map_fd: int = -1) -> bytes:
    """`run` by a link that is let go of.

    Raises: OSError.
    """
    link_fd = attach(prog_fd, map_fd)
    try:
        return run(link_fd)
    finally:
        os.close(link_fd)
