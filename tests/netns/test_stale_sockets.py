# SPDX-License-Identifier: Apache-2.0
"""Sockets whose backends go while shuntd runs, or while it does not: who is closed, and who is not.

socket_node.py draws the node.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from shunt.sockops.stale import method
from tests.netns.socket_node import BE2, Node, a_node, say, say_to
from tests.netns.stale import (
    BACKENDS,
    GOES_ON,
    MAPPED,
    VIP,
    VIP6,
    Sockets,
    aborted,
    closing,
    fate,
    only_stale,
    serve,
    swept,
)

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
CHECKED = "203.0.113.10"
BOTH = 2  # sweeps: a change's own, and the one a second after it


@pytest.fixture(scope="module")
def around() -> Iterator[Node]:
    with a_node("stale", dns=False) as node:
        only_stale(node, "checked")
        yield node


@pytest.fixture
def node(around: Node) -> Iterator[Node]:
    """With a daemon and pins of its own for each test."""
    around.settings()
    serve(around, wait=False)
    around.start()
    around.until(lambda: closing(around)["sweeps"] > 0, "sweeps when it starts")
    try:
        yield around
    finally:
        around.close()
        around.process = None


# Who is closed -------------------------------------------------------------------------------


@pytest.mark.parametrize("vip", [VIP, MAPPED, VIP6], ids=["4", "mapped", "6"])
def test_connected_datagram_sockets_of_a_removed_backend(node: Node, vip: str) -> None:
    """Exactly those; TCP goes on, and so does who is connected to the backend itself."""
    with contextlib.ExitStack() as stack:
        udp, tcp = (Sockets(stack, node, vip, kind) for kind in (UDP, TCP))
        itself = ("::ffff:" if vip == MAPPED else "") + BACKENDS[vip][1]
        direct = [stack.enter_context(node.connected(itself, kind=kind)) for kind in (UDP, TCP)]
        sweeps_before = closing(node)
        assert (sweeps_before["udp"], sweeps_before["by"]) == (0, "iterator")
        with swept(node, BOTH):
            serve(node, 1)
            aborted(node, udp.of["be2"])
            for sock in udp.of["be2"]:
                sock.connect((vip, 7))
                assert say(sock) == "be1", "the same socket may connect again"
        assert udp.answered("be1")
        assert tcp.answered("be1")
        assert tcp.answered("be2")
        assert [say(sock) for sock in direct] == ["be2", "be2"]
        shown = closing(node)
        assert (shown["udp"], shown["tcp"], shown["left"]) == (len(udp.of["be2"]), 0, 0)
    lines = [line for line in node.log.read_text().splitlines() if "that have gone" in line]
    assert len(lines) >= 1
    assert f"that have gone: {len(udp.of['be2'])} UDP ({method()}; " in lines[-1], (
        "one line a sweep"
    )
    metrics = node.shunt("metrics").out
    assert f'shunt_sockets_closed_total{{protocol="udp"}} {len(udp.of["be2"])}.0' in metrics
    assert 'shunt_sockets_closed_total{protocol="tcp"} 0.0' in metrics
    assert "shunt_sockets_stale 0.0" in metrics
    assert f"closed after backends went: {len(udp.of['be2'])} UDP\n" in node.shunt("status").out


@pytest.mark.parametrize("vip", [VIP, MAPPED, VIP6], ids=["4", "mapped", "6"])
def test_tcp_if_that_is_asked_for(node: Node, vip: str) -> None:
    node.settings(sockets={"close": "all"})
    with contextlib.ExitStack() as stack:
        udp, tcp = (Sockets(stack, node, vip, kind) for kind in (UDP, TCP))
        direct = stack.enter_context(node.connected(BACKENDS[vip][1]))
        half = tcp.of["be2"][0]
        half.shutdown(socket.SHUT_WR)  # and waits for the rest of an answer
        serve(node, 1)
        aborted(node, udp.of["be2"] + tcp.of["be2"][1:])
        assert fate(half) in {errno.ECONNABORTED, "closed by the other side"}
        assert udp.answered("be1")
        assert tcp.answered("be1")
        assert say(direct) == "be2"
        node.until(lambda: closing(node)["udp"] == len(udp.of["be2"]), "counted")
        assert closing(node)["tcp"] in {len(tcp.of["be2"]), len(tcp.of["be2"]) - 1}


@contextlib.contextmanager
def without_be2(node: Node) -> Iterator[None]:
    """Its servers are killed, and have been missed; afterwards they are back."""

    def state() -> str:
        return str(node.backend("checked", BE2)["state"])

    node.servers["be2"].kill()
    try:
        node.until(lambda: state() == "failing", "is missed")
        yield
    finally:
        node.servers["be2"].start()
        node.servers["be2"].wait_ready()
    node.until(lambda: state() == "up", "is up again")


def test_a_backend_that_fails_its_checks(node: Node) -> None:
    node.until(lambda: node.backend("checked", BE2)["state"] == "up", "is up")
    with contextlib.ExitStack() as stack:
        udp = Sockets(stack, node, CHECKED, UDP)
        with without_be2(node):
            aborted(node, udp.of["be2"])
            assert udp.answered("be1")
            assert closing(node)["udp"] == len(udp.of["be2"])


def test_a_drained_backend_keeps_what_it_has(node: Node) -> None:
    with contextlib.ExitStack() as stack:
        udp = Sockets(stack, node, VIP, UDP)
        with swept(node, BOTH):
            assert node.shunt("backend", "drain", "stale-four", BE2).code == 0
        assert udp.answered("be2")
        assert closing(node)["udp"] == 0


def test_sockets_that_are_not_connected_any_more(node: Node) -> None:
    """One was, to the backend; and one never was: its next datagram goes elsewhere."""
    with contextlib.ExitStack() as stack:
        udp = Sockets(stack, node, VIP, UDP)
        was = udp.of["be2"][0]
        unspecified = ctypes.create_string_buffer(16)
        assert ctypes.CDLL(None).connect(was.fileno(), unspecified, 16) == 0
        never = stack.enter_context(node.client(kind=UDP))
        while say_to(never, VIP)[0] != "be2":
            never = stack.enter_context(node.client(kind=UDP))
        serve(node, 1)
        aborted(node, udp.of["be2"][1:])
        for sock in (was, never):
            assert fate(sock) is GOES_ON
            assert say_to(sock, VIP) == ("be1", (VIP, 7))
        assert closing(node)["udp"] == len(udp.of["be2"]) - 1


def test_whoever_sends_first_is_told_so_too(node: Node) -> None:
    with contextlib.ExitStack() as stack:
        udp = Sockets(stack, node, VIP, UDP)
        sock = udp.of["be2"][0]
        with swept(node, BOTH):
            serve(node, 1)
        with pytest.raises(OSError, match=os.strerror(errno.EDESTADDRREQ)):
            sock.send(b"question")
        assert fate(sock) == errno.ECONNABORTED


def test_nothing_is_closed_with_close_off(node: Node) -> None:
    node.settings(sockets={"close": "off"})
    with contextlib.ExitStack() as stack:
        udp = Sockets(stack, node, VIP, UDP)
        serve(node, 1)
        time.sleep(2)
        assert udp.answered("be2")
        shown = closing(node)
        assert (shown["which"], shown["by"], shown["udp"]) == ("off", "", 0)
        node.settings(sockets={"close": "udp"})
        aborted(node, udp.of["be2"])


# The daemon ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["restart", "kill -9"])
def test_a_backend_that_went_while_shuntd_was_down(node: Node, number: int) -> None:
    with contextlib.ExitStack() as stack:
        udp = Sockets(stack, node, VIP, UDP)
        assert node.process is not None
        node.process.popen.send_signal(number)
        node.process.popen.wait()
        serve(node, 1, wait=False)
        assert udp.answered("be2")
        node.start()
        aborted(node, udp.of["be2"])
        assert udp.answered("be1")
        with node.connected(VIP, kind=UDP) as sock:
            assert say(sock) == "be1"


def test_what_becomes_up_again_keeps_its_sockets(node: Node) -> None:
    """It is the tables at the time of closing that count, not what went on before."""
    node.settings(sockets={"close": "off"})
    node.until(lambda: node.backend("checked", BE2)["state"] == "up", "is up")
    with contextlib.ExitStack() as stack:
        udp = Sockets(stack, node, CHECKED, UDP)
        with without_be2(node):
            pass
        with swept(node, 1):
            node.settings(sockets={"close": "udp"})
        assert udp.answered("be2")
        assert closing(node)["udp"] == 0


# Races ---------------------------------------------------------------------------------------


def test_none_is_missed_in_a_storm(node: Node) -> None:
    """Sockets are connected all the time while a backend comes and goes, at last for good."""
    made: list[socket.socket] = []
    stop = threading.Event()

    def connect() -> None:
        with node.here.inside():
            while not stop.is_set() and len(made) < 6000:
                sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                made.append(sock)
                sock.connect((VIP, 7))

    threads = [threading.Thread(target=connect) for _ in range(2)]
    try:
        for thread in threads:
            thread.start()
        for _ in range(3):
            serve(node, 1)
            serve(node, 1, 2)
        with swept(node, BOTH):
            serve(node, 1)
            stop.set()
            for thread in threads:
                thread.join()
        alive = [sock for sock in made if fate(sock) is GOES_ON]
        assert {sock.getpeername() for sock in alive} == {(VIP, 7)}
        assert {say(sock) for sock in alive[-1500:]} == {"be1"}
        assert len(alive) < len(made)
        assert closing(node)["udp"] == len(made) - len(alive)
    finally:
        stop.set()
        for sock in made:
            sock.close()
