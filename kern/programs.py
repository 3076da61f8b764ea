# SPDX-License-Identifier: Apache-2.0
"""What a program that is loaded already uses (its maps, its constants), and how long it ran."""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from shunt.kern import libbpf
from shunt.kern.btf import Btf
from shunt.kern.maps import Map, spec_of_fd

_CONSTANTS = ".rodata"


@dataclass(frozen=True)
class Inside:
    """Maps by name, and constants by their name in the source (0-d, of their dtype)."""

    maps: dict[str, Map] = field(default_factory=dict)
    constants: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)


@contextmanager
def inside(prog_id: int) -> Iterator[Inside]:
    """The maps are open until the context ends.

    Raises: OSError if the program has gone.
    """
    found = Inside()
    try:
        for fd in _map_descriptors(prog_id):
            info = libbpf.MapInfo()
            libbpf.info_by_fd(fd, info)
            name = info.name.decode()
            if name.endswith(_CONSTANTS):
                found.constants.update(_constants(fd, info))
                os.close(fd)
            elif "." in name:  # other data sections are nobody's business
                os.close(fd)
            else:
                found.maps[name] = Map(fd, spec_of_fd(fd))
        yield found
    finally:
        for each in found.maps.values():
            each.close()


def _map_descriptors(prog_id: int) -> Iterator[int]:
    fd = libbpf.call("bpf_prog_get_fd_by_id", prog_id)
    try:
        info = libbpf.ProgInfo()
        libbpf.info_by_fd(fd, info)
        ids = (c.c_uint32 * info.nr_map_ids)()
        info = libbpf.ProgInfo(nr_map_ids=len(ids), map_ids=c.addressof(ids))
        libbpf.info_by_fd(fd, info)
    finally:
        os.close(fd)
    for map_id in ids:
        yield libbpf.call("bpf_map_get_fd_by_id", map_id)


def _constants(fd: int, info: libbpf.MapInfo) -> dict[str, np.ndarray[Any, Any]]:
    raw = c.create_string_buffer(info.value_size)
    key = c.c_uint32(0)
    libbpf.call("bpf_map_lookup_elem", fd, c.addressof(key), c.addressof(raw))
    return {
        name: np.frombuffer(raw.raw, dtype, 1, offset).reshape(())
        for name, (dtype, offset) in Btf.of_id(info.btf_id).variables(_CONSTANTS).items()
    }


@dataclass(frozen=True, slots=True)
class Runs:
    """How often a program ran and how long, while the kernel's statistics were on."""

    count: int
    time_ns: int


def runs(prog_fd: int) -> Runs:
    """Since the program was loaded. Raises: OSError."""
    info = libbpf.ProgInfo()
    libbpf.info_by_fd(prog_fd, info)
    return Runs(int(info.run_cnt), int(info.run_time_ns))


def enable_statistics() -> int:
    """Have the kernel take the time of all programs' runs, until the descriptor is closed.

    Raises: OSError.
    """
    return libbpf.call("bpf_enable_stats", 0)  # BPF_STATS_RUN_TIME
