# SPDX-License-Identifier: Apache-2.0
"""A map of somebody else's, of any type that has keys and values: bytes in, bytes out."""

from __future__ import annotations

import ctypes as c
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np

from shunt.kern import libbpf
from shunt.kern.btf import Btf
from shunt.kern.maps import possible_cpus
from shunt.lb.errors import ShuntError

# Types whose values exist once for each processor: hash, array, lru_hash, cgroup_storage.
_PERCPU = {5, 6, 10, 21}
_READABLE = {1, 2, 5, 6, 9, 10, 11}
TYPE_NAMES = {
    1: "hash", 2: "array", 5: "percpu_hash", 6: "percpu_array", 9: "lru_hash",
    10: "lru_percpu_hash", 11: "lpm_trie", 22: "queue", 23: "stack", 27: "ringbuf",
}  # fmt: skip


class RawMap:
    """A pinned map. Owns its file descriptor."""

    def __init__(self, path: Path) -> None:
        """Raises: OSError if there is none."""
        self.fd = libbpf.call("bpf_obj_get", os.fsencode(path))
        info = libbpf.MapInfo()
        libbpf.info_by_fd(self.fd, info)
        self.name, self.type = path.name, int(info.type)
        self.key_size, self.value_size = int(info.key_size), int(info.value_size)
        self.entries = int(info.max_entries)
        self.types = int(info.btf_id), int(info.btf_key_type_id), int(info.btf_value_type_id)
        per_cpu = self.type in _PERCPU
        self.copies = possible_cpus() if per_cpu else 1
        self._stride = -(-self.value_size // 8) * 8 if per_cpu else self.value_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def update(self, key: bytes, value: bytes) -> None:
        """Write one element, the same on every processor.

        Raises: OSError; ValueError if a size is wrong.
        """
        if (len(key), len(value)) != (self.key_size, self.value_size):
            raise ValueError(
                f"map {self.name} has keys of {self.key_size} bytes and values of"
                f" {self.value_size}, not {len(key)} and {len(value)}"
            )
        raw = value.ljust(self._stride, b"\0") * self.copies
        keys, values = c.create_string_buffer(key, len(key)), c.create_string_buffer(raw, len(raw))
        libbpf.call("bpf_map_update_elem", self.fd, c.addressof(keys), c.addressof(values), 0)

    def items(self) -> Iterator[tuple[bytes, list[bytes]]]:
        """Every key with its values, one for each processor where the map has so many.

        Raises: ShuntError if the map cannot be read that way.
        """
        if self.type not in _READABLE:
            raise ShuntError(
                f"map {self.name} has no elements to list",
                f"its type is {TYPE_NAMES.get(self.type, self.type)}",
                "read it with a program of yours: it is pinned",
            )
        key, following = (c.create_string_buffer(self.key_size) for _ in range(2))
        values = c.create_string_buffer(self._stride * self.copies)
        before = None
        while True:
            try:
                libbpf.call("bpf_map_get_next_key", self.fd, before, c.addressof(following))
            except FileNotFoundError:
                return
            key.raw, before = following.raw, c.addressof(key)
            try:
                libbpf.call("bpf_map_lookup_elem", self.fd, before, c.addressof(values))
            except FileNotFoundError:  # deleted in between
                continue
            cells = [values.raw[n * self._stride :][: self.value_size] for n in range(self.copies)]
            yield key.raw, cells

    def layouts(self) -> tuple[np.dtype[Any] | None, np.dtype[Any] | None]:
        """The dtypes of key and value, as far as the map's BTF says what they are."""
        found: list[np.dtype[Any] | None] = []
        for type_id in self.types[1:]:
            try:
                found.append(Btf.of_id(self.types[0]).dtype(type_id) if type_id else None)
            except (OSError, ShuntError):
                found.append(None)
        return found[0], found[1]


def plain(raw: bytes, layout: np.dtype[Any] | None) -> object:
    """Bytes as numbers and fields; in hexadecimal if nothing says what they are."""
    if layout is None or layout.itemsize != len(raw):
        return raw.hex()
    return _plain(np.frombuffer(raw, layout)[0])


def _plain(value: Any) -> object:
    if isinstance(value, np.void) and value.dtype.names:
        return {name: _plain(value[name]) for name in value.dtype.names}
    if isinstance(value, np.ndarray):
        return value.tobytes().hex() if value.dtype == np.uint8 else [_plain(v) for v in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.item() if hasattr(value, "item") else value
