# SPDX-License-Identifier: Apache-2.0
"""TC programs on interfaces: attached, swapped, taken away.

Under the pin directory stand, for each interface that has them, tc/INTERFACE/DIRECTION: the TCX
link. Without TCX the directory stands alone, with clsact/ in it if the qdisc is ours.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path

from shunt.kern import features, links, tc
from shunt.kern.netlink import Netlink
from shunt.kern.objects import open_pin, pin
from shunt.kern.tc import Direction
from shunt.lb.errors import ShuntError
from shunt.xdp.attach import pin_name

PROGRAMS = {Direction.INGRESS: "shunt_ingress", Direction.EGRESS: "shunt_egress"}
CLSACT = "clsact"


def attach(
    bpffs: Path, interfaces: Iterable[str], programs: Mapping[Direction, int], *, use_tcx: bool
) -> None:
    """Attach to these interfaces and to no others; swap the programs where they are attached.

    `programs` are descriptors. The program for replies first, so that none is ever missed.
    Raises: ShuntError if an interface is absent or down, or has no room. The others are as before.
    """
    names = list(interfaces)
    with Netlink() as netlink:
        found = {name: netlink.link(name).ifindex for name in names}
    for name, ifindex in found.items():
        directory = bpffs / "tc" / pin_name(name)
        directory.mkdir(parents=True, exist_ok=True)
        _forget_predecessor(directory, ifindex)
        for direction in (Direction.EGRESS, Direction.INGRESS):
            try:
                if use_tcx:
                    _link(directory, ifindex, direction, programs[direction])
                else:
                    _filter(directory, name, ifindex, direction, programs[direction])
            except OSError as e:
                raise ShuntError(
                    f"cannot attach a TC program to {name} ({direction.name.lower()})",
                    str(e.strerror),
                    "see `shunt doctor` for what this kernel lacks, and what else is attached"
                    f" there: bpftool net show dev {name}",
                ) from e
    for directory in _directories(bpffs):
        if directory.name not in {pin_name(name) for name in names}:
            _detach(directory)


def tcx_here() -> bool:
    """Whether the kernel has TCX links."""
    return features.tcx().present


def attached(bpffs: Path) -> dict[str, str]:
    """How the interfaces have the programs now, tcx or clsact. Shape: by interface."""
    found = {}
    for directory in _directories(bpffs):
        name = _interface_of(directory)
        with contextlib.suppress(OSError):  # the interface has gone
            ifindex = socket.if_nametoindex(name)
            if all(_linked(directory / d.name.lower(), ifindex) for d in Direction):
                found[name] = "tcx"
            elif all(tc.our_filters(ifindex, d, PROGRAMS[d]) for d in Direction):
                found[name] = "clsact"
    return found


def _linked(path: Path, ifindex: int) -> bool:
    try:
        fd = open_pin(path)
    except FileNotFoundError:
        return False
    try:
        return links.info(fd)[0] == ifindex
    finally:
        os.close(fd)


def _interface_of(directory: Path) -> str:
    """The inverse of pin_name."""
    return directory.name.replace("%2E", ".").replace("%25", "%")


def _link(directory: Path, ifindex: int, direction: Direction, prog_fd: int) -> None:
    path = directory / direction.name.lower()
    if path.exists():
        fd = open_pin(path)
        try:
            links.update(fd, prog_fd)
        finally:
            os.close(fd)
        return
    fd = tc.attach_link(prog_fd, ifindex, direction)
    try:
        pin(fd, path)
    finally:
        os.close(fd)
    # Of a kernel that had no TCX, or of a start that was told not to use it.
    tc.detach_filter(ifindex, direction, PROGRAMS[direction])


def _filter(directory: Path, name: str, ifindex: int, direction: Direction, prog_fd: int) -> None:
    if CLSACT not in tc.qdiscs(ifindex):
        # The mark first: a qdisc that nobody remembers would stay.
        (directory / CLSACT).mkdir(exist_ok=True)
        tc.create_clsact(ifindex, name)
    tc.attach_filter(prog_fd, ifindex, direction, PROGRAMS[direction])


def _forget_predecessor(directory: Path, ifindex: int) -> None:
    """Remove the pins of an interface that has gone and come again."""
    for path in _link_pins(directory):
        fd = open_pin(path)
        try:
            gone = links.info(fd)[0] != ifindex
        finally:
            os.close(fd)
        if gone:
            path.unlink()


def _link_pins(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.name != CLSACT]


def _directories(bpffs: Path) -> list[Path]:
    root = bpffs / "tc"
    return sorted(root.iterdir()) if root.is_dir() else []


def _detach(directory: Path) -> list[str]:
    """Take away what is on one interface; says what. The program for replies goes last."""
    removed = []
    for path in sorted(_link_pins(directory), reverse=True):
        links.detach_pin(path)
        removed.append(str(path))
    name = _interface_of(directory)
    with contextlib.suppress(OSError):  # the interface has gone
        ifindex = socket.if_nametoindex(name)
        for direction in Direction:
            if tc.detach_filter(ifindex, direction, PROGRAMS[direction]):
                removed.append(f"{direction.name.lower()} filter of {name}")
        if (directory / CLSACT).is_dir() and tc.remove_clsact(ifindex):
            removed.append(f"clsact qdisc of {name}")
    if (directory / CLSACT).is_dir():
        (directory / CLSACT).rmdir()
    directory.rmdir()
    return removed


def cleanup(bpffs: Path) -> list[str]:
    """Detach all that is attached from there; says what was removed."""
    removed = [line for directory in _directories(bpffs) for line in _detach(directory)]
    if (bpffs / "tc").is_dir():
        (bpffs / "tc").rmdir()
    return removed
