# SPDX-License-Identifier: Apache-2.0
"""What the kernel and its drivers lost of what programs sent, counted from their tracepoints.

Nothing is pinned: it counts as long as whoever attached it lives.
"""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from shunt.kern import links, namespace
from shunt.kern.objects import Object, Program

OBJECT = Path(__file__).parent / "trace.bpf.o"


@dataclass(frozen=True, slots=True)
class Loss:
    """Frames of one interface that were lost in one way."""

    interface: str  # empty if it has gone
    kind: str  # of enum loss
    error: str  # errno's name; empty where the driver named none
    frames: int


class Trace:
    """The trace programs, attached for this network namespace's interfaces."""

    def __init__(self) -> None:
        """Raises: ShuntError, OSError if this kernel lacks the tracepoints. Nothing stays then."""
        self._links: list[int] = []
        self._obj = Object(OBJECT)
        try:
            config = self._obj.variable(".rodata", "config")
            config["netns_inum"] = namespace.inode()
            self._obj.load()
            self._kinds = self._obj.btf.enum("loss", "LOSS_")
            for program in self._obj.programs.values():
                self._links.append(links.attach_tracing(program.fd))
        except BaseException:
            self.close()
            raise

    @property
    def programs(self) -> list[Program]:
        """What is attached."""
        return list(self._obj.programs.values())

    def losses(self) -> list[Loss]:
        """All that were counted, by interface."""
        keys, values = self._obj.maps["losses"].items()
        found = [
            Loss(
                interface=_name(int(key["ifindex"])),
                kind=self._kinds(int(key["kind"])).name,
                error=error_name(int(key["error"])),
                frames=int(value["frames"]),
            )
            for key, value in zip(keys, values, strict=True)
        ]
        return sorted(found, key=lambda loss: (loss.interface, loss.kind, loss.error))

    def close(self) -> None:
        """Count no more."""
        for fd in self._links:
            os.close(fd)
        self._links.clear()
        self._obj.close()


def error_name(number: int) -> str:
    """ENXIO for 6; a number that has no name as it is."""
    if number == errno.EOPNOTSUPP:  # Python knows it by POSIX' other name
        return "EOPNOTSUPP"
    return errno.errorcode.get(number, str(number)) if number else ""


def _name(ifindex: int) -> str:
    try:
        return socket.if_indextoname(ifindex)
    except OSError:
        return ""
