# SPDX-License-Identifier: Apache-2.0
"""A service whose backends come and go, and what becomes of sockets that are connected to it."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from typing import Any

from tests.netns.socket_node import BE1, BE2, SIX1, SIX2, Node, say

# Programs for all namespaces are for those of another run, too: to each its own.
_RUN = os.getpid() % 0xFFFF + 1
VIP, VIP6 = f"198.19.{_RUN >> 8}.{_RUN & 0xFF}", f"2001:db8::20:{_RUN:x}"
MAPPED = f"::ffff:{VIP}"
BACKENDS = {VIP: (BE1, BE2), MAPPED: (BE1, BE2), VIP6: (SIX1, SIX2)}
MANY = 24  # of two backends both are seen, but for one time in ten million
GOES_ON = object()


def generation_of(node: Node) -> int:
    return int(node.shunt("status", "-o", "json").json["generation"])


def only_stale(node: Node, *others: str) -> None:
    """No VIP of other runs' nodes is this one's; and fewer services are sooner in force."""
    for path in node.services.iterdir():
        if path.stem not in others:
            path.unlink()


def serve(node: Node, *numbers: int, wait: bool = True) -> None:
    """Have only these of the two backends, in both families; both if none is named."""
    generation = generation_of(node) if wait else 0
    for name, vip in (("four", VIP), ("six", VIP6)):
        backends = [BACKENDS[vip][n - 1] for n in numbers or (1, 2)]
        document = {"name": f"stale-{name}", "vip": vip, "ports": [7, "7/udp", "53/udp"]}
        node.write(f"stale-{name}", {**document, "backends": backends})
    if wait:
        node.until(lambda: generation_of(node) > generation, "in force")


def closing(node: Node) -> Any:
    """Of `shunt status`, which may have other problems to tell of."""
    return node.shunt("status", "-o", "json").json["sockets"]["closing"]


@contextlib.contextmanager
def swept(node: Node, times: int) -> Iterator[None]:
    """So many sweeps have ended since the beginning when this does. What leads to them is within: a
    sweep may be over before whoever asked for it has its answer."""
    before = closing(node)["sweeps"]
    yield
    node.until(lambda: closing(node)["sweeps"] >= before + times, "sweeps")


def fate(sock: socket.socket) -> object:
    """The error that a socket has, without waiting for one."""
    sock.setblocking(False)
    try:
        sock.recv(1)
    except BlockingIOError:
        return GOES_ON
    except OSError as e:
        return e.errno
    finally:
        sock.settimeout(5)
    return "closed by the other side"


class Sockets:
    """Connected ones, by who answers them."""

    def __init__(self, stack: contextlib.ExitStack, node: Node, vip: str, kind: int,
                 many: int = MANY) -> None:  # fmt: skip
        self.of: dict[str, list[socket.socket]] = {"be1": [], "be2": []}
        for _ in range(many):
            sock = stack.enter_context(node.connected(vip, kind=kind))
            self.of[say(sock)].append(sock)

    def answered(self, by: str) -> bool:
        return {say(sock) for sock in self.of[by]} == {by}

    def fates(self, by: str) -> set[object]:
        return {fate(sock) for sock in self.of[by]}


def aborted(node: Node, sockets: list[socket.socket]) -> None:
    """All of them are, within a moment; and each tells it once."""
    waiting = set(sockets)

    def none_is_left() -> bool:
        for sock in list(waiting):
            found = fate(sock)
            if found is not GOES_ON:
                assert found == errno.ECONNABORTED
                waiting.remove(sock)
        return not waiting

    node.until(none_is_left, "closed", 10)
