# SPDX-License-Identifier: Apache-2.0
"""XDP links: attach, swap the program, say who holds an interface. And links to tracepoints and
to control groups."""

from __future__ import annotations

import ctypes as c
import errno
import fcntl
import mmap
import os
import socket
import struct
from dataclasses import dataclass
from pathlib import Path

from shunt.kern import libbpf
from shunt.kern.objects import open_pin, pin
from shunt.lb.errors import ShuntError

# A page, less XDP's headroom, the Ethernet header, and what the kernel keeps at a buffer's end
# (struct skb_shared_info, in cache lines).
ONE_BUFFER_MTU = mmap.PAGESIZE - 256 - 14 - 320
SIOCGIFMTU = 0x8921

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
    if mode == "native" and (mtu := _mtu(name)) > ONE_BUFFER_MTU:
        raise ShuntError(
            f"cannot attach to {name} in mode native with an MTU of {mtu}",
            f"native XDP wants each frame in one buffer: {ONE_BUFFER_MTU} bytes at most here, and"
            f" some drivers take less ({refused})",
            f"ip link set dev {name} mtu {ONE_BUFFER_MTU}  # or `xdp: auto`, which falls back to"
            " generic mode",
        )
    raise ShuntError(
        f"cannot attach to {name} in mode {mode}",
        refused,
        "`xdp: auto` falls back to generic; a driver's native mode may want a smaller MTU"
        " (`ip -d link show`) or fewer queues (`ethtool -L`); a bond's wants mode active-backup,"
        " 802.3ad, balance-xor or balance-rr, a hash policy other than vlan+srcmac, and native XDP"
        " in each of its parts",
    )


def _mtu(name: str) -> int:
    request = struct.pack("16si12x", name.encode(), 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        return int(struct.unpack_from("i", fcntl.ioctl(control, SIOCGIFMTU, request), 16)[0])


def update(link_fd: int, prog_fd: int) -> None:
    """Swap a link's program; no packet sees neither.

    Raises: OSError.
    """
    libbpf.call("bpf_link_update", link_fd, prog_fd, None)


def info(link_fd: int) -> tuple[int, int]:
    """(ifindex, prog_id) of an XDP or TCX link; ifindex 0 when the interface has gone."""
    raw = libbpf.LinkInfo()
    libbpf.info_by_fd(link_fd, raw)
    return int(raw.ifindex), int(raw.prog_id)


def detach(link_fd: int) -> None:
    """Detach a link's program from its interface.

    Raises: OSError.
    """
    libbpf.call("bpf_link_detach", link_fd)


def detach_pin(path: Path) -> None:
    """Detach a pinned link and remove the pin."""
    try:
        fd = open_pin(path)
        try:
            detach(fd)
        finally:
            os.close(fd)
    except OSError:
        pass  # what it was attached to has gone
    path.unlink(missing_ok=True)


def attach_tracing(prog_fd: int) -> int:
    """Attach a program of type tp_btf to its tracepoint, until the descriptor is closed.

    Raises: OSError.
    """
    return libbpf.call("bpf_raw_tracepoint_open", None, prog_fd)


def attach_cgroup(prog_fd: int, cgroup_fd: int, attach_type: int) -> int:
    """Attach to a control group, beside whoever is there, for it and all below it.

    Raises: OSError (EPERM: a program there allows none beside it; E2BIG: there are 64).
    """
    return libbpf.call("bpf_link_create", prog_fd, cgroup_fd, attach_type, None)


def cgroup_info(link_fd: int) -> tuple[int, int]:
    """(id of the control group, prog_id) of a link to one; the first is 0 if it has gone."""
    raw = libbpf.CgroupLinkInfo()
    libbpf.info_by_fd(link_fd, raw)
    return int(raw.cgroup_id), int(raw.prog_id)


def attach_cgroup_pin(prog_fd: int, cgroup: Path, attach_type: int, path: Path) -> None:
    """The same to a directory, pinned.

    Raises: OSError. Nothing is attached then.
    """
    cgroup_fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = attach_cgroup(prog_fd, cgroup_fd, attach_type)
    finally:
        os.close(cgroup_fd)
    try:
        pin(fd, path)
    finally:
        os.close(fd)


def swap_cgroup(path: Path, prog_fd: int, home: int) -> bool:
    """Swap the program of the link that is pinned there; False if there is none of this cgroup.

    Raises: OSError.
    """
    try:
        fd = open_pin(path)
    except FileNotFoundError:
        return False
    try:
        if cgroup_info(fd)[0] == home:
            update(fd, prog_fd)
            return True
    finally:
        os.close(fd)
    detach_pin(path)
    return False


def attach_verdict(prog_fd: int, map_fd: int) -> None:
    """Judge the messages of sockets that enter a map of sockets from now on.

    Raises: OSError.
    """
    libbpf.call("bpf_prog_attach", prog_fd, map_fd, libbpf.BPF_SK_MSG_VERDICT, 0)
