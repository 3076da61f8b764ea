# SPDX-License-Identifier: Apache-2.0
"""Redirected streams byte for byte, of programs that nobody here wrote, and beside connections that
look the same. stream_forms.py draws the node.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import select
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shunt.kern.maps import Map
from shunt.lab.netns import Namespace
from tests.netns.socket_node import BE1, SIX1
from tests.netns.stream_forms import (
    VIP,
    VIP6,
    Guarded,
    guarded,
    listening,
    made,
    pair,
    plain,
    read_all,
    rounds,
)

TALK = Path(__file__).with_name("stream_talk.py")
# `make test-streams` has a million messages on a thousand connections.
CONNECTIONS = int(os.environ.get("SHUNT_STREAM_CONNECTIONS", "200"))
MESSAGES = int(os.environ.get("SHUNT_STREAM_MESSAGES", "20000"))


@pytest.fixture(scope="module")
def ours() -> Iterator[Guarded]:
    with guarded("streams-programs") as form:
        yield form


@pytest.fixture(scope="module")
def served() -> Iterator[Guarded]:
    """With nginx on the backends."""
    with guarded("streams-served", serving=True) as form:
        yield form


@pytest.fixture
def everywhere(ours: Guarded) -> Iterator[Guarded]:
    """Connections of all network namespaces are translated."""
    ours.node.settings(sockets="all")
    yield ours
    ours.node.settings()


# Every byte ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vip", "address"), [(VIP, BE1), (VIP6, SIX1)], ids=["ipv4", "ipv6"])
def test_mixed_messages_byte_for_byte(ours: Guarded, vip: str, address: str) -> None:
    port = 6000
    each = max(1, MESSAGES // CONNECTIONS // 2)
    rest = [str(port), str(CONNECTIONS), str(each), "20"]
    with ours.server_space.inside():
        server = subprocess.Popen(
            [sys.executable, str(TALK), "serve", address, *rest], stdout=subprocess.PIPE, text=True
        )
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "listening\n"
        with ours.counted() as events:
            ours.client_space.run(sys.executable, str(TALK), "dial", vip, *rest, timeout_s=600)
            assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()
    assert events["PAIRED"] == CONNECTIONS
    assert events["TO_TCP_BUDGET"] >= CONNECTIONS // 8, "some went on by TCP"
    assert events["REDIRECTED"] > MESSAGES // 4, "and others did not"


def test_that_comparison_can_fail(ours: Guarded) -> None:
    """One byte of one connection is another."""
    rest = ["6001", "1", "10", "20"]
    with ours.server_space.inside():
        server = subprocess.Popen(
            [sys.executable, str(TALK), "serve", BE1, *rest],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert server.stdout is not None
    assert server.stdout.readline() == "listening\n"
    with made(ours.client_space, socket.AF_INET, ()) as client:
        client.connect((VIP, 6001))
        client.sendall(bytes(4) + b"other bytes")
        _, said = server.communicate(timeout=60)
    assert "after 0 bytes" in said


# What programs do --------------------------------------------------------------------------------


@pytest.mark.parametrize("vip", [VIP, VIP6])
def test_half_closed(ours: Guarded, vip: str) -> None:
    form = Guarded(ours.node, vip, SIX1 if ":" in vip else BE1)
    with ours.counted() as events, pair(form) as (client, server):
        client.sendall(b"all of it")
        client.shutdown(socket.SHUT_WR)
        assert server.recv(100) == b"all of it"
        assert server.recv(100) == b""
        server.sendall(b"answer")
        server.shutdown(socket.SHUT_WR)
        assert client.recv(100) == b"answer"
        assert client.recv(100) == b""
    assert events["REDIRECTED"] == 1


def test_closed_right_after_a_message(ours: Guarded) -> None:
    with pair(ours) as (client, server):
        client.sendall(b"last words")
        client.close()
        time.sleep(0.1)
        assert server.recv(100) == b"last words"
        assert server.recv(100) == b""


@pytest.mark.parametrize("edge", [0, select.EPOLLET], ids=["level", "edge"])
def test_epoll_wakes(ours: Guarded, edge: int) -> None:
    with pair(ours) as (client, server), select.epoll() as poller:
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)
        poller.register(client, select.EPOLLIN | edge)
        assert poller.poll(0.05) == []
        for text in (b"one", b"two"):
            threading.Timer(0.1, server.sendall, [text]).start()
            assert poller.poll(5) == [(client.fileno(), select.EPOLLIN)]
            assert client.recv(100) == text
        assert poller.poll(0.05) == []


def test_a_blocked_reader_wakes(ours: Guarded) -> None:
    with pair(ours) as (client, server):
        client.settimeout(None)
        for text in (b"redirected", b"x" * 300_000, b"by TCP"):
            threading.Timer(0.1, server.sendall, [text]).start()
            assert read_all(client, len(text)) == text


def test_asyncio(ours: Guarded) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line)
            await writer.drain()
        writer.close()

    async def ask(sock: socket.socket) -> None:
        sock.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=sock)
        for n in range(50):
            line = b"%d " % n * (n * 20 + 1) + b"\n"
            writer.write(line)
            assert await reader.readline() == line
        writer.close()
        await writer.wait_closed()

    async def both(listener: socket.socket) -> None:
        server = await asyncio.start_server(echo, sock=listener)
        async with server:
            socks = [await asyncio.to_thread(ours.dial, listener) for _ in range(20)]
            await asyncio.gather(*map(ask, socks))

    with ours.counted() as events, ours.listen() as listener:
        asyncio.run(both(listener.dup()))
    assert events["PAIRED"] == 20
    assert events["REDIRECTED"] == 20 * 2 * 50


@pytest.mark.parametrize("vip", [VIP, f"[{VIP6}]"])
def test_curl_and_nginx_on_a_kept_connection(served: Guarded, vip: str) -> None:
    urls = [f"http://{vip}/{n}" for n in range(5)]
    with served.counted() as events:
        done = served.client_space.run("curl", "-sS", "-w", "connects %{num_connects}\n", *urls)
    words = done.stdout.split()
    assert words.count("be1") == 5
    connects = [words[i + 1] for i, word in enumerate(words) if word == "connects"]
    assert connects == ["1", "0", "0", "0", "0"], "one connection for all"
    assert events["PAIRED"] == 1
    assert events["REDIRECTED"] == 10, "five questions and five answers"


# Whose connections they are ------------------------------------------------------------------


@contextlib.contextmanager
def apart() -> Iterator[Namespace]:
    """A namespace that has both ends' addresses itself."""
    space = Namespace.create(f"shunt-apart-{os.getpid()}")
    try:
        space.ip("link set lo up", "addr add 10.9.1.1/32 dev lo", f"addr add {BE1}/32 dev lo")
        yield space
    finally:
        space.delete()


def test_equal_addresses_in_two_namespaces(everywhere: Guarded) -> None:
    with apart() as space, everywhere.counted() as events, contextlib.ExitStack() as stack:
        ends = []
        for here, there in ((everywhere.client_space, everywhere.server_space), (space, space)):
            listener = stack.enter_context(listening(there, BE1, 7777, ()))
            client = stack.enter_context(made(here, socket.AF_INET, ()))
            client.bind(("10.9.1.1", 5555))
            client.connect((VIP, 7777))
            ends.append((client, stack.enter_context(listener.accept()[0])))
        assert {end.getsockname() for end, _ in ends} == {("10.9.1.1", 5555)}
        for n in range(20):
            for which, (client, server) in enumerate(ends):
                client.sendall(b"%d from %d" % (n, which))
                server.sendall(b"%d to %d" % (n, which))
            for which, (client, server) in enumerate(ends):
                assert server.recv(100) == b"%d from %d" % (n, which)
                assert client.recv(100) == b"%d to %d" % (n, which)
    assert (events["PAIRED"], events["REDIRECTED"]) == (2, 80)


def test_one_that_is_dialled_meanwhile_stays_on_tcp(everywhere: Guarded) -> None:
    """Its SYN is lost; until the next one another namespace has opened the same connection."""
    with apart() as space, everywhere.counted() as events, contextlib.ExitStack() as stack:
        space.ip(
            f"addr del {BE1}/32 dev lo",
            "link add name void type veth peer name unheard",
            "link set void up",
            "link set unheard up",
        )
        space.ip(f"route add {BE1}/32 dev void src 10.9.1.1")
        space.ip(f"neigh add {BE1} lladdr 02:00:00:00:00:01 dev void")
        first = stack.enter_context(made(space, socket.AF_INET, ()))
        first.bind(("10.9.1.1", 5556))
        first.setblocking(False)
        assert first.connect_ex((VIP, 7778)) == 115  # EINPROGRESS
        listener = stack.enter_context(listening(everywhere.server_space, BE1, 7778, ()))
        second = stack.enter_context(made(everywhere.client_space, socket.AF_INET, ()))
        second.bind(("10.9.1.1", 5556))
        second.connect((VIP, 7778))
        rounds(second, stack.enter_context(listener.accept()[0]))
        space.ip("link del void", f"addr add {BE1}/32 dev lo")
        late = stack.enter_context(listening(space, BE1, 7778, ()))
        late.settimeout(10)
        taken = stack.enter_context(late.accept()[0])
        first.settimeout(5)
        rounds(first, taken)
    assert (events["PAIRED"], events["LEFT_MISMATCH"]) == (1, 1)
    assert events["REDIRECTED"] == 40


def test_a_socket_that_is_connected_again(ours: Guarded) -> None:
    """What is left of the connection before has nothing to do with the new one's record.

    The server never hears that the first connection has ended, and closes its end, which is
    TCP's and out of the map, in the midst of the second.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    rule = "type filter hook output priority 0; tcp flags rst drop;"
    with ours.counted() as events, ours.listen() as one, ours.listen() as two:
        client = ours.dial(one)
        with client:
            before = one.accept()[0]
            with ours.counted() as first:
                before.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 2)
                rounds(client, before)
            ours.client_space.run("nft", f"add table ip deaf {{ chain out {{ {rule} }}; }}")
            try:
                nobody = bytes(16)  # AF_UNSPEC: as it was before connect()
                assert libc.connect(client.fileno(), nobody, len(nobody)) == 0
                client.connect((VIP, two.getsockname()[1]))
                with two.accept()[0] as after:
                    rounds(client, after)
                    before.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
                    before.close()
                    rounds(client, after)
            finally:
                ours.client_space.run("nft", "delete table ip deaf")
    assert (first["TO_TCP_OPTION"], first["GONE"]) == (1, 2)
    assert events["PAIRED"] == 2
    assert events["REDIRECTED"] == 80
    assert "TO_TCP_ENDED" not in events


def test_a_backend_whose_end_is_not_seen_here_is_tcps(ours: Guarded) -> None:
    """Addresses that are translated on the way are another connection's, as far as one can see."""
    rules = (
        "add table ip apart; add chain ip apart out { type nat hook postrouting priority 100; }; "
        f"add rule ip apart out ip daddr {BE1} tcp dport 7779 snat to 10.9.1.1:40000-40100"
    )
    ours.client_space.run("nft", rules)
    try:
        with (
            ours.counted() as events,
            listening(ours.server_space, BE1, 7779, ()) as listener,
            ours.dial(listener) as client,
            listener.accept()[0] as server,
        ):
            rounds(client, server)
        assert events == {"LEFT_REMOTE": 1}
    finally:
        ours.client_space.run("nft", "delete table ip apart")


def test_a_socket_that_another_program_has_is_tcps(ours: Guarded) -> None:
    with plain() as other, ours.counted() as events:
        with other.covered():
            client = made(ours.client_space, socket.AF_INET, ())
        with client, ours.listen() as listener:
            client.connect((VIP, listener.getsockname()[1]))
            with listener.accept()[0] as server:
                rounds(client, server)
    assert events == {"LEFT_FULL": 1}


def test_a_record_that_made_room_leaves_its_connection_to_tcp(ours: Guarded) -> None:
    pairs = Map.pinned(ours.node.bpffs / "streams/maps/stream_pairs")
    with ours.counted() as events, pair(ours) as (client, server):
        rounds(client, server)
        client.sendall(b"unread")
        for key in pairs.items()[0]:
            pairs.delete(key)
        client.sendall(b" and by TCP")
        assert read_all(server, 17) == b"unread and by TCP"
        rounds(client, server)
    pairs.close()
    assert events["TO_TCP_ENDED"] == 2, "either end finds it"
    assert events["REDIRECTED"] == 41
