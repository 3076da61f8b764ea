# SPDX-License-Identifier: Apache-2.0
"""Redirected streams beside connections that look the same, and what is left of others.

stream_forms.py draws the node.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator

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
    ways,
)


@pytest.fixture(scope="module")
def ours() -> Iterator[Guarded]:
    with guarded("streams-apart") as form:
        yield form


@pytest.fixture
def everywhere(ours: Guarded) -> Iterator[Guarded]:
    """Connections of all network namespaces are translated."""
    ours.node.settings(sockets="all")
    yield ours
    ours.node.settings()


@contextlib.contextmanager
def apart() -> Iterator[Namespace]:
    """A namespace that has both ends' addresses itself."""
    space = Namespace.create(f"shunt-apart-{os.getpid()}")
    try:
        space.ip("link set lo up")
        space.own("10.9.1.1", BE1, SIX1)
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


@contextlib.contextmanager
def losing(space: Namespace, packets: str, hook: str) -> Iterator[None]:
    """Packets of TCP that nftables describes, at one of its hooks."""
    rule = f"type filter hook {hook} priority 0; {packets} drop;"
    space.run("nft", f"add table inet losing {{ chain {hook} {{ {rule} }}; }}")
    try:
        yield
    finally:
        space.run("nft", "delete table inet losing")


@pytest.mark.parametrize(
    ("vip", "address", "own"), [(VIP, BE1, "127.0.0.1"), (VIP6, SIX1, "::1")], ids=["ipv4", "ipv6"]
)
def test_equal_connections_from_loopback_are_apart_while_they_are_opened(
    everywhere: Guarded, vip: str, address: str, own: str
) -> None:
    """The SYN of one is lost; until the next one the other namespace's is open."""
    family, there = (socket.AF_INET6 if ":" in own else socket.AF_INET), everywhere.server_space
    with apart() as space, everywhere.counted() as events, contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(made(s, family, ())) for s in (space, there))
        late, prompt = (
            stack.enter_context(listening(s, address, 7781, ())) for s in (space, there)
        )
        first.bind((own, 5557))
        second.bind((own, 5557))
        with losing(space, "tcp dport 7781", "input"):
            first.setblocking(False)
            assert first.connect_ex((vip, 7781)) == errno.EINPROGRESS
            second.connect((vip, 7781))
            rounds(second, stack.enter_context(prompt.accept()[0]))
        late.settimeout(10)
        taken = stack.enter_context(late.accept()[0])
        first.settimeout(5)
        rounds(first, taken)
    assert (events["PAIRED"], events["REDIRECTED"]) == (2, 80)


def disconnect(sock: socket.socket) -> None:
    """As it was before connect(), which Python has no way to say: AF_UNSPEC."""
    libc, nobody = ctypes.CDLL(None, use_errno=True), bytes(16)
    assert libc.connect(sock.fileno(), nobody, len(nobody)) == 0


def test_an_entry_that_another_connection_left_is_not_replaced(ours: Guarded) -> None:
    """A client's socket that has left the map is connected again. Its server before, still there,
    has not heard of it, nor read all; both are the server's end of that client."""
    with (
        ours.listen() as one,
        ours.listen() as two,
        ours.dial(one) as client,
        one.accept()[0] as before,
        losing(ours.client_space, "tcp flags rst", "output"),
    ):
        before.settimeout(5)
        gone = ours.events().get("GONE", 0)
        client.sendall(b"unread")
        before.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 2)
        sent = bytearray(b"unread")

        def is_gone() -> bool:
            sent.extend(b" more")
            client.sendall(b" more")  # a packet, so that it is looked at
            return ours.events().get("GONE", 0) > gone

        ours.node.until(is_gone, "leaves the map")
        disconnect(client)
        with ours.counted() as events:
            client.connect((VIP, two.getsockname()[1]))
            with two.accept()[0] as after:
                after.settimeout(5)
                rounds(client, after)
        assert ways(ours, before) == [("", "")], "it is none of the new connection's"
        assert read_all(before, len(sent)) == sent
    assert events["LEFT_FULL"] == 1
    assert "REDIRECTED" not in events


def test_a_socket_that_is_connected_again(ours: Guarded) -> None:
    """What is left of the connection before has nothing to do with the new one's record.

    The server never hears that the first connection has ended, and closes its end, which is
    TCP's and out of the map, in the midst of the second.
    """
    with ours.counted() as events, ours.listen() as one, ours.listen() as two:
        client = ours.dial(one)
        with client:
            before = one.accept()[0]
            with ours.counted() as first:
                before.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 2)
                rounds(client, before)
            with losing(ours.client_space, "tcp flags rst", "output"):
                disconnect(client)
                client.connect((VIP, two.getsockname()[1]))
                with two.accept()[0] as after:
                    rounds(client, after)
                    before.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))
                    before.close()
                    rounds(client, after)
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
