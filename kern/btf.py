# SPDX-License-Identifier: Apache-2.0
"""BTF to NumPy: the layout of every map key and value, and the names of enums.

Format: Documentation/bpf/btf.rst of the Linux kernel.
"""

from __future__ import annotations

import ctypes as c
import os
import struct
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np

from shunt.kern import libbpf
from shunt.lb.errors import ShuntError

_MAGIC = 0xEB9F
_INT, _PTR, _ARRAY, _STRUCT, _UNION, _ENUM, _FWD, _TYPEDEF = range(1, 9)
_VOLATILE, _CONST, _RESTRICT, _FUNC, _FUNC_PROTO, _VAR, _DATASEC, _FLOAT = range(9, 17)
_DECL_TAG, _TYPE_TAG, _ENUM64 = range(17, 20)
_BIG_ENDIAN = {"__be16": ">u2", "__be32": ">u4", "__be64": ">u8"}
# Bytes after the common 12, for each element of `vlen` or once.
_PER_ELEMENT = {_STRUCT: 12, _UNION: 12, _ENUM: 8, _FUNC_PROTO: 8, _DATASEC: 12, _ENUM64: 12}
_ONCE = {_INT: 4, _ARRAY: 12, _VAR: 4, _DECL_TAG: 4}


@dataclass(frozen=True)
class _Type:
    name: str
    kind: int
    size_or_type: int
    extra: bytes = field(repr=False)


class Btf:
    """One BTF blob, of an object file or of a map in the kernel."""

    def __init__(self, raw: bytes) -> None:
        magic, _version, _flags, header = struct.unpack_from("<HBBI", raw)
        if magic != _MAGIC:
            raise ShuntError("not BTF", f"the magic number is {magic:#x}", "rebuild the object")
        types, types_len, strings, strings_len = struct.unpack_from("<IIII", raw, 8)
        self._strings = raw[header + strings : header + strings + strings_len]
        self._types = [_Type("void", 0, 0, b"")]
        at, end = header + types, header + types + types_len
        while at < end:
            name, info, size_or_type = struct.unpack_from("<III", raw, at)
            kind, vlen = info >> 24 & 0x1F, info & 0xFFFF
            length = _PER_ELEMENT.get(kind, 0) * vlen + _ONCE.get(kind, 0)
            extra = raw[at + 12 : at + 12 + length]
            self._types.append(_Type(self._string(name), kind, size_or_type, extra))
            at += 12 + length

    @classmethod
    def of_object(cls, obj: int) -> Btf:
        """The BTF of an opened bpf_object."""
        size = libbpf.U()
        handle = libbpf.pointer_call("bpf_object__btf", obj)
        data = libbpf.pointer_call("btf__raw_data", handle, c.byref(size))
        return cls(c.string_at(data, size.value))

    @classmethod
    def of_id(cls, btf_id: int) -> Btf:
        """The BTF that the kernel keeps with a map."""
        fd = libbpf.call("bpf_btf_get_fd_by_id", btf_id)
        try:
            info = libbpf.BtfInfo()
            libbpf.info_by_fd(fd, info)
            buffer = c.create_string_buffer(info.btf_size)
            info = libbpf.BtfInfo(btf=c.addressof(buffer), btf_size=len(buffer))
            libbpf.info_by_fd(fd, info)
        finally:
            os.close(fd)
        return cls(buffer.raw)

    def _string(self, offset: int) -> str:
        return self._strings[offset : self._strings.index(b"\0", offset)].decode()

    @cached_property
    def _by_name(self) -> dict[tuple[int, str], int]:
        return {(t.kind, t.name): i for i, t in enumerate(self._types) if t.name}

    def struct(self, name: str) -> np.dtype[Any]:
        """The dtype of `struct name`.

        Raises: ShuntError if the object has no such struct.
        """
        found = self._by_name.get((_STRUCT, name))
        if found is None:
            raise ShuntError(f"no struct {name} in the BTF", "", "rebuild the BPF objects")
        return self.dtype(found)

    def enum(self, name: str, prefix: str) -> type[IntEnum]:
        """`enum name` as an IntEnum, members without `prefix`."""
        found = self._by_name.get((_ENUM, name))
        if found is None:
            raise ShuntError(f"no enum {name} in the BTF", "", "rebuild the BPF objects")
        pairs = struct.iter_unpack("<Ii", self._types[found].extra)
        return IntEnum(  # type: ignore[return-value]
            name, {self._string(n).removeprefix(prefix): v for n, v in pairs}
        )

    def variables(self, section: str) -> dict[str, tuple[np.dtype[Any], int]]:
        """The variables of a data section: name to (dtype, byte offset)."""
        found = self._by_name.get((_DATASEC, section))
        if found is None:
            return {}
        result = {}
        for var, offset, _size in struct.iter_unpack("<III", self._types[found].extra):
            variable = self._types[var]
            result[variable.name] = (self.dtype(variable.size_or_type), offset)
        return result

    def dtype(self, type_id: int) -> np.dtype[Any]:
        """The dtype of a type, C layout; __be* become big-endian scalars.

        Raises: ShuntError for a type that no map of ours has.
        """
        t = self._types[type_id]
        if t.name in _BIG_ENDIAN and t.kind == _TYPEDEF:
            return np.dtype(_BIG_ENDIAN[t.name])
        if t.kind in (_TYPEDEF, _VOLATILE, _CONST, _RESTRICT, _TYPE_TAG):
            return self.dtype(t.size_or_type)
        if t.kind == _INT:
            encoding = struct.unpack("<I", t.extra)[0] >> 24 & 0xF
            if encoding == 4:
                return np.dtype(np.bool_)
            if t.name == "char":
                return np.dtype("S1")
            return np.dtype(f"<{'i' if encoding == 1 else 'u'}{t.size_or_type}")
        if t.kind == _ENUM:
            return np.dtype(f"<u{t.size_or_type}")
        if t.kind == _ARRAY:
            element, _index, count = struct.unpack("<III", t.extra)
            inner = self.dtype(element)
            if inner == np.dtype("S1"):
                return np.dtype(f"S{count}")
            return np.dtype((inner, (count,)))
        if t.kind == _STRUCT:
            members = list(struct.iter_unpack("<III", t.extra))
            return np.dtype(
                {
                    "names": [self._string(n) for n, _, _ in members],
                    "formats": [self.dtype(m) for _, m, _ in members],
                    "offsets": [bits // 8 for _, _, bits in members],
                    "itemsize": t.size_or_type,
                }
            )
        raise ShuntError(f"BTF kind {t.kind} in a map", f"type {t.name!r}", "see bpf/abi.h")


def differences(ours: np.dtype[Any], theirs: np.dtype[Any]) -> list[str]:
    """What differs between two layouts, a line each; empty if nothing does."""
    found = []
    if ours.itemsize != theirs.itemsize:
        found.append(f"size: {theirs.itemsize} there, {ours.itemsize} here")
    if not (ours.names and theirs.names):
        if ours != theirs and not found:
            found.append(f"type: {theirs} there, {ours} here")
        return found
    assert ours.fields is not None
    assert theirs.fields is not None
    for name in dict.fromkeys((*ours.names, *theirs.names)):
        if name not in theirs.fields:
            found.append(f"field {name}: absent there")
        elif name not in ours.fields:
            found.append(f"field {name}: absent here")
        elif ours.fields[name][:2] != theirs.fields[name][:2]:
            (a, at_a), (b, at_b) = ours.fields[name][:2], theirs.fields[name][:2]
            found.append(f"field {name}: {b} at byte {at_b} there, {a} at byte {at_a} here")
    return found
