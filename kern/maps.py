# SPDX-License-Identifier: Apache-2.0
"""One BPF map: typed look-ups, batches, and memory-mapped arrays."""

from __future__ import annotations

import ctypes as c
import errno
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shunt.kern import libbpf
from shunt.kern.btf import Btf
from shunt.lb.errors import ShuntError

Records = NDArray[Any]


@cache
def possible_cpus() -> int:
    """How many values a per-processor map has for each key."""
    last = Path("/sys/devices/system/cpu/possible").read_text().strip().replace(",", "-")
    return int(last.rsplit("-", 1)[-1]) + 1


@dataclass(frozen=True)
class MapSpec:
    """What a map is, before or after it exists."""

    name: str
    type: int
    key: np.dtype[Any]
    value: np.dtype[Any]
    entries: int
    flags: int


class Map:
    """A map in the kernel. Owns its file descriptor."""

    def __init__(self, fd: int, spec: MapSpec) -> None:
        self.fd, self.spec = fd, spec
        self.percpu = spec.type == libbpf.MAP_PERCPU_ARRAY
        self._stride = -(-spec.value.itemsize // 8) * 8 if self.percpu else spec.value.itemsize
        self._width = self._stride * (possible_cpus() if self.percpu else 1)
        self._mapped: Records | None = None

    @classmethod
    def pinned(cls, path: str | os.PathLike[str], like: MapSpec | None = None) -> Map:
        """Open a pinned map, its layout read from the BTF the kernel keeps with it.

        `like` is as in spec_of_fd.

        Raises: FileNotFoundError; ShuntError if the map carries no BTF.
        """
        fd = libbpf.call("bpf_obj_get", os.fsencode(path))
        return cls(fd, spec_of_fd(fd, like))

    def close(self) -> None:
        """Give the file descriptor back; a mapping stays valid."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def new_keys(self, n: int) -> Records:
        """Shape: n zeroed keys."""
        return np.zeros(n, self.spec.key)

    def new_values(self, n: int) -> Records:
        """Shape: n zeroed values."""
        return np.zeros(n, self.spec.value)

    # One element ---------------------------------------------------------------------------

    def lookup(self, key: Records | int) -> Records | None:
        """The value under a key, or None. Shape: 0-d record; (cpus,) if per processor."""
        raw = np.zeros(self._width, np.uint8)
        try:
            libbpf.call("bpf_map_lookup_elem", self.fd, self._key(key), raw.ctypes.data)
        except FileNotFoundError:
            return None
        found: Records = self._decode(raw.reshape(1, -1))[0]
        return found

    def update(self, key: Records | int, value: Records, flags: int = libbpf.BPF_ANY) -> None:
        """Raises: OSError (EEXIST, ENOENT by flags); ShuntError if the map is full."""
        data = np.ascontiguousarray(value, self.spec.value)
        try:
            libbpf.call("bpf_map_update_elem", self.fd, self._key(key), data.ctypes.data, flags)
        except OSError as e:
            raise self._full(e) from e

    def delete(self, key: Records | int) -> bool:
        """Whether there was such an element."""
        try:
            libbpf.call("bpf_map_delete_elem", self.fd, self._key(key))
        except FileNotFoundError:
            return False
        return True

    def _key(self, key: Records | int) -> int:
        self._held = np.ascontiguousarray(key, self.spec.key)  # alive until the call returns
        return self._held.ctypes.data

    def clear(self, key: int) -> None:
        """Zero an array's element, on every processor."""
        raw = np.zeros(self._width, np.uint8)
        libbpf.call("bpf_map_update_elem", self.fd, self._key(key), raw.ctypes.data, 0)

    # Many elements --------------------------------------------------------------------------

    def batches(self, size: int = 4096) -> Iterator[tuple[Records, Records]]:
        """All elements in batches of about `size`; safe while others write.

        Elements that exist throughout are seen; those that come or go meanwhile may be.
        """
        keys = np.zeros((size, self.spec.key.itemsize), np.uint8)
        values = np.zeros((size, self._width), np.uint8)
        cursor = c.create_string_buffer(max(8, self.spec.key.itemsize))
        after: Any = None
        while True:
            n = libbpf.U(len(keys))
            opts = libbpf.BatchOpts(sz=c.sizeof(libbpf.BatchOpts))
            code = libbpf.lib().bpf_map_lookup_batch(
                self.fd, after, cursor, keys.ctypes.data, values.ctypes.data, n, opts
            )
            if code == -errno.ENOSPC:  # one bucket holds more than the batch
                keys = np.zeros((2 * len(keys), keys.shape[1]), np.uint8)
                values = np.zeros((len(keys), values.shape[1]), np.uint8)
                continue
            if code < 0 and code != -errno.ENOENT:
                raise OSError(-code, f"bpf_map_lookup_batch on {self.spec.name}")
            if n.value:
                got = keys[: n.value].copy().view(self.spec.key)
                yield got.reshape(-1), self._decode(values[: n.value].copy())
            if code == -errno.ENOENT:
                return
            after = cursor

    def items(self) -> tuple[Records, Records]:
        """Shape: (keys, values), both of as many elements as there are."""
        pairs = list(self.batches(max(256, min(4096, self.spec.entries))))
        if not pairs:
            return self.new_keys(0), self._decode(np.zeros((0, self._width), np.uint8))
        # Told the type: by itself, concatenate() turns big-endian fields into native ones.
        keys = np.concatenate([k for k, _ in pairs], dtype=self.spec.key)
        return keys, np.concatenate([v for _, v in pairs], dtype=self.spec.value)

    def update_many(self, keys: Records, values: Records) -> None:
        """Raises: ShuntError if the map is full; some of the elements may be in by then."""
        if not len(keys):
            return
        keys = np.ascontiguousarray(keys, self.spec.key)
        values = np.ascontiguousarray(values, self.spec.value)
        n = libbpf.U(len(keys))
        opts = libbpf.BatchOpts(sz=c.sizeof(libbpf.BatchOpts))
        try:
            libbpf.call(
                "bpf_map_update_batch", self.fd, keys.ctypes.data, values.ctypes.data, n, opts
            )
        except OSError as e:
            raise self._full(e) from e

    def delete_many(self, keys: Records) -> int:
        """Delete what is there of `keys`; returns how many were."""
        keys = np.ascontiguousarray(keys, self.spec.key)
        deleted, at = 0, 0
        while at < len(keys):
            n = libbpf.U(len(keys) - at)
            opts = libbpf.BatchOpts(sz=c.sizeof(libbpf.BatchOpts))
            code = libbpf.lib().bpf_map_delete_batch(
                self.fd, keys[at:].ctypes.data, c.byref(n), opts
            )
            deleted += n.value
            at += n.value
            if code == -errno.ENOENT:
                at += 1  # this one had gone already
            elif code < 0:
                raise OSError(-code, f"bpf_map_delete_batch on {self.spec.name}")
        return deleted

    # Arrays ---------------------------------------------------------------------------------

    def mapped(self) -> Records:
        """The array itself, shared with the programs. Shape: (entries,) of the value's dtype.

        A record assignment is not atomic; an aligned store through a `uint64` or `uint32`
        view is.
        """
        if self._mapped is None:
            size = self.spec.entries * self.spec.value.itemsize
            page = mmap.PAGESIZE
            memory = mmap.mmap(self.fd, -(-size // page) * page, mmap.MAP_SHARED)
            self._mapped = np.frombuffer(memory, self.spec.value, self.spec.entries)
        return self._mapped

    def totals(self) -> Records:
        """A per-processor array of counters, summed. Shape: (entries,) of the value's dtype."""
        _, values = self.items()
        out = np.zeros(len(values), self.spec.value)
        for name in self.spec.value.names or ():
            out[name] = values[name].sum(axis=1)
        return out

    def _decode(self, raw: NDArray[np.uint8]) -> Records:
        if not self.percpu:
            return raw.view(self.spec.value).reshape(-1)
        cells = raw.reshape(len(raw), possible_cpus(), self._stride)
        cells = np.ascontiguousarray(cells[:, :, : self.spec.value.itemsize])
        return cells.view(self.spec.value).reshape(len(raw), possible_cpus())

    def _full(self, e: OSError) -> Exception:
        if e.errno not in (errno.E2BIG, errno.ENOSPC):
            return e
        return ShuntError(
            f"map {self.spec.name} is full",
            f"it holds {self.spec.entries} elements",
            f"raise limits.{self.spec.name} in shunt.yaml",
        )


def empty(path: Path) -> None:
    """Delete all elements of a pinned hash, if there is one; its layout need not be known."""
    try:
        fd = libbpf.call("bpf_obj_get", os.fsencode(path))
    except OSError:
        return
    try:
        info = libbpf.MapInfo()
        libbpf.info_by_fd(fd, info)
        key = np.zeros(info.key_size, np.uint8)
        while True:
            libbpf.call("bpf_map_get_next_key", fd, None, key.ctypes.data)
            libbpf.call("bpf_map_delete_elem", fd, key.ctypes.data)
    except FileNotFoundError:
        pass  # there is none left
    finally:
        os.close(fd)


def memory_bytes(fd: int) -> int:
    """What the kernel takes for a map, as far as it tells."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "memlock":
            return int(value)
    return 0


def spec_of_fd(fd: int, like: MapSpec | None = None) -> MapSpec:
    """What the kernel says of a map.

    Only CAP_SYS_ADMIN may read the BTF of a map that is pinned. Without it the layout is that of
    `like` wherever the size is the same: a meaning that changes without a size raises ABI_VERSION.

    Raises: ShuntError if it was made without BTF, so not by this program; PermissionError without
            that capability, and without `like`.
    """
    info = libbpf.MapInfo()
    libbpf.info_by_fd(fd, info)
    name = info.name.decode()
    if info.type in (libbpf.MAP_RINGBUF, libbpf.MAP_PROG_ARRAY):
        nothing = np.dtype([])
        return MapSpec(name, info.type, nothing, nothing, info.max_entries, info.map_flags)
    if info.type == libbpf.MAP_SOCKHASH and like is not None:  # libbpf gives it no BTF
        key, value = _sized(info.key_size, like.key), _sized(info.value_size, like.value)
        return MapSpec(name, info.type, key, value, info.max_entries, info.map_flags)
    if not info.btf_id:
        raise ShuntError(
            f"map {name} carries no type information",
            "it was not made by this program",
            "remove it: shunt cleanup",
        )
    try:
        btf = Btf.of_id(info.btf_id)
    except PermissionError:
        if like is None:
            raise
        key, value = _sized(info.key_size, like.key), _sized(info.value_size, like.value)
        return MapSpec(name, info.type, key, value, info.max_entries, info.map_flags)
    key, value = btf.dtype(info.btf_key_type_id), btf.dtype(info.btf_value_type_id)
    return MapSpec(name, info.type, key, value, info.max_entries, info.map_flags)


def _sized(size: int, like: np.dtype[Any]) -> np.dtype[Any]:
    return like if like.itemsize == size else np.dtype(f"V{size}")
