# SPDX-License-Identifier: Apache-2.0
"""Waiting until every program that was running has ended."""

from __future__ import annotations

import ctypes as c
from functools import cache

from shunt.kern import libbpf

_ARRAY, _ARRAY_OF_MAPS = 2, 12


class _CreateOpts(c.Structure):
    """struct bpf_map_create_opts, up to the map within"""

    _types = "btf_fd", "btf_key_type_id", "btf_value_type_id", "btf_vmlinux_value_type_id"
    _fields_ = (
        ("sz", c.c_size_t),
        *((name, c.c_uint32) for name in _types),
        ("inner_map_fd", c.c_uint32),
    )


def synchronize() -> None:
    """Wait for an RCU grace period: whoever read a map before this call has finished with it.

    After a map in a map has been replaced, the kernel waits for all programs that may still use
    the one before (Linux 5.0). membarrier's global command is shorter to say, but does nothing
    where one processor is online, though a socket's program may be preempted there, and is refused
    where processors run without a tick (`nohz_full`).

    Raises: OSError.
    """
    outer, inner = _maps()
    index, value = c.c_uint32(0), c.c_uint32(inner)
    libbpf.call("bpf_map_update_elem", outer, c.addressof(index), c.addressof(value), 0)


@cache
def _maps() -> tuple[int, int]:
    """An array of one map, and that map: open as long as this process lives."""
    inner = libbpf.call("bpf_map_create", _ARRAY, b"shunt_waits", 4, 4, 1, None)
    opts = _CreateOpts(sz=c.sizeof(_CreateOpts), inner_map_fd=inner)
    where = c.addressof(opts)
    return libbpf.call("bpf_map_create", _ARRAY_OF_MAPS, b"shunt_waited", 4, 4, 1, where), inner
