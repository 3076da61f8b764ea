# SPDX-License-Identifier: Apache-2.0
"""`shunt socket list` of streams: both ends, and whether they pass TCP by.

stream_forms.py draws the node.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.netns.socket_node import BE1, SIX1
from tests.netns.stream_forms import (
    LEFT_VIP,
    VIP,
    VIP6,
    Guarded,
    guarded,
    listed,
    pair,
    rounds,
    ways,
)

TCP = socket.IPPROTO_TCP


@pytest.fixture(scope="module")
def ours() -> Iterator[Guarded]:
    with guarded("streams-listed") as form:
        yield form


@pytest.mark.parametrize(("vip", "address"), [(VIP, BE1), (VIP6, SIX1)], ids=["ipv4", "ipv6"])
def test_both_ends_of_a_redirected_stream(ours: Guarded, vip: str, address: str) -> None:
    form = Guarded(ours.node, vip, address)
    with pair(form) as (client, server):
        rounds(client, server, 20)
        client.sendall(b"one more")
        rows = listed(form, client, server)
        assert [row["end"] for row in rows] == ["client", "server"]
        for row, sock in zip(rows, (client, server), strict=True):
            assert (row["local"], row["local_port"]) == sock.getsockname()[:2]
            assert (row["vip"], row["vip_port"]) == client.getpeername()[:2]
            assert (row["stream"], row["stream_why"]) == ("redirected", "")
        assert rows[0]["backend"] == rows[1]["backend"]
        assert [row["stream_messages"] for row in rows] == [21, 20]
        assert rows[0]["stream_bytes"] == sum(len(b"question %d" % n) for n in range(20)) + 8
        spaces = [row["netns"] for row in rows]
        assert spaces == ["host", form.server_space.name]
        name = rows[0]["service"]
        shown = form.node.shunt("socket", "list", name).out.splitlines()
        assert [line.split()[1] for line in shown] == ["END", "client", "server"]
        assert all("redirected " in line for line in shown[1:])
        one = form.node.shunt("socket", "list", name, "--limit", "1", "-o", "json")
        assert len(one.json) == 1
        assert "there are more than 1" in one.err


def test_explain_says_whether_one_would_be(ours: Guarded) -> None:
    for vip, asked in ((VIP, True), (LEFT_VIP, False)):
        found = ours.node.json("explain", "--from", "socket", "--to", f"{vip}:80")
        told = [step["facts"] for step in found["steps"] if step["step"] == "stream"]
        assert told == ([{"attached": True}] if asked else [])
    of_udp = ours.node.json("explain", "--from", "socket", "--to", f"{VIP}:80", "--proto", "udp")
    assert "stream" not in [step["step"] for step in of_udp["steps"]]


def test_why_one_is_tcps(ours: Guarded) -> None:
    with pair(ours) as (client, server):
        rounds(client, server)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 2)
        assert ways(ours, client, server) == [("tcp", "TO_TCP_OPTION")] * 2
        assert "tcp (to-tcp-option)" in ours.node.shunt("socket", "list").out
        rounds(client, server)
        assert ways(ours, client, server) == [("tcp", "TO_TCP_OPTION")] * 2
        server.close()
        assert client.recv(1) == b""
        assert [row["stream"] for row in listed(ours, client)] == ["tcp"]


def test_one_end_that_has_an_option(ours: Guarded) -> None:
    with pair(ours, (socket.SOL_SOCKET, socket.SO_RCVLOWAT, 2)) as (client, server):
        assert ways(ours, client) == [("tcp", "LEFT_OPTION")]
        assert listed(ours, server) == [{}], "it is a socket like any other"


def test_one_that_is_being_opened(ours: Guarded) -> None:
    """With deferred accept the server's socket is made by the first data."""
    with ours.listen((TCP, socket.TCP_DEFER_ACCEPT, 10)) as listener, ours.dial(listener) as client:
        assert ways(ours, client) == [("opening", "")]
        client.sendall(b"early")
        with listener.accept()[0] as server:
            server.settimeout(5)
            assert server.recv(10) == b"early"
            assert ("tcp", "TO_TCP_EARLY") in ways(ours, client)


def test_a_service_that_does_not_ask_for_it(ours: Guarded) -> None:
    with pair(Guarded(ours.node, LEFT_VIP)) as (client, server):
        rounds(client, server)
        assert ways(ours, client) == [("off", "")]
        assert listed(ours, server) == [{}]
