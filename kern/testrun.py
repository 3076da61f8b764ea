# SPDX-License-Identifier: Apache-2.0
"""BPF_PROG_TEST_RUN: a packet through an XDP or TC program, a context through a syscall one."""

from __future__ import annotations

import ctypes as c
import struct
from dataclasses import dataclass

from shunt.kern import libbpf


@dataclass(frozen=True)
class Ran:
    """What came out. duration_ns is the mean of one repeat."""

    verdict: int
    data: bytes
    duration_ns: int


def _options(packet: bytes, out: c.Array[c.c_char]) -> libbpf.TestRunOpts:
    """One run of a packet, from memory to memory, both of which the caller keeps alive."""
    return libbpf.TestRunOpts(
        sz=c.sizeof(libbpf.TestRunOpts),
        data_in=c.cast(c.c_char_p(packet), c.c_void_p),
        data_size_in=len(packet),
        data_out=c.cast(out, c.c_void_p),
        data_size_out=len(out),
    )


def run_xdp(prog_fd: int, packet: bytes, *, repeat: int = 1, ifindex: int = 0) -> Ran:
    """Run a packet through a program; with `repeat`, what it wrote is not undone in between.

    Raises: OSError.
    """
    out = c.create_string_buffer(len(packet) + 512)
    opts = _options(packet, out)
    opts.repeat = repeat
    if ifindex:  # struct xdp_md: data, data_end, data_meta, ingress_ifindex, queue, egress
        context = struct.pack("=IIIIII", 0, len(packet), 0, ifindex, 0, 0)
        opts.ctx_in, opts.ctx_size_in = c.cast(c.c_char_p(context), c.c_void_p), len(context)
    libbpf.call("bpf_prog_test_run_opts", prog_fd, opts)
    return Ran(opts.retval, out.raw[: opts.data_size_out], opts.duration)


class Runs:
    """Packet after packet through one XDP program, quicker than by `run_xdp`: the memory and the
    arguments are made once."""

    def __init__(self, prog_fd: int, longest: int) -> None:
        self._in = c.create_string_buffer(longest)
        self._out = c.create_string_buffer(longest + 512)
        self._from, self._to = c.addressof(self._in), c.addressof(self._out)
        self._opts = libbpf.TestRunOpts(
            sz=c.sizeof(libbpf.TestRunOpts), data_in=self._from, data_out=self._to, repeat=1
        )
        self._arguments = prog_fd, c.byref(self._opts)

    def run(self, packet: bytes) -> int:
        """The verdict; `data` is what came out.

        Raises: OSError; ValueError if the packet is longer than was said.
        """
        opts = self._opts
        if len(packet) > len(self._in):
            raise ValueError(f"{len(packet)} bytes, of at most {len(self._in)}")
        c.memmove(self._from, packet, len(packet))
        opts.data_size_in, opts.data_size_out = len(packet), len(self._out)
        libbpf.call("bpf_prog_test_run_opts", *self._arguments)
        return int(opts.retval)

    @property
    def data(self) -> bytes:
        """The last packet, as it came out."""
        return c.string_at(self._to, self._opts.data_size_out)


@dataclass(frozen=True)
class RanTc(Ran):
    """The verdict is a TC_ACT_*. The kernel does not show a frame's outermost VLAN tag here."""

    mark: int


def run_tc(prog_fd: int, packet: bytes, mark: int = 0, ifindex: int = 0) -> RanTc:
    """Run a packet with a mark through a TC program, on an interface (the loopback if 0).

    Raises: OSError.
    """
    out = c.create_string_buffer(len(packet) + 512)
    # struct __sk_buff: len, type, mark, six others, ingress_ifindex, ifindex
    before = struct.pack("=11I", 0, 0, mark, *[0] * 7, ifindex)
    after = c.create_string_buffer(256)
    opts = _options(packet, out)
    opts.ctx_in, opts.ctx_size_in = c.cast(c.c_char_p(before), c.c_void_p), len(before)
    opts.ctx_out, opts.ctx_size_out = c.cast(after, c.c_void_p), len(after)
    libbpf.call("bpf_prog_test_run_opts", prog_fd, opts)
    mark = struct.unpack_from("=3I", after)[2]
    verdict = c.c_int32(opts.retval).value
    return RanTc(verdict, out.raw[: opts.data_size_out], opts.duration, mark)


def run_syscall(prog_fd: int, context: bytes) -> bytes:
    """Run a program of type syscall; what it made of its context.

    Raises: OSError.
    """
    memory = c.create_string_buffer(context, len(context))
    opts = libbpf.TestRunOpts(
        sz=c.sizeof(libbpf.TestRunOpts),
        ctx_in=c.cast(memory, c.c_void_p),
        ctx_size_in=len(context),
    )
    libbpf.call("bpf_prog_test_run_opts", prog_fd, opts)
    return memory.raw
