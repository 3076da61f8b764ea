# SPDX-License-Identifier: Apache-2.0
"""Connections as fast as one process makes them, each told: who answered, and when it was made.

storm.py serve PORT                   answers TCP and UDP of both families with the address asked
storm.py connect PORT VIP...          a line each: "MADE RETURNED TOLD KIND VIP ADDRESS", seconds
                                      of the monotonic clock before and after connect(), and when
                                      the answer was there

Both take what others leave of the processors: a storm as strong as the machine allows, beside which
those who change things still get their turn at once.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv6Address
from pathlib import Path

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
KINDS = {"tcp": TCP, "udp": UDP}
ABORTED = ConnectionAbortedError.__name__  # a socket that shuntd closed
NICE = 5


def text(raw: str) -> bytes:
    """An address as a socket of both families has it, as people write it."""
    address = IPv6Address(raw)
    return str(address.ipv4_mapped or address).encode()


def serve_streams(port: int) -> None:
    server = socket.create_server(
        ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096
    )
    while True:
        sock, _peer = server.accept()
        with sock, contextlib.suppress(OSError):
            sock.sendall(text(sock.getsockname()[0]))


def serve_datagrams(port: int) -> None:
    server = socket.socket(socket.AF_INET6, UDP)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    server.bind(("", port))
    while True:
        _data, ancillary, _flags, peer = server.recvmsg(100, 100)
        own = ancillary[0][2][:16]
        source = (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, own + bytes(4))
        with contextlib.suppress(OSError):
            server.sendmsg([text(socket.inet_ntop(socket.AF_INET6, own))], [source], 0, peer)


def connect(port: int, vips: Sequence[str]) -> None:
    """Until somebody ends this process."""
    for vip, kind in itertools.cycle(itertools.product(vips, ("tcp", "udp", "tcp"))):
        family = socket.AF_INET6 if ":" in vip else socket.AF_INET
        with socket.socket(family, KINDS[kind]) as sock:
            made = returned = time.monotonic()
            try:
                sock.setblocking(False)  # the backend is chosen in the call; who waits learns less
                with contextlib.suppress(BlockingIOError):
                    sock.connect((vip, port))
                returned = time.monotonic()
                sock.settimeout(5)
                if kind == "udp":
                    sock.send(b"?")
                answer = sock.recv(100).decode()
                peer = sock.getpeername()[0]
                if peer != vip:
                    answer = f"the-peer-is-{peer}"
            except OSError as e:
                answer = type(e).__name__
            told = time.monotonic()
            print(f"{made:.6f} {returned:.6f} {told:.6f} {kind} {vip} {answer}", flush=True)


@dataclass(frozen=True)
class Made:
    """One connection."""

    made: float
    returned: float
    told: float
    kind: str
    vip: str
    answer: str


class Log:
    """What `connect` tells into a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.made = path, list[Made]()
        self._read = 0

    def read(self) -> list[Made]:
        """All that it has told so far."""
        with self.path.open("rb") as file:
            file.seek(self._read)
            whole = file.read().rpartition(b"\n")[0]
        for line in whole.decode().splitlines():
            a, b, c, *names = line.split(" ")
            self.made.append(Made(float(a), float(b), float(c), *names))
        self._read += len(whole) + bool(whole)
        return self.made


@dataclass(frozen=True)
class Set:
    """The backends of a service: who gets new connections, and who keeps those that are there."""

    open: frozenset[str]
    kept: frozenset[str]


class Sets:
    """Which backends a service had when, as whoever changed them knows it."""

    def __init__(self, first: Set) -> None:
        self.sets, self.begun = [first], [0.0]
        self.done, self.in_force = [0.0], [0]  # when that set was known to be in force

    @property
    def last(self) -> Set:
        return self.sets[-1]

    def change(self, to: Set) -> None:
        """A change begins now. If the agent is killed, it may be in force or not."""
        self.sets.append(to)
        self.begun.append(time.monotonic())

    def changed(self) -> None:
        """The last one was answered: it is in force."""
        self.done.append(time.monotonic())
        self.in_force.append(len(self.sets) - 1)

    def between(self, begin: float, end: float) -> list[Set]:
        """The set in force before that time, and those that came until it ended."""
        first = self.in_force[bisect_right(self.done, begin) - 1]
        return self.sets[first : bisect_right(self.begun, end)]

    def allowed(self, one: Made) -> frozenset[str]:
        """What may have become of this connection: backends that took new ones while connect() had
        not returned, or of UDP that its backend went before it had answered."""
        found = frozenset().union(*(each.open for each in self.between(one.made, one.returned)))
        kept = [each.kept for each in self.between(one.made, one.told)]
        went = frozenset().union(*kept) - kept[0].intersection(*kept)
        return found | {ABORTED} if one.kind == "udp" and went else found

    def apart_s(self) -> list[float]:
        """How long after the one before each change was in force."""
        return [b - a for a, b in itertools.pairwise(self.done[1:])]


def give_way() -> None:
    """To everybody who wants a processor. Where each session is a group of its own, the group."""
    os.nice(NICE)
    with contextlib.suppress(FileNotFoundError):
        Path("/proc/self/autogroup").write_text(str(NICE))


if __name__ == "__main__":
    give_way()
    if sys.argv[1] == "serve":
        threading.Thread(target=serve_datagrams, args=(int(sys.argv[2]),), daemon=True).start()
        serve_streams(int(sys.argv[2]))
    else:
        connect(int(sys.argv[2]), sys.argv[3:])
