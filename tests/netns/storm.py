# SPDX-License-Identifier: Apache-2.0
"""Connections as fast as one process makes them, each told: who answered, and when it was made.

storm.py serve PORT                   answers TCP and UDP with the address that was asked
storm.py connect PORT VIP...          "MADE RETURNED VIP ADDRESS" a line, seconds of the
                                      monotonic clock before and after connect()
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
IP_PKTINFO = 8


def serve_streams(port: int) -> None:
    server = socket.create_server(("", port), backlog=4096)
    while True:
        sock, _peer = server.accept()
        with sock, contextlib.suppress(OSError):
            sock.sendall(sock.getsockname()[0].encode())


def serve_datagrams(port: int) -> None:
    server = socket.socket(socket.AF_INET, UDP)
    server.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
    server.bind(("", port))
    while True:
        _data, ancillary, _flags, peer = server.recvmsg(100, 100)
        own = ancillary[0][2][8:12]
        source = struct.pack("=i4s4x", 0, own)
        answer = socket.inet_ntoa(own).encode()
        with contextlib.suppress(OSError):
            server.sendmsg([answer], [(socket.IPPROTO_IP, IP_PKTINFO, source)], 0, peer)


def connect(port: int, vips: Sequence[str]) -> None:
    """Until somebody ends this process."""
    for vip, kind in itertools.cycle(itertools.product(vips, (TCP, UDP, TCP))):
        with socket.socket(socket.AF_INET, kind) as sock:
            sock.settimeout(5)
            made = returned = time.monotonic()
            try:
                sock.connect((vip, port))
                returned = time.monotonic()
                if kind == UDP:
                    sock.send(b"?")
                answer = sock.recv(100).decode()
                peer = sock.getpeername()[0]
                if peer != vip:
                    answer = f"the-peer-is-{peer}"
            except OSError as e:
                answer = type(e).__name__
            print(f"{made:.6f} {returned:.6f} {vip} {answer}", flush=True)


@dataclass(frozen=True)
class Made:
    """One connection."""

    made: float
    returned: float
    vip: str
    answer: str


def read(log: Path) -> list[Made]:
    """What `connect` has told so far."""
    rows = [line.split(" ") for line in log.read_text().splitlines(keepends=True)]
    return [
        Made(float(a), float(b), vip, answer.strip())
        for a, b, vip, answer in (row for row in rows if len(row) == 4 and row[3][-1] == "\n")
    ]


class Sets:
    """Which backends a service had when, as whoever changed them knows it."""

    def __init__(self, first: frozenset[str]) -> None:
        self.sets, self.begun = [first], [0.0]
        self.done, self.in_force = [0.0], [0]  # when that set was known to be in force

    def change(self, to: frozenset[str]) -> None:
        """A change begins now. If the agent is killed, it may be in force or not."""
        self.sets.append(to)
        self.begun.append(time.monotonic())

    def changed(self) -> None:
        """The last one was answered: it is in force."""
        self.done.append(time.monotonic())
        self.in_force.append(len(self.sets) - 1)

    def allowed(self, one: Made) -> frozenset[str]:
        """Who may have got this connection: the set in force before it, or one that came while
        connect() had not returned."""
        first = self.in_force[bisect_right(self.done, one.made) - 1]
        last = bisect_right(self.begun, one.returned)
        return frozenset().union(*self.sets[first:last])


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        threading.Thread(target=serve_datagrams, args=(int(sys.argv[2]),), daemon=True).start()
        serve_streams(int(sys.argv[2]))
    else:
        connect(int(sys.argv[2]), sys.argv[3:])
