# SPDX-License-Identifier: Apache-2.0
"""The way of health checks through the VIP: marked packets, wrapped or sent to a MAC as clients'.

Nothing is pinned. What a process left that was killed is replaced by the next, or taken away by
`shunt cleanup`.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from shunt.kern import diversion, tc
from shunt.kern.maps import Map
from shunt.kern.netlink import Netlink
from shunt.kern.objects import Object, Program
from shunt.kern.tc import Direction
from shunt.lb.compile import mapped
from shunt.lb.model import Settings
from shunt.lb.slots import BACKEND_BITS

OBJECT = Path(__file__).parent / "check.bpf.o"
PROGRAM = "shunt_check"
LOOPBACK = "lo"
MARK_MASK = 0xFFFFFFFF >> BACKEND_BITS << BACKEND_BITS


class CheckPath:
    """The program at the loopback device, and the rule that has checks' packets go there."""

    def __init__(self, maps: Mapping[str, Map], settings: Settings) -> None:
        """Raises: ShuntError, OSError if the kernel refuses. Nothing stays then."""
        self._object = Object(OBJECT)
        try:
            for name in self._object.map_names():
                self._object.set_entries({name: maps[name].spec.entries})
                self._object.reuse(name, maps[name].fd, name)
            config = self._object.variable(".rodata", "config")
            for number, net in (("4", settings.ipip_source4), ("6", settings.ipip_source6)):
                config[f"saddr{number}"] = np.frombuffer(mapped(net.network_address), np.uint8)
                config[f"spread{number}"] = int(net.hostmask) & 0xFFFFFFFF
            mark = settings.check_mark << BACKEND_BITS
            config["mark"] = mark
            self._object.load()
            attach(self.prog_fd)
            with Netlink() as netlink:
                diversion.divert(netlink, mark, MARK_MASK, settings.check_table)
        except BaseException:
            self.close()
            raise

    @property
    def programs(self) -> list[Program]:
        return list(self._object.programs.values())

    @property
    def prog_fd(self) -> int:
        return self._object.programs[PROGRAM].fd

    def close(self) -> None:
        """Take it all away."""
        cleanup()
        self._object.close()


def attach(prog_fd: int) -> None:
    """Have the program run on what leaves the loopback device, in a predecessor's place.

    Raises: ShuntError, OSError.
    """
    ifindex = socket.if_nametoindex(LOOPBACK)
    tc.create_clsact(ifindex, LOOPBACK)
    tc.attach_filter(prog_fd, ifindex, Direction.EGRESS, PROGRAM)


def cleanup() -> list[str]:
    """Take away what any process left; says what it was."""
    removed = []
    with Netlink() as netlink:
        if rules := diversion.restore(netlink):
            removed.append(f"{rules} rules that lead checks to the loopback device")
    ifindex = socket.if_nametoindex(LOOPBACK)
    if tc.detach_filter(ifindex, Direction.EGRESS, PROGRAM):
        tc.remove_clsact(ifindex)
        removed.append(f"the program {PROGRAM} at the loopback device")
    return removed
