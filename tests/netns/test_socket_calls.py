# SPDX-License-Identifier: Apache-2.0
"""The ways in which a program can ask for a VIP, beyond a plain connect() and sendto().

socket_node.py draws the node.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import select
import socket
import struct
import threading
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest

from tests.netns import messages, uring
from tests.netns.messages import receive_many, send_many
from tests.netns.socket_node import BE1, NOWHERE, ON_LO, SIX, SIX1, Node, a_node, say, say_to

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
VIPS = (NOWHERE, ON_LO, SIX, f"::ffff:{NOWHERE}")
ONE = "203.0.113.8"  # a VIP of be1 alone
MSG_FASTOPEN, MSG_CONFIRM = 0x20000000, 0x800
TCP_FASTOPEN, TCP_FASTOPEN_CONNECT = 23, 30
IPPROTO_MPTCP, SOL_MPTCP, MPTCP_INFO = 262, 284, 1
IP_PKTINFO, IP_RECVERR = 8, 11


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with a_node("calls", dns=False) as node:
        for name, vips, ports in (
            ("fast", ["203.0.113.20", "2001:db8::20"], [8080]),
            ("closed", ["203.0.113.21", "2001:db8::21"], ["99/udp"]),
        ):
            backends = [BE1, SIX1]
            node.write(name, {"name": name, "vip": vips, "ports": ports, "backends": backends})
        node.start(timeout_s=300)
        yield node


def family_of(vip: str) -> int:
    return socket.AF_INET6 if ":" in vip else socket.AF_INET


def disconnect(sock: socket.socket) -> None:
    """connect() to nobody: AF_UNSPEC, which Python's has no way to say."""
    libc = ctypes.CDLL(None, use_errno=True)
    nobody = struct.pack("=H14x", socket.AF_UNSPEC)
    if libc.connect(sock.fileno(), nobody, len(nobody)):
        raise OSError(ctypes.get_errno(), "connect to AF_UNSPEC")


@contextlib.contextmanager
def listening(
    node: Node, role: str, port: int, proto: int = 0, *, fast_open: bool = False, share: str = ""
) -> Iterator[None]:
    """A server of TCP on a backend that says its name and what it got, one line a connection."""
    with node.servers[role].host.namespace.inside():
        server = socket.socket(socket.AF_INET6, TCP, proto)
    with server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        if fast_open:
            server.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN, 16)
        if share:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        server.bind(("::", port))
        server.listen(64)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    sock, _peer = server.accept()
                    with sock, contextlib.suppress(ConnectionError):  # a health check resets
                        sock.sendall(f"{share or role} ".encode() + sock.recv(1000))

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


# TCP -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("vip", VIPS)
def test_a_connect_that_does_not_wait(node: Node, vip: str) -> None:
    for _ in range(10):
        with node.client(family_of(vip)) as sock:
            sock.setblocking(False)
            assert sock.connect_ex((vip, 7)) in {0, errno.EINPROGRESS}
            assert select.select([], [sock], [], 5)[1] == [sock]
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
            assert sock.connect_ex((vip, 7)) in {0, errno.EISCONN}
            assert sock.getpeername()[:2] == (vip, 7)
            sock.settimeout(5)
            assert say(sock) in {"be1", "be2"}
            assert sock.connect_ex((vip, 7)) == errno.EISCONN
            assert sock.getpeername()[:2] == (vip, 7), "a refused second connect() changes nothing"


@pytest.mark.parametrize("vip", [NOWHERE, SIX])
def test_a_socket_that_is_asked_again_while_it_connects(node: Node, vip: str) -> None:
    """As after EINTR, and as some event loops do: it stays with the backend it began with."""
    with node.client(family_of(vip)) as sock:
        sock.setblocking(False)
        answers = {sock.connect_ex((vip, 7)) for _ in range(50)}
        assert answers <= {0, errno.EINPROGRESS, errno.EALREADY, errno.EISCONN}
        assert select.select([], [sock], [], 5)[1] == [sock]
        sock.settimeout(5)
        assert say(sock) in {"be1", "be2"}
        assert sock.getpeername()[:2] == (vip, 7)


def test_a_stream_that_connects_elsewhere_after_a_refusal(node: Node) -> None:
    with node.client() as sock:
        sock.setblocking(True)
        assert sock.connect_ex(("203.0.113.5", 81)) == errno.ECONNREFUSED  # the backend's own word
        sock.connect((ONE, 7))
        assert sock.getpeername() == (ONE, 7)
        assert say(sock) == "be1"
        disconnect(sock)
        with pytest.raises(OSError, match="not connected"):
            sock.getpeername()
        sock.connect((BE1, 7))
        assert sock.getpeername() == (BE1, 7), "nothing of the VIP is left"
        assert say(sock) == "be1"


@pytest.mark.parametrize("vip", ["203.0.113.20", "2001:db8::20"])
@pytest.mark.parametrize("way", ["sendto", "connect"])
def test_fast_open(node: Node, vip: str, way: str) -> None:
    """Data in the SYN goes to the backend as well, by either way to ask for that."""
    node.here.sysctl({"ipv4.tcp_fastopen": 1})
    node.servers["be1"].host.namespace.sysctl({"ipv4.tcp_fastopen": 2})
    with listening(node, "be1", 8080, fast_open=True):
        before = fast_opens(node)
        for _ in range(4):  # the first gets a cookie
            with node.client(family_of(vip)) as sock:
                sock.setblocking(True)  # a first SYN has no cookie: only then it is waited for
                patience = struct.pack("@ll", 20, 0)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
                if way == "sendto":
                    sock.sendto(b"early", MSG_FASTOPEN, (vip, 8080))
                else:
                    sock.setsockopt(socket.IPPROTO_TCP, TCP_FASTOPEN_CONNECT, 1)
                    sock.connect((vip, 8080))
                    sock.sendall(b"early")
                assert sock.recv(100) == b"be1 early"
                assert sock.getpeername()[:2] == (vip, 8080)
        assert fast_opens(node) - before >= 2


def fast_opens(node: Node) -> int:
    """How many SYNs with data were acknowledged."""
    shown = node.here.run("cat", "/proc/self/net/netstat").stdout.splitlines()
    names, values = (row.split() for row in shown if row.startswith("TcpExt:"))
    return int(values[names.index("TCPFastOpenActive")])


@pytest.mark.parametrize("vip", [NOWHERE, SIX])
def test_multipath_tcp(node: Node, vip: str) -> None:
    with node.here.inside():
        sock = socket.socket(family_of(vip), TCP, IPPROTO_MPTCP)
    with sock:
        sock.settimeout(5)
        sock.connect((vip, 7))
        assert say(sock) in {"be1", "be2"}
        assert sock.getpeername()[:2] == (vip, 7)


@pytest.mark.parametrize("vip", ["203.0.113.20", "2001:db8::20"])
def test_multipath_tcp_of_both_ends(node: Node, vip: str) -> None:
    """Where the backend speaks it too, and the connection does not fall back."""
    with listening(node, "be1", 8080, IPPROTO_MPTCP), node.here.inside():
        for _ in range(3):
            with socket.socket(family_of(vip), TCP, IPPROTO_MPTCP) as sock:
                sock.settimeout(5)
                sock.connect((vip, 8080))
                assert sock.getpeername()[:2] == (vip, 8080)
                sock.sendall(b"many")
                assert sock.recv(100) == b"be1 many"
                assert sock.getsockopt(SOL_MPTCP, MPTCP_INFO, 1), "it has not fallen back"


def test_a_backend_that_goes_while_the_connection_is_made(node: Node) -> None:
    """What was looked up is connected to: here a SYN waits for its next hop while the backend
    leaves the service. Who comes later gets another one."""
    there = node.servers["be2"].host.namespace
    address = "10.9.2.2"
    there.ip("link set dev eth0 arp off")
    node.here.ip("neigh flush dev eth2")
    waiting: list[socket.socket] = []
    try:
        for _ in range(24):
            sock = node.client()
            sock.setblocking(False)
            sock.connect_ex((NOWHERE, 7))
            waiting.append(sock)
        assert node.shunt("backend", "drain", "web", address).code == 0
        for _ in range(12):
            with node.connected(NOWHERE) as sock:
                assert say(sock) == "be1"
        there.ip("link set dev eth0 arp on")
        names = set()
        for sock in waiting:
            assert select.select([], [sock], [], 20)[1] == [sock]
            sock.settimeout(5)
            assert sock.getpeername() == (NOWHERE, 7)
            names.add(say(sock))
        assert names == {"be1", "be2"}
    finally:
        there.ip("link set dev eth0 arp on")
        node.shunt("backend", "undrain", "web", address)
        for sock in waiting:
            sock.close()


def test_servers_that_share_a_port(node: Node) -> None:
    """SO_REUSEPORT: each connection has one of them, and all of them have some."""
    with contextlib.ExitStack() as stack:
        for name in ("one", "two", "three"):
            stack.enter_context(listening(node, "be1", 8080, share=name))
        seen = set()
        for _ in range(64):
            with node.connected("203.0.113.20", 8080) as sock:
                sock.sendall(b"x")
                seen.add(sock.recv(100))
    assert seen == {b"one x", b"two x", b"three x"}


@pytest.mark.parametrize("vip", [NOWHERE, SIX, f"::ffff:{NOWHERE}"])
def test_io_uring(node: Node, vip: str) -> None:
    """connect() of both kinds, and datagrams with an address each."""
    name = messages.packed((vip, 7))
    with uring.ring() as ring:
        for kind in (TCP, UDP):
            with node.client(family_of(vip), kind) as sock:
                sock.setblocking(True)
                address = ctypes.create_string_buffer(name, len(name))
                ring.do(uring.CONNECT, sock.fileno(), ctypes.addressof(address), offset=len(name))
                assert sock.getpeername()[:2] == (vip, 7)
                assert say(sock) in {"be1", "be2"}
        with node.client(family_of(vip), UDP) as sock:
            sock.setblocking(True)
            with messages.message(b"hello", name) as (header, _data, _name):
                assert ring.do(uring.SENDMSG, sock.fileno(), ctypes.addressof(header), 1) == 5
            with messages.message(bytes(100), bytes(len(name))) as (header, data, peer):
                got = ring.do(uring.RECVMSG, sock.fileno(), ctypes.addressof(header), 1)
                assert data.raw[:got].split()[-1] == b"hello"
                assert messages.unpacked(peer.raw) == (vip, 7)


# Datagrams -----------------------------------------------------------------------------------


@pytest.mark.parametrize("vip", VIPS)
def test_a_datagram_socket_that_connects_again(node: Node, vip: str) -> None:
    with node.client(family_of(vip), UDP) as sock:
        for to in (vip, SIX if vip == SIX else vip.replace(NOWHERE, ON_LO), vip):
            sock.connect((to, 7))
            assert sock.getpeername()[:2] == (to, 7)
            assert say(sock) in {"be1", "be2"}
            disconnect(sock)
            with pytest.raises(OSError, match="not connected"):
                sock.getpeername()
            sock.connect((to, 7))
            assert say(sock) in {"be1", "be2"}


def test_a_disconnected_socket_that_speaks_to_the_backend_itself(node: Node) -> None:
    """What it was connected to before is nothing to it."""
    with node.client(kind=UDP) as sock:
        sock.connect((ONE, 7))
        assert say(sock) == "be1"
        disconnect(sock)
        assert say_to(sock, BE1) == ("be1", (BE1, 7))
        assert say_to(sock, ONE) == ("be1", (ONE, 7))


@pytest.mark.parametrize("vip", VIPS)
def test_a_disconnected_socket_goes_on_with_its_backend(node: Node, vip: str) -> None:
    """Of IPv6 it has to: the kernel gives such a socket no way by another interface any more."""
    for _ in range(8):
        with node.connected(vip, kind=UDP) as sock:
            first = say(sock)
            disconnect(sock)
            assert {say_to(sock, vip) for _ in range(3)} == {(first, (vip, 7))}


@pytest.mark.parametrize("vip", VIPS)
def test_many_messages_in_one_call(node: Node, vip: str) -> None:
    """sendmmsg() and recvmmsg(), each message with an address of its own."""
    other = {NOWHERE: ON_LO, ON_LO: NOWHERE}.get(vip, vip)
    to = [(vip, 7), (other, 7), (vip, 7)]
    with node.client(family_of(vip), UDP) as sock:
        assert send_many(sock, [(b"m%d" % n, each) for n, each in enumerate(to)]) == 3
        got = {data.split()[-1]: peer for data, peer in receive_many(sock, 3)}
        # Two VIPs with one backend: the one that was asked last is shown (docs/operations.md).
        assert set(got) == {b"m0", b"m1", b"m2"}
        assert set(got.values()) <= {(vip, 7), (other, 7)}
        assert vip != other or set(got.values()) == {(vip, 7)}


@pytest.mark.parametrize("vip", [NOWHERE, SIX])
def test_many_messages_of_a_connected_socket(node: Node, vip: str) -> None:
    with node.connected(vip, kind=UDP) as sock:
        assert send_many(sock, [(b"m%d" % n, None) for n in range(8)]) == 8
        assert {peer for _, peer in receive_many(sock, 8)} == {(vip, 7)}


def test_confirmed_datagrams(node: Node) -> None:
    with node.client(kind=UDP) as sock:
        sock.sendto(b"hello", MSG_CONFIRM, (NOWHERE, 7))
        assert sock.recvfrom(100)[1] == (NOWHERE, 7)


@pytest.mark.parametrize("peek", [False, True])
def test_messages_that_are_looked_at_first(node: Node, peek: bool) -> None:
    with node.client(kind=UDP) as sock:
        sock.sendto(b"hello", (NOWHERE, 7))
        if peek:
            assert sock.recvmsg(100, 0, socket.MSG_PEEK)[3] == (NOWHERE, 7)
        assert sock.recvmsg(100)[3] == (NOWHERE, 7)


def test_a_source_given_with_the_message(node: Node) -> None:
    """IP_PKTINFO: the sender's address of this one datagram, for source ranges as well."""

    def send(vip: str, source: str) -> None:
        info = struct.pack("=i4s4x", 0, IPv4Address(source).packed)
        sock.sendmsg([b"hello"], [(socket.IPPROTO_IP, IP_PKTINFO, info)], 0, (vip, 7))

    with node.client(kind=UDP) as sock:
        sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        for source in ("10.9.1.1", "10.9.2.1"):
            send(NOWHERE, source)
            data, ancillary, _, peer = sock.recvmsg(100, 100)
            assert (data.split()[1].decode(), peer) == (source, (NOWHERE, 7))
            assert IPv4Address(ancillary[0][2][8:12]) == IPv4Address(source), "it came to that one"
        send(ONE, "10.9.1.1")
        assert sock.recvfrom(100)[1] == (ONE, 7)
        with pytest.raises(PermissionError):
            send(ONE, "10.9.2.1")


@pytest.mark.parametrize("vip", ["203.0.113.21", "2001:db8::21"])
def test_errors_of_a_connected_socket_come_back(node: Node, vip: str) -> None:
    """Nobody listens on that port of the backend; its ICMP error finds the socket."""
    with node.connected(vip, 99, UDP) as sock:
        sock.send(b"x")
        with pytest.raises(ConnectionRefusedError):
            sock.recv(100)
        assert sock.getpeername()[:2] == (vip, 99)


def test_the_error_queue_tells_of_the_backend(node: Node) -> None:
    """A limit (docs/operations.md): no program of sockets is asked about what stands there."""
    with node.client(kind=UDP) as sock:
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        sock.connect(("203.0.113.21", 99))
        sock.send(b"x")
        assert select.select([sock], [], [], 5)[0] == [sock]
        data, _ancillary, _flags, peer = sock.recvmsg(100, 100, socket.MSG_ERRQUEUE)
        assert (data, peer) == (b"x", (BE1, 99))
