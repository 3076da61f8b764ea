# SPDX-License-Identifier: Apache-2.0
"""A program array: which program each slot has, and programs linked or put together for one."""

from __future__ import annotations

import contextlib
import ctypes as c
import errno
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from shunt.kern import libbpf
from shunt.kern.objects import decisive_line
from shunt.lb.errors import ShuntError

_LOG_BYTES = 1 << 20
# Instructions of linux/bpf.h: opcode, registers (source << 4 | destination), offset, immediate.
_INSTRUCTION = struct.Struct("<BBhi")
_LOAD_64, _CALL = 0x18, 0x85
_PSEUDO_MAP_FD, _PSEUDO_CALL = 1, 1


class ProgramArray:
    """A map of programs. Does not own its file descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def put(self, slot: int, prog_fd: int) -> None:
        """Put a program into a slot: from then on, jumps through it go there.

        Raises: OSError (EINVAL if it is not of the kind that the array holds).
        """
        key, value = c.c_uint32(slot), c.c_uint32(prog_fd)
        libbpf.call("bpf_map_update_elem", self.fd, c.addressof(key), c.addressof(value), 0)

    def clear(self, slot: int) -> None:
        """Empty a slot; an empty one stays empty."""
        key = c.c_uint32(slot)
        with contextlib.suppress(FileNotFoundError):
            libbpf.call("bpf_map_delete_elem", self.fd, c.addressof(key))

    def get(self, slot: int) -> int:
        """The id of a slot's program; 0 if it is empty."""
        key, value = c.c_uint32(slot), c.c_uint32(0)
        try:
            libbpf.call("bpf_map_lookup_elem", self.fd, c.addressof(key), c.addressof(value))
        except FileNotFoundError:
            return 0
        return value.value

    def copy(self, source: int, target: int) -> None:
        """Put `source`'s program into `target` too, also if somebody replaces it meanwhile."""
        while self.get(target) != (prog_id := self.get(source)) and prog_id:
            fd = libbpf.call("bpf_prog_get_fd_by_id", prog_id)
            try:
                self.put(target, fd)
            finally:
                os.close(fd)


def link(output: Path, files: Iterable[Path]) -> None:
    """Link object files into one, as libbpf does it.

    Raises: ShuntError with what libbpf says.
    """
    libbpf.take_log()
    try:
        linker = libbpf.pointer_call("bpf_linker__new", os.fsencode(output), None)
        try:
            for path in files:
                libbpf.call("bpf_linker__add_file", linker, os.fsencode(path), None)
            libbpf.call("bpf_linker__finalize", linker)
        finally:
            libbpf.lib().bpf_linker__free(linker)
    except OSError as e:
        said = "; ".join(line.removeprefix("libbpf: ") for line in libbpf.take_log()[-3:])
        raise ShuntError(
            "the object cannot be linked",
            said or str(e),
            "build both with the same version of clang",
        ) from e


def _insn(code: int, dst: int = 0, src: int = 0, off: int = 0, imm: int = 0) -> bytes:
    return _INSTRUCTION.pack(code, src << 4 | dst, off, imm)


def around(function: bytes, view_fd: int, array_fd: int, answer_at: int, slot: int) -> bytes:
    """xdp/hook.bpf.c's program around a function that exists as instructions alone.

    Shape: `answer_at` is the offset of the answer in the view; `slot` is what comes after.
    """
    return b"".join((
        _insn(0xBF, 6, 1),                                     # r6 = ctx
        _insn(0x62, 10, 0, -4, 0),                             # *(u32 *)(r10 - 4) = 0
        _insn(0xBF, 2, 10), _insn(0x07, 2, imm=-4),            # r2 = r10 - 4
        _insn(_LOAD_64, 1, _PSEUDO_MAP_FD, imm=view_fd), _insn(0),
        _insn(_CALL, imm=1),                                   # r0 = bpf_map_lookup_elem()
        _insn(0x15, 0, 0, 4, 0),                               # if !r0, over the next four
        _insn(0xBF, 7, 0), _insn(0xBF, 1, 0),                  # r7 = r1 = r0
        _insn(_CALL, 0, _PSEUDO_CALL, imm=8),                  # r0 = function(r1)
        _insn(0x63, 7, 0, answer_at),                          # *(u32 *)(r7 + answer_at) = r0
        _insn(0xBF, 1, 6),                                     # r1 = ctx
        _insn(_LOAD_64, 2, _PSEUDO_MAP_FD, imm=array_fd), _insn(0),
        _insn(0xB7, 3, imm=slot),                              # r3 = slot
        _insn(_CALL, imm=12),                                  # bpf_tail_call(): does not return
        _insn(0xB7, 0, imm=0), _insn(0x95),                    # return XDP_ABORTED
        function,
    ))  # fmt: skip


def with_maps(function: bytes, descriptors: Mapping[int, int]) -> bytes:
    """Instructions of another process, with this one's descriptors of the same maps."""
    out = bytearray(function)
    for at in range(0, len(out), 8):
        code, registers, offset, value = _INSTRUCTION.unpack_from(out, at)
        if code == _LOAD_64 and registers >> 4 == _PSEUDO_MAP_FD:
            _INSTRUCTION.pack_into(out, at, code, registers, offset, descriptors[value])
    return bytes(out)


def load_xdp(name: str, instructions: bytes, flags: int) -> int:
    """Load instructions as an XDP program; its descriptor.

    Raises: ShuntError with the verifier's decisive line.
    """
    log = c.create_string_buffer(_LOG_BYTES)
    code = c.create_string_buffer(instructions, len(instructions))
    for level in (0, 1):
        opts = libbpf.ProgLoadOpts(
            sz=c.sizeof(libbpf.ProgLoadOpts),
            expected_attach_type=libbpf.BPF_XDP,
            prog_flags=flags,
            log_level=level,
            log_size=len(log) if level else 0,
            log_buf=c.addressof(log) if level else None,
        )
        try:
            return libbpf.call(
                "bpf_prog_load", libbpf.PROG_TYPE_XDP, os.fsencode(name), b"GPL",
                c.addressof(code), len(instructions) // 8, opts,
            )  # fmt: skip
        except OSError as e:
            why = decisive_line(log.value.decode(errors="replace")) or os.strerror(e.errno or 0)
            if e.errno == errno.EPERM and os.geteuid() != 0:
                raise
    raise ShuntError(
        f"the kernel refused program {name}",
        why,
        "correct the hook: docs/hooks.md says what it may",
    )


def map_ids(prog_fd: int) -> set[int]:
    """The ids of the maps that a program uses."""
    info = libbpf.ProgInfo()
    libbpf.info_by_fd(prog_fd, info)
    ids = (c.c_uint32 * info.nr_map_ids)()
    info = libbpf.ProgInfo(nr_map_ids=len(ids), map_ids=c.addressof(ids))
    libbpf.info_by_fd(prog_fd, info)
    return set(ids)


def map_id(fd: int) -> int:
    """The id of a map."""
    info = libbpf.MapInfo()
    libbpf.info_by_fd(fd, info)
    return int(info.id)


def prog_id(fd: int) -> int:
    """The id of a program."""
    info = libbpf.ProgInfo()
    libbpf.info_by_fd(fd, info)
    return int(info.id)
