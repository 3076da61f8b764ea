# SPDX-License-Identifier: Apache-2.0
"""TC programs on an interface: by TCX links, or as filters of a clsact qdisc.

Others may have programs there too. Ours is put after those that are there and says "next", so that
whoever comes after it sees the packet as well.
"""

from __future__ import annotations

import ctypes as c
import errno
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from pyroute2.netlink.rtnl import RTM_GETQDISC, RTM_GETTFILTER  # type: ignore[import-untyped]
from pyroute2.netlink.rtnl.tcmsg import tcmsg  # type: ignore[import-untyped]

from shunt.kern import libbpf
from shunt.kern.netlink import Netlink
from shunt.lb.errors import ShuntError


class Direction(IntEnum):
    """enum bpf_tc_attach_point"""

    INGRESS = libbpf.BPF_TC_INGRESS
    EGRESS = libbpf.BPF_TC_EGRESS


_TCX = {
    Direction.INGRESS: libbpf.BPF_TCX_INGRESS,
    Direction.EGRESS: libbpf.BPF_TCX_EGRESS,
}
# linux/pkt_sched.h: where the filters of a clsact qdisc hang.
_PARENTS = {Direction.INGRESS: 0xFFFFFFF2, Direction.EGRESS: 0xFFFFFFF3}
# Of our filters: what tells them from others', and the first priority that is tried. The kernel
# gives those who name none 49152 and below.
HANDLE = 0x5348554E
PRIORITY = 50000


@dataclass(frozen=True)
class Filter:
    """A filter of a clsact qdisc. `name` is empty unless it is a BPF program."""

    priority: int
    handle: int
    kind: str
    name: str
    prog_id: int


def attach_link(prog_fd: int, ifindex: int, direction: Direction) -> int:
    """Attach by a TCX link, after the programs that are there; returns its descriptor.

    Raises: OSError (EINVAL: the kernel has no TCX).
    """
    opts = libbpf.LinkCreateOpts(sz=c.sizeof(libbpf.LinkCreateOpts))
    return libbpf.call("bpf_link_create", prog_fd, ifindex, _TCX[direction], opts)


def filters(ifindex: int, direction: Direction) -> list[Filter]:
    """The filters of the interface's clsact qdisc, in the order in which they run.

    Raises: OSError.
    """
    with Netlink() as netlink:
        return sorted(_filters(netlink, ifindex, direction), key=lambda f: f.priority)


def _filters(netlink: Netlink, ifindex: int, direction: Direction) -> Iterator[Filter]:
    for answer in _dump(netlink, RTM_GETTFILTER, ifindex, _PARENTS[direction]):
        options = answer.get_attr("TCA_OPTIONS")
        # Each priority is announced once without a filter.
        if answer["handle"] and answer["parent"] == _PARENTS[direction]:
            bpf = answer.get_attr("TCA_KIND") == "bpf" and options is not None
            yield Filter(
                answer["info"] >> 16,
                answer["handle"],
                str(answer.get_attr("TCA_KIND")),
                str(options.get_attr("TCA_BPF_NAME") or "") if bpf else "",
                int(options.get_attr("TCA_BPF_ID") or 0) if bpf else 0,
            )


def _dump(netlink: Netlink, kind: int, ifindex: int, parent: int) -> list[Any]:
    message = tcmsg()
    message["index"], message["parent"] = ifindex, parent
    return [answer for answer in netlink.dump(kind, message) if answer["index"] == ifindex]


def qdiscs(ifindex: int) -> set[str]:
    """The kinds of the interface's qdiscs.

    Raises: OSError.
    """
    with Netlink() as netlink:
        return {
            str(answer.get_attr("TCA_KIND")) for answer in _dump(netlink, RTM_GETQDISC, ifindex, 0)
        }


def create_clsact(ifindex: int, name: str) -> bool:
    """Give the interface a clsact qdisc; whether it had none.

    Raises: ShuntError if an `ingress` qdisc is in its place; OSError.
    """
    try:
        libbpf.call("bpf_tc_hook_create", _hook(ifindex, Direction.INGRESS))
    except FileExistsError:
        if "clsact" not in qdiscs(ifindex):
            raise ShuntError(
                f"{name} has an ingress qdisc, which leaves no room for a clsact qdisc",
                "programs for packets that leave hang on clsact alone, and this kernel has no TCX",
                f"replace it: tc qdisc del dev {name} ingress; tc qdisc add dev {name} clsact"
                " (its filters work there too), or boot Linux 6.6 or later",
            ) from None
        return False
    return True


def remove_clsact(ifindex: int) -> bool:
    """Take the clsact qdisc away again, unless somebody has filters on it; whether it went.

    Raises: OSError.
    """
    if any(filters(ifindex, direction) for direction in Direction):
        return False
    both = Direction.INGRESS | Direction.EGRESS
    libbpf.call("bpf_tc_hook_destroy", _hook(ifindex, both))
    return True


def our_filters(ifindex: int, direction: Direction, program: str) -> list[Filter]:
    """The filters there that are ours: our handle, and a program of this name."""
    return [
        one
        for one in filters(ifindex, direction)
        if one.handle == HANDLE and one.name.partition(":")[0] == program
    ]


def attach_filter(prog_fd: int, ifindex: int, direction: Direction, program: str) -> None:
    """Attach as a filter, or swap the program of ours that is there; no packet sees neither.

    Raises: OSError.
    """
    if found := our_filters(ifindex, direction, program):
        opts = _opts(found[0].priority, prog_fd=prog_fd, flags=libbpf.BPF_TC_F_REPLACE)
        libbpf.call("bpf_tc_attach", _hook(ifindex, direction), opts)
        return
    taken = {one.priority for one in filters(ifindex, direction)}
    # Somebody may take the same one meanwhile.
    for priority in (p for p in range(max({PRIORITY - 1, *taken}) + 1, 65536)):
        try:
            opts = _opts(priority, prog_fd=prog_fd)
            libbpf.call("bpf_tc_attach", _hook(ifindex, direction), opts)
            return
        except OSError as e:
            if e.errno not in (errno.EEXIST, errno.EINVAL) or priority not in {
                one.priority for one in filters(ifindex, direction)
            }:
                raise
    raise OSError(errno.ENOSPC, "every priority after the filters that are there is taken")


def detach_filter(ifindex: int, direction: Direction, program: str) -> bool:
    """Remove our filter; whether there was one.

    Raises: OSError.
    """
    found = our_filters(ifindex, direction, program)
    for one in found:
        libbpf.call("bpf_tc_detach", _hook(ifindex, direction), _opts(one.priority))
    return bool(found)


def _hook(ifindex: int, point: int) -> libbpf.TcHook:
    return libbpf.TcHook(sz=c.sizeof(libbpf.TcHook), ifindex=ifindex, attach_point=int(point))


def _opts(priority: int, **fields: int) -> libbpf.TcOpts:
    return libbpf.TcOpts(sz=c.sizeof(libbpf.TcOpts), handle=HANDLE, priority=priority, **fields)
