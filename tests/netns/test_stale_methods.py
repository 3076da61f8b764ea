# SPDX-License-Identifier: Apache-2.0
"""What counts as stale, and both ways to close it: the programs on a running daemon's own maps.

The daemon itself closes nothing here. socket_node.py draws the node.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest

from shunt.kern import features, namespace, sock_diag
from shunt.kern.maps import Map
from shunt.lb.model import Protocol
from shunt.sockops.stale import Method, Stale, Swept, method
from tests.netns.socket_node import SIX1, Node, a_node, say
from tests.netns.stale import (
    BACKENDS,
    GOES_ON,
    MAPPED,
    VIP,
    VIP6,
    Sockets,
    fate,
    only_stale,
    serve,
)

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
KNOWN, UP, DRAINED, REMOVED, IPV6 = 1, 2, 4, 8, 16
OTHERS = f"2001:db8:7::{VIP6.rpartition(':')[2]}"
T = TypeVar("T")


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with a_node("stale-how", dns=False) as node:
        only_stale(node)
        node.settings(sockets={"cover": "all", "close": "off"})
        serve(node, wait=False)
        node.start()
        yield node


@pytest.fixture
def maps(node: Node) -> Iterator[dict[str, Map]]:
    folders = node.bpffs / "maps", node.bpffs / "sockets/maps"
    paths = [path for folder in folders for path in folder.iterdir()]
    opened = {path.name: Map.pinned(path) for path in paths if path.name in WANTED}
    try:
        yield opened
    finally:
        for each in opened.values():
            each.close()


WANTED = {
    *("meta", "ports", "services", "svc", "svc_options", "slots", "backends", "nexthops"),
    *("sources", "sock_peers", "sock_flows", "sock_clients"),
}


def here(node: Node, work: Callable[[], T]) -> T:
    """In a thread that begins in the node's namespace, as shuntd's do."""

    def within() -> T:
        namespace.enter(node.here.path)
        return work()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(within).result()


def swept(node: Node, maps: dict[str, Map], by: Method, *, tcp: bool) -> Swept:
    with Stale(maps, by, tcp=tcp) as stale:
        return here(node, stale.sweep)


@contextlib.contextmanager
def gone(node: Node) -> Iterator[None]:
    """The second backend, for as long."""
    serve(node, 1)
    try:
        yield
    finally:
        serve(node, 1, 2)


def need_sock_destroy() -> None:
    if not features.sock_destroy().present:
        pytest.skip("needs sock_destroy: it came with 6.5")


@pytest.fixture(params=list(Method))
def by(request: pytest.FixtureRequest) -> Method:
    if request.param is Method.ITERATOR:
        need_sock_destroy()
    return Method(request.param)


def test_programs_close_some_where_the_kernel_lets_them(node: Node, maps: dict[str, Map]) -> None:
    """One case, which every guest runs: of the tests below each runs some."""
    need_sock_destroy()
    with contextlib.ExitStack() as stack:
        udp = Sockets(stack, node, VIP, UDP)
        with gone(node):
            swept_away = swept(node, maps, Method.ITERATOR, tcp=False)
            assert swept_away.closed == {Protocol.UDP: len(udp.of["be2"])}
            assert udp.fates("be2") == {errno.ECONNABORTED}
        assert udp.answered("be1")


@pytest.mark.parametrize("vip", [VIP, MAPPED, VIP6], ids=["4", "mapped", "6"])
def test_both_ways_close_the_same(node: Node, maps: dict[str, Map], vip: str, by: Method) -> None:
    itself = ("::ffff:" if vip == MAPPED else "") + BACKENDS[vip][1]
    with contextlib.ExitStack() as stack:
        udp, tcp = (Sockets(stack, node, vip, kind) for kind in (UDP, TCP))
        direct = [stack.enter_context(node.connected(itself, kind=kind)) for kind in (UDP, TCP)]
        guest = stack.enter_context(node.client(kind=UDP, guest=True))
        while say_from(guest) != "be2":
            pass
        with gone(node):
            first = swept(node, maps, by, tcp=False)
            number = len(udp.of["be2"])
            assert first.closed == {Protocol.UDP: number + 1}
            assert (first.left, first.refused) == (0, [])
            assert first.namespaces == 2
            assert udp.fates("be2") == {errno.ECONNABORTED}
            assert tcp.fates("be2") == {GOES_ON}
            assert fate(guest) == errno.ECONNABORTED
            second = swept(node, maps, by, tcp=True)
            assert +second.closed == {Protocol.TCP: len(tcp.of["be2"])}
            assert tcp.fates("be2") == {errno.ECONNABORTED}
            third = swept(node, maps, by, tcp=True)
            assert (third.closed.total(), third.left) == (0, 0)
        assert udp.answered("be1")
        assert tcp.answered("be1")
        assert [say(sock) for sock in direct] == ["be2", "be2"]


def say_from(guest: socket.socket) -> str:
    guest.connect((VIP, 7))
    return say(guest)


CHANGES: dict[str, tuple[bool, Callable[[Any], None]]] = {
    "nothing": (False, lambda b: None),
    "drained": (False, lambda b: or_flags(b, DRAINED)),
    "another weight": (False, lambda b: put(b, "weight", 7)),
    "failing": (True, lambda b: put(b, "flags", KNOWN | int(b["flags"]) & IPV6)),
    "removed": (True, lambda b: or_flags(b, REMOVED)),
    "cleared": (True, lambda b: put(b, "flags", 0)),
    "another's address": (True, lambda b: b["addr"].__setitem__(15, b["addr"][15] ^ 1)),
    "another's port": (True, lambda b: put(b, "port", 9)),
    "the same port, named": (False, lambda b: put(b, "port", 7)),
    "of another protocol": (True, lambda b: put(b, "svc", 0)),
}


def put(backend: Any, field: str, value: int) -> None:
    backend[field] = value


def or_flags(backend: Any, flags: int) -> None:
    backend["flags"] |= flags


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("vip", [VIP, VIP6], ids=["4", "6"])
def test_what_counts_are_the_tables(
    node: Node, maps: dict[str, Map], vip: str, change: str
) -> None:
    """A backend's id may be another's by now, and the backend may be up again."""
    stale, alter = CHANGES[change]
    with (
        Stale(maps, method(), tcp=True) as programs,
        node.connected(vip, kind=UDP) as sock,
    ):
        say(sock)
        assert len(programs.find()) == 0
        peer = maps["sock_peers"].lookup(sock.fileno())
        assert peer is not None
        backend = maps["backends"].mapped()[int(peer["backend"])]
        before = backend.copy()
        alter(backend)
        try:
            found = programs.find()
        finally:
            for field in before.dtype.names:
                backend[field] = before[field]
        assert len(found) == stale
        if stale:
            own = sock.getsockname()
            assert (int(found[0]["sport"]), int(found[0]["dport"])) == (own[1], 7)
            assert found[0]["saddr"].tobytes() == sixteen(own[0])
            assert found[0]["netns"] == node.here.path.stat().st_ino
        assert len(programs.find()) == 0


def sixteen(address: str) -> bytes:
    if ":" in address:
        return socket.inet_pton(socket.AF_INET6, address)
    return bytes(10) + b"\xff\xff" + socket.inet_aton(address)


def test_diagnostics_close_by_the_cookie_alone(node: Node) -> None:
    """The same addresses and ports, and another socket's cookie: nothing is closed."""

    def ask(sock: socket.socket, wrong: int) -> int:
        address, port = sock.getsockname()
        cookie = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, 57, 8), "little")
        target = sock_diag.Target(
            family=socket.AF_INET,
            proto=socket.IPPROTO_UDP,
            source=socket.inet_aton(address),
            source_port=port.to_bytes(2, "big"),
            destination=socket.inet_aton(BACKENDS[VIP][1]),
            destination_port=(7).to_bytes(2, "big"),
            ifindex=0,
            cookie=cookie + wrong,
        )
        with sock_diag.SockDiag() as diag:
            return diag.destroy([target])

    with node.connected(BACKENDS[VIP][1], kind=UDP) as sock:
        assert here(node, lambda: ask(sock, 1)) == 0
        assert say(sock) == "be2"
        assert here(node, lambda: ask(sock, 0)) == 1
        assert fate(sock) == errno.ECONNABORTED


def test_the_main_thread_stays_where_it_is(node: Node) -> None:
    before = namespace.inode()
    with pytest.raises(RuntimeError, match="main thread"):
        namespace.enter(node.here.path)
    assert namespace.inode() == before


def test_a_hundred_of_thousands(node: Node, maps: dict[str, Map]) -> None:
    """And how long it takes is of the hundred and of one look at the others."""
    with contextlib.ExitStack() as stack:
        udp = Sockets(stack, node, VIP, UDP, 200)
        node.write(
            "others", {"name": "others", "vip": OTHERS, "ports": ["7/udp"], "backends": [SIX1]}
        )
        node.until(lambda: len(node.json("service", "list")) == 3, "in force")
        others = [stack.enter_context(node.connected(OTHERS, kind=UDP)) for _ in range(4000)]
        with gone(node):
            done = swept(node, maps, method(), tcp=True)
        assert done.closed == {Protocol.UDP: len(udp.of["be2"]), Protocol.TCP: 0}
        assert done.took_s < 1  # some ms, but others use this machine
        assert say(others[0]) == "be1"
