# SPDX-License-Identifier: Apache-2.0
"""BPF_PROG_TEST_RUN: a packet through a loaded XDP program."""

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


def run_xdp(prog_fd: int, packet: bytes, *, repeat: int = 1, ifindex: int = 0) -> Ran:
    """Run a packet through a program; with `repeat`, what it wrote is not undone in between.

    Raises: OSError.
    """
    out = c.create_string_buffer(len(packet) + 512)
    opts = libbpf.TestRunOpts(
        sz=c.sizeof(libbpf.TestRunOpts),
        data_in=c.cast(c.c_char_p(packet), c.c_void_p),
        data_size_in=len(packet),
        data_out=c.cast(out, c.c_void_p),
        data_size_out=len(out),
        repeat=repeat,
    )
    if ifindex:  # struct xdp_md: data, data_end, data_meta, ingress_ifindex, queue, egress
        context = struct.pack("=IIIIII", 0, len(packet), 0, ifindex, 0, 0)
        opts.ctx_in, opts.ctx_size_in = c.cast(c.c_char_p(context), c.c_void_p), len(context)
    libbpf.call("bpf_prog_test_run_opts", prog_fd, opts)
    return Ran(opts.retval, out.raw[: opts.data_size_out], opts.duration)
