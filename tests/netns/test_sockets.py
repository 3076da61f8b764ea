# SPDX-License-Identifier: Apache-2.0
"""What a process of the load balancer's own node sees of a VIP: socket_node.py draws the node."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

import dns.message
import dns.query
import dns.rdatatype
import pytest

from tests.netns.socket_node import BE1, NOWHERE, ON_LO, SIX, SIX2, Node, a_node, say, say_to

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
MIXED = "2001:db8::7"  # with backends of both families
ROUNDS = 24  # of two backends both are seen, but for one time in ten million
VIPS = (NOWHERE, ON_LO, SIX, f"::ffff:{NOWHERE}", f"::ffff:{ON_LO}")


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with a_node("sockets") as node:
        mixed = {"vip": MIXED, "ports": [7, "7/udp"], "backends": [BE1, SIX2]}
        node.write("mixed", {"name": "mixed", **mixed})
        node.start()
        yield node


@pytest.mark.parametrize("kind", [TCP, UDP], ids=["tcp", "udp"])
@pytest.mark.parametrize("vip", VIPS)
def test_connections_reach_all_backends_and_show_the_vip(node: Node, vip: str, kind: int) -> None:
    seen = set()
    for _ in range(ROUNDS):
        with node.connected(vip, kind=kind) as sock:
            assert sock.getpeername()[:2] == (vip, 7)
            first = say(sock)
            assert say(sock, "again") == first
            seen.add(first)
            if kind == UDP:
                sock.sendall(b"who")
                data, peer = sock.recvfrom(100)
                assert (data.decode().split()[0], peer[:2]) == (first, (vip, 7))
    assert seen == {"be1", "be2"}


@pytest.mark.parametrize("vip", VIPS)
def test_datagrams_of_an_unconnected_socket(node: Node, vip: str) -> None:
    family = socket.AF_INET6 if ":" in vip else socket.AF_INET
    seen = set()
    for _ in range(ROUNDS):
        with node.client(family, UDP) as sock:
            told = {say_to(sock, vip) for _ in range(5)}
            assert len(told) == 1, "a socket's datagrams stay with one backend"
            name, peer = told.pop()
            assert peer == (vip, 7)
            seen.add(name)
    assert seen == {"be1", "be2"}


def test_a_connected_socket_that_names_the_vip_anyway(node: Node) -> None:
    for _ in range(ROUNDS):
        with node.connected(NOWHERE, kind=UDP) as sock:
            first = say(sock)
            assert say_to(sock, NOWHERE) == (first, (NOWHERE, 7))


def test_one_socket_and_several_vips(node: Node) -> None:
    with node.client(kind=UDP) as sock:
        for vip in (NOWHERE, ON_LO, "203.0.113.8", NOWHERE):
            assert say_to(sock, vip)[1] == (vip, 7)


def test_a_backend_spoken_to_as_itself_is_shown_as_itself(node: Node) -> None:
    """Nothing of a VIP that was spoken to before sticks to it."""
    with node.client(kind=UDP) as sock:
        assert say_to(sock, "203.0.113.8") == ("be1", ("203.0.113.8", 7))
        assert say_to(sock, BE1) == ("be1", (BE1, 7))
        assert say_to(sock, "203.0.113.8") == ("be1", ("203.0.113.8", 7))
        sock.connect(("203.0.113.8", 7))
        assert sock.getpeername() == ("203.0.113.8", 7)
        sock.connect((BE1, 7))
        assert sock.getpeername() == (BE1, 7)
        assert say(sock) == "be1"


def test_a_port_of_the_backends_own(node: Node) -> None:
    with node.connected("203.0.113.3", 8080) as sock:
        assert sock.getpeername() == ("203.0.113.3", 8080)
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b"be1" in sock.makefile("rb").read()


def test_every_port(node: Node) -> None:
    with node.connected("203.0.113.5", 80) as sock:
        assert sock.getpeername() == ("203.0.113.5", 80)
    with node.client() as sock:
        # As it is there: nobody listens on that port of the backend.
        assert sock.connect_ex(("203.0.113.5", 81)) == errno.ECONNREFUSED


@pytest.mark.parametrize("vip", [NOWHERE, SIX])
def test_curl(node: Node, vip: str) -> None:
    host = f"[{vip}]" if ":" in vip else vip
    urls = [f"http://{host}/{n}" for n in range(3)]
    answers = set()
    for _ in range(10):
        done = node.here.run("curl", "-sS", "-w", "%{remote_ip} ", *urls)
        words = done.stdout.split()
        assert [w for w in words if w.startswith("be")] == [words[0]] * 3  # one kept connection
        assert words.count(vip) == 3, "curl asks the socket for its peer"
        answers.add(words[0])
    assert answers == {"be1", "be2"}


@pytest.mark.parametrize("vip", [NOWHERE, ON_LO, SIX])
def test_a_resolver_takes_the_answers(node: Node, vip: str) -> None:
    """dnspython sends from an unconnected socket, and refuses answers from anybody else."""
    question = dns.message.make_query("who.example", dns.rdatatype.TXT)
    seen = set()
    for _ in range(ROUNDS):
        with node.here.inside():
            answer = dns.query.udp(question, vip, timeout=5)
        seen.add(answer.answer[0][0].to_text().strip('"'))
    assert seen == {"be1", "be2"}


def test_the_resolver_would_refuse_the_backends_own_address(node: Node) -> None:
    """What the test above rests on."""
    question = dns.message.make_query("who.example", dns.rdatatype.TXT)
    with node.client(kind=UDP) as sock:
        sock.sendto(question.to_wire(), (BE1, 53))
        with pytest.raises(dns.query.UnexpectedSource):
            dns.query.receive_udp(sock, destination=(NOWHERE, 53))


@pytest.mark.parametrize("kind", [TCP, UDP], ids=["tcp", "udp"])
def test_a_service_without_backends_refuses(node: Node, kind: int) -> None:
    before = node.calls().get("REFUSED_NO_BACKEND", 0)
    port = 80 if kind == TCP else 53
    with node.client(kind=kind) as sock:
        assert sock.connect_ex(("203.0.113.4", port)) == errno.ECONNREFUSED
        if kind == UDP:
            with pytest.raises(ConnectionRefusedError):
                sock.sendto(b"x", ("203.0.113.4", port))
    assert node.calls()["REFUSED_NO_BACKEND"] - before == (1 if kind == TCP else 2)


@pytest.mark.parametrize("kind", [TCP, UDP], ids=["tcp", "udp"])
def test_source_ranges(node: Node, kind: int) -> None:
    with node.client(kind=kind) as sock:
        assert sock.connect_ex(("203.0.113.7", 7)) == errno.EPERM
    if kind == UDP:
        with node.client(kind=kind) as sock, pytest.raises(PermissionError):
            sock.sendto(b"x", ("203.0.113.7", 7))
    with node.connected("203.0.113.8", kind=kind) as sock:
        assert say(sock) == "be1"
    with node.client(kind=kind) as sock:
        sock.bind(("10.9.2.1", 0))  # another of the node's addresses, which is not allowed
        assert sock.connect_ex(("203.0.113.8", 7)) == errno.EPERM


def test_affinity(node: Node) -> None:
    seen = set()
    for _ in range(ROUNDS):
        with node.connected("203.0.113.9") as sock:
            seen.add(say(sock))
    assert len(seen) == 1


def test_a_vip_of_ipv6_with_backends_of_ipv4(node: Node) -> None:
    for kind in (TCP, UDP):
        with node.connected("2001:db8::6", kind=kind) as sock:
            assert sock.getpeername()[:2] == ("2001:db8::6", 7)
            assert say(sock) == "be1"
    before = node.calls().get("PASS_FAMILY", 0)
    with node.client(socket.AF_INET6, UDP) as sock, pytest.raises(OSError, match="unreachable"):
        sock.sendto(b"x", ("2001:db8::6", 7))  # the kernel has no way for this one
    assert node.calls()["PASS_FAMILY"] - before == 1


@pytest.mark.parametrize("kind", [TCP, UDP], ids=["tcp", "udp"])
def test_a_vip_of_ipv4_with_backends_of_ipv6(node: Node, kind: int) -> None:
    before = node.calls().get("PASS_FAMILY", 0)
    with node.client(kind=kind) as sock:
        assert sock.connect_ex(("203.0.113.6", 7)) == errno.ENETUNREACH  # as without Shunt
    assert node.calls()["PASS_FAMILY"] - before == 1
    with node.client(socket.AF_INET6, kind) as sock:
        sock.connect(("::ffff:203.0.113.6", 7))
        assert sock.getpeername()[:2] == ("::ffff:203.0.113.6", 7)
        assert say(sock) == "be1"


@pytest.mark.parametrize("kind", [TCP, UDP], ids=["tcp", "udp"])
@pytest.mark.parametrize(("only", "wanted"), [(0, {"be1", "be2"}), (1, {"be2"})], ids="01")
def test_backends_of_both_families_and_a_socket_of_ipv6_alone(
    node: Node, kind: int, only: int, wanted: set[str]
) -> None:
    seen = set()
    for _ in range(ROUNDS):
        with node.client(socket.AF_INET6, kind) as sock:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, only)
            sock.connect((MIXED, 7))
            assert sock.getpeername()[:2] == (MIXED, 7)
            seen.add(say(sock))
    assert seen == wanted


def test_what_is_no_vip_is_left_alone(node: Node) -> None:
    for address, port in ((BE1, 7), ("fd09:1::2", 7), (BE1, 80)):
        with node.connected(address, port) as sock:
            assert sock.getpeername()[:2] == (address, port)
    listener = node.client()
    listener.bind((ON_LO, 0))  # the VIP is an address of the node: its other ports are its own
    listener.listen()
    with listener, node.connected(*listener.getsockname()) as sock:
        assert sock.getpeername() == listener.getsockname()
    with node.client() as sock:
        assert sock.connect_ex((NOWHERE, 81)) == errno.ENETUNREACH


def test_status_says_what_is_covered(node: Node) -> None:
    shown = node.json("status")
    sockets = shown["sockets"]
    assert (sockets["scope"], sockets["attached"]) == ("host", True)
    assert (node.shunt("status").out).count("of this network namespace, /sys/fs/cgroup") == 1
    assert [p for p in shown["problems"] if "socket" in p] == []
    assert sockets["calls"]["TO_BACKEND_CONNECT"] > 0 < sockets["calls"]["TO_BACKEND_SEND"]


def test_other_namespaces_are_not_touched(node: Node) -> None:
    before = node.calls().get("PASS_NAMESPACE", 0)
    node.guest.ip(f"addr add {NOWHERE}/32 dev lo")  # theirs, whatever it is here
    listener = node.client(guest=True)
    listener.bind((NOWHERE, 7))
    listener.listen()
    with listener, node.client(guest=True) as sock:
        sock.connect((NOWHERE, 7))
        taken, peer = listener.accept()
        taken.close()
        assert peer == sock.getsockname()
        assert sock.getpeername() == (NOWHERE, 7)
    assert node.calls()["PASS_NAMESPACE"] > before
