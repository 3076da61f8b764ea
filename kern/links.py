# SPDX-License-Identifier: Apache-2.0
"""XDP links: attach, swap the program, say who holds an interface. And links to tracepoints."""

from __future__ import annotations

import ctypes as c
import errno
import os
from dataclasses import dataclass

from shunt.kern import libbpf
from shunt.lb.errors import ShuntError

MODE_FLAGS = {"native": libbpf.XDP_FLAGS_DRV_MODE, "generic": libbpf.XDP_FLAGS_SKB_MODE}


@dataclass(frozen=True)
class Attached:
    """The XDP program of an interface; prog_id 0 if it has none."""

    prog_id: int
    prog_name: str
    mode: str  # native, generic, offloaded, none


def program_name(prog_id: int) -> str:
    """The name of a loaded program, or "" if it has gone."""
    try:
        fd = libbpf.call("bpf_prog_get_fd_by_id", prog_id)
    except OSError:
        return ""
    try:
        info = libbpf.ProgInfo()
        libbpf.info_by_fd(fd, info)
        return str(info.name.decode())
    finally:
        os.close(fd)


def query(ifindex: int) -> Attached:
    """Who holds an interface's XDP hook.

    Raises: OSError (ENODEV).
    """
    opts = libbpf.XdpQueryOpts(sz=c.sizeof(libbpf.XdpQueryOpts))
    libbpf.call("bpf_xdp_query", ifindex, 0, opts)
    for mode, prog_id in (
        ("native", opts.drv_prog_id),
        ("generic", opts.skb_prog_id),
        ("offloaded", opts.hw_prog_id),
    ):
        if prog_id:
            return Attached(prog_id, program_name(prog_id), mode)
    return Attached(0, "", "none")


def attach_xdp(prog_fd: int, ifindex: int, name: str, mode: str) -> tuple[int, str]:
    """Attach by link. Returns (link descriptor, the mode it got: native or generic).

    `mode` auto tries native first.
    Raises: ShuntError if the hook is taken, or the driver refuses; nothing is changed then.
    """
    refused = ""
    for attempt in ("native", "generic") if mode == "auto" else (mode,):
        opts = libbpf.LinkCreateOpts(sz=c.sizeof(libbpf.LinkCreateOpts), flags=MODE_FLAGS[attempt])
        try:
            fd = libbpf.call("bpf_link_create", prog_fd, ifindex, libbpf.BPF_XDP, opts)
            return fd, attempt
        except OSError as e:
            holder = query(ifindex)
            if holder.prog_id:
                raise ShuntError(
                    f"{name} already has XDP program {holder.prog_name!r}"
                    f" (id {holder.prog_id}, {holder.mode})",
                    "an interface holds one XDP program",
                    f"detach it (ip link set dev {name} xdp off, or `bpftool link detach` if it"
                    " is held by a link), or take another interface",
                ) from e
            refused = os.strerror(e.errno or 0)
            if e.errno in (errno.EPERM, errno.ENODEV):
                break
    raise ShuntError(
        f"cannot attach to {name} in mode {mode}",
        refused,
        "`xdp: auto` falls back to generic; a driver's native mode may want a smaller MTU"
        " (`ip -d link show`) or fewer queues (`ethtool -L`)",
    )


def update(link_fd: int, prog_fd: int) -> None:
    """Swap a link's program; no packet sees neither.

    Raises: OSError.
    """
    libbpf.call("bpf_link_update", link_fd, prog_fd, None)


def info(link_fd: int) -> tuple[int, int]:
    """(ifindex, prog_id) of an XDP link; ifindex 0 when the interface has gone."""
    raw = libbpf.LinkInfo()
    libbpf.info_by_fd(link_fd, raw)
    return int(raw.ifindex), int(raw.prog_id)


def detach(link_fd: int) -> None:
    """Detach a link's program from its interface.

    Raises: OSError.
    """
    libbpf.call("bpf_link_detach", link_fd)


def attach_tracing(prog_fd: int) -> int:
    """Attach a program of type tp_btf to its tracepoint, until the descriptor is closed.

    Raises: OSError.
    """
    return libbpf.call("bpf_raw_tracepoint_open", None, prog_fd)
