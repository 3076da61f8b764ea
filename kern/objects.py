# SPDX-License-Identifier: Apache-2.0
"""A BPF object file: opened, sized, configured, its pinned maps reused, loaded, pinned."""

from __future__ import annotations

import ctypes as c
import errno
import mmap
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shunt.kern import libbpf
from shunt.kern.btf import Btf, differences
from shunt.kern.maps import Map, MapSpec, spec_of_fd
from shunt.lb.errors import ShuntError

_TYPE_NAMES = {
    1: "hash",
    2: "array",
    3: "prog_array",
    6: "percpu_array",
    9: "lru_hash",
    11: "lpm_trie",
    18: "sockhash",
    24: "sk_storage",
    27: "ringbuf",
}
_LOG_BYTES = 4 << 20


class Program:
    """A loaded program. The object owns its file descriptor."""

    def __init__(self, name: str, fd: int) -> None:
        self.name, self.fd = name, fd

    def id(self) -> int:
        """The kernel's id of it."""
        info = libbpf.ProgInfo()
        libbpf.info_by_fd(self.fd, info)
        return int(info.id)


class Object:
    """An object file on its way into the kernel: open, then configure, then load."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises: ShuntError if the file is absent or not a BPF object with BTF."""
        self.path = Path(path)
        self.maps: dict[str, Map] = {}
        self.programs: dict[str, Program] = {}
        try:
            self._obj = libbpf.pointer_call("bpf_object__open_file", os.fsencode(self.path), None)
        except OSError as e:
            raise ShuntError(
                f"cannot open {self.path}", e.strerror or str(e), "build the objects: make build"
            ) from e
        self.btf = Btf.of_object(self._obj)
        self._handles = {
            libbpf.lib().bpf_map__name(h).decode(): h
            for h in libbpf.each("bpf_object__next_map", self._obj)
        }
        self._program_handles = {
            libbpf.lib().bpf_program__name(h).decode(): h
            for h in libbpf.each("bpf_object__next_program", self._obj)
        }
        self._logs: dict[str, Any] = {}
        self._reused: dict[str, MapSpec] = {}  # libbpf now knows them by the other's type ids

    def close(self) -> None:
        """Unload what nothing else holds (pins and links do)."""
        if self._obj:
            for m in self.maps.values():
                m.close()
            libbpf.lib().bpf_object__close(self._obj)
            self._obj = 0

    def __enter__(self) -> Object:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def map_names(self) -> list[str]:
        """The maps of the source; not the sections that hold variables."""
        return [n for n in self._handles if "." not in n]

    def spec(self, name: str) -> MapSpec:
        """What this object wants a map to be."""
        if name in self._reused:
            return self._reused[name]
        lib, h = libbpf.lib(), self._handles[name]
        key_id, value_id = lib.bpf_map__btf_key_type_id(h), lib.bpf_map__btf_value_type_id(h)
        kind, nothing = lib.bpf_map__type(h), np.dtype([])
        sizes = lib.bpf_map__key_size(h), lib.bpf_map__value_size(h)
        if kind == libbpf.MAP_SOCKHASH:  # libbpf forgets its types
            key, value = (np.dtype(f"V{size}") for size in sizes)
        else:
            key = self._layout(key_id, sizes[0]) if key_id else nothing
            value = self._layout(value_id, sizes[1]) if value_id else nothing
        return MapSpec(
            name,
            kind,
            key,
            value,
            lib.bpf_map__max_entries(h),
            lib.bpf_map__map_flags(h),
        )

    def _layout(self, type_id: int, size: int) -> np.dtype[Any]:
        """A type's dtype; of one that no map of ours has (a user's may), only its size."""
        try:
            return self.btf.dtype(type_id)
        except ShuntError:
            return np.dtype(f"V{size}")

    def set_entries(self, sizes: Mapping[str, int]) -> None:
        """Set the sizes of maps, before load."""
        for name, entries in sizes.items():
            libbpf.call("bpf_map__set_max_entries", self._handles[name], entries)

    def variable(self, section: str, name: str) -> np.ndarray[Any, Any]:
        """A global variable in its own memory; constants (.rodata) only before load.

        Shape: 0-d, of the variable's dtype; assign with `[...] =` or by field.
        """
        dtype, offset = self.btf.variables(section)[name]
        handle = next(h for n, h in self._handles.items() if n.endswith(section))
        found: np.ndarray[Any, Any]
        if (fd := libbpf.lib().bpf_map__fd(handle)) > 0:  # loaded: the programs' own memory
            memory = mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED)
            found = np.frombuffer(memory, dtype, 1, offset).reshape(())
        else:
            base = libbpf.pointer_call("bpf_map__initial_value", handle, c.byref(libbpf.Z()))
            raw = (c.c_uint8 * dtype.itemsize).from_address(base + offset)
            found = np.frombuffer(memoryview(raw), dtype).reshape(())
        return found

    def keep_programs(self, *names: str) -> None:
        """Load these programs only."""
        for name, h in self._program_handles.items():
            libbpf.call("bpf_program__set_autoload", h, name in names)

    def flags(self, program: str) -> int:
        """How a program is loaded: BPF_F_*."""
        return int(libbpf.lib().bpf_program__flags(self._program_handles[program]))

    def set_flags(self, program: str, flags: int) -> None:
        """Before load."""
        libbpf.call("bpf_program__set_flags", self._program_handles[program], flags)

    def attach_type(self, program: str) -> int:
        """Where a program may be attached, as its section says: enum bpf_attach_type."""
        lib = libbpf.lib()
        return int(lib.bpf_program__expected_attach_type(self._program_handles[program]))

    def instructions(self, program: str) -> bytes:
        """What was loaded, functions included. Units: 8 bytes an instruction."""
        lib, h = libbpf.lib(), self._program_handles[program]
        return c.string_at(lib.bpf_program__insns(h), 8 * lib.bpf_program__insn_cnt(h))

    def reuse(self, name: str, fd: int, where: str) -> None:
        """Use a map that exists, if it is what this object wants.

        Raises: ShuntError that lists each difference; the existing map is untouched.
        """
        want = self.spec(name)
        have = spec_of_fd(fd, want)
        found = unlike(want, have)
        if want.entries != have.entries:
            found.append(f"entries: {have.entries} there, {want.entries} here")
        if found:
            raise ShuntError(
                f"the pinned map {where} is not the one this version uses",
                "; ".join(found),
                "take the pins away with `shunt cleanup` and start again (flows kept in them"
                " are forgotten), or run the version that made them",
            )
        libbpf.call("bpf_map__reuse_fd", self._handles[name], fd)
        self._reused[name] = want

    def load(self) -> None:
        """Create the maps and load the programs.

        Raises: ShuntError with the verifier's decisive line. Nothing stays loaded.
        """
        lib = libbpf.lib()
        for name, h in self._program_handles.items():
            # Memory that is not touched unless there is something to say.
            self._logs[name] = (c.c_char * _LOG_BYTES).from_buffer(mmap.mmap(-1, _LOG_BYTES))
            lib.bpf_program__set_log_buf(h, self._logs[name], _LOG_BYTES)
        libbpf.take_log()
        code = lib.bpf_object__load(self._obj)
        if code < 0:
            raise self._load_error(-code)
        self._logs.clear()
        for name in self.map_names():
            fd = os.dup(lib.bpf_map__fd(self._handles[name]))
            self.maps[name] = Map(fd, self.spec(name))
        for name, h in self._program_handles.items():
            if (fd := lib.bpf_program__fd(h)) >= 0:
                self.programs[name] = Program(name, fd)

    def _load_error(self, code: int) -> ShuntError:
        if code == errno.EPERM and os.geteuid() != 0:
            return ShuntError(
                f"not allowed to load {self.path.name}",
                "the kernel wants CAP_BPF and CAP_NET_ADMIN",
                "run as root",
            )
        for name, buffer in self._logs.items():
            if line := decisive_line(buffer.value.decode(errors="replace")):
                return ShuntError(
                    f"the kernel refused program {name} of {self.path.name}",
                    line,
                    "please report this line with the output of `uname -r`",
                )
        said = "; ".join(libbpf.take_log()[-3:])
        return ShuntError(
            f"cannot load {self.path.name}",
            f"{os.strerror(code)}: {said}",
            "see `shunt doctor` for what this kernel lacks",
        )


def unlike(want: MapSpec, have: MapSpec) -> list[str]:
    """What differs between two maps but their sizes, a line each."""
    found = []
    if want.type != have.type:
        types = _TYPE_NAMES.get(have.type, have.type), _TYPE_NAMES.get(want.type, want.type)
        found.append(f"type: {types[0]} there, {types[1]} here")
    if want.flags != have.flags:
        found.append(f"flags: {have.flags:#x} there, {want.flags:#x} here")
    if want.type not in (libbpf.MAP_RINGBUF, libbpf.MAP_PROG_ARRAY):
        found += [f"key {d}" for d in differences(want.key, have.key)]
        found += [f"value {d}" for d in differences(want.value, have.value)]
    return found


# Instructions, source lines, register states and statistics: how the verifier got there.
_NARRATIVE = re.compile(
    r"\d+: |; |(cur|old|from|parent|last_idx|regs=|frame\d|processed|verification|stack depth"
    r"|func#|mark_precise|propagating|peak_states|R\d|-- )"
)


def decisive_line(log: str) -> str:
    """The line of a verifier log that says why it refused; "" if there is none."""
    useful = [
        line.strip()
        for line in log.splitlines()
        if line.strip() and (not _NARRATIVE.match(line) or _REGISTER_ERROR.match(line))
    ]
    return useful[-1] if useful else ""


_REGISTER_ERROR = re.compile(r"R\d+ [a-z!]")  # "R1 invalid mem access 'scalar'"


def pin(fd: int, path: Path) -> None:
    """Pin a map, link or program; the path must be free.

    Raises: OSError.
    """
    libbpf.call("bpf_obj_pin", fd, os.fsencode(path))


def open_pin(path: Path) -> int:
    """A new descriptor of what is pinned there.

    Raises: FileNotFoundError, OSError.
    """
    return libbpf.call("bpf_obj_get", os.fsencode(path))
