# SPDX-License-Identifier: Apache-2.0
"""Make a veth end receive what an XDP program on its peer sends.

A veth wakes its peer's poller after XDP_TX only if the peer has an XDP program too (Linux 6.18,
veth_xdp_flush). With GRO switched on instead there is a poller, which is enough for XDP_REDIRECT;
but frames of XDP_TX then lie in its ring until something else wakes it.
"""

from __future__ import annotations

import ctypes as c
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from shunt.kern import libbpf, links
from shunt.lab.netns import Namespace

BPF_PROG_TYPE_XDP = 6
# struct bpf_insn: r0 = XDP_PASS; exit
PASS = struct.pack("<BBhi", 0xB7, 0, 0, libbpf.XDP_PASS) + struct.pack("<BBhi", 0x95, 0, 0, 0)


def attach_pass(namespace: Namespace, device: str) -> int:
    """Let a do-nothing program see what arrives at a device.

    Returns a descriptor that holds it: it is detached when that is closed.
    Raises: ShuntError if the device has a program already; OSError if the kernel refuses this one.
    """
    with _loaded() as program, namespace.inside():
        index = socket.if_nametoindex(device)
        link, _mode = links.attach_xdp(program, index, device, "native")
    return link


@contextmanager
def _loaded() -> Iterator[int]:
    load = libbpf.lib().bpf_prog_load
    load.argtypes = (c.c_int, c.c_char_p, c.c_char_p, c.c_char_p, c.c_size_t, c.c_void_p)
    program = load(BPF_PROG_TYPE_XDP, b"lab_pass", b"GPL", PASS, len(PASS) // 8, None)
    if program < 0:
        raise OSError(-program, f"bpf_prog_load: {os.strerror(-program)}")
    try:
        yield program
    finally:
        os.close(program)
