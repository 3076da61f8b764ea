# SPDX-License-Identifier: Apache-2.0
"""Redirected streams byte for byte, and of programs that nobody here wrote.

stream_forms.py draws the node.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.socket_node import BE1, SIX1
from tests.netns.stream_forms import (
    VIP,
    VIP6,
    Guarded,
    guarded,
    made,
    pair,
    read_all,
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
