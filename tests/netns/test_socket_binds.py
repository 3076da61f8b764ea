# SPDX-License-Identifier: Apache-2.0
"""Who may listen where a service has a port of the node's own addresses.

socket_node.py draws the node.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.netns.binding import bound
from tests.netns.socket_node import BE1, SIX1, Node, a_node

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
V4, V6 = socket.AF_INET, socket.AF_INET6
WEB, DNS, SIX, BOTH = 30080, 30053, 30086, 30090
SERVICES: dict[str, dict[str, Any]] = {
    "np-web": {"vip": "node/10.9.0.0/16", "ports": [WEB], "backends": [f"{BE1}:80"]},
    "np-dns": {"vip": "node/10.9.0.0/16", "ports": [f"{DNS}/udp"], "backends": [f"{BE1}:53"]},
    "np-six": {"vip": "node/fd09::/16", "ports": [SIX], "backends": [f"[{SIX1}]:80"]},
    "np-both": {
        "vip": ["node/10.9.0.0/16", "node/fd09::/16"],
        "ports": [BOTH],
        "backends": [f"{BE1}:80"],
    },
    # A VIP that is an address of the node, and named: whoever serves it may listen there.
    "named": {"vip": "203.0.113.2", "ports": [30070], "backends": [f"{BE1}:80"]},
    # So it may where another service has the same port on the others.
    "named-too": {
        "vip": "203.0.113.2",
        "ports": [WEB, f"{DNS}/udp"],
        "mode": "dsr-ipip",
        "backends": [BE1],
    },
}


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with a_node("binds", dns=False) as node:
        for name, document in SERVICES.items():
            node.write(name, {"name": name, "mode": "nat", "health": "none", **document})
        node.start()
        yield node


def bind(
    node: Node,
    address: str,
    port: int,
    kind: int = TCP,
    *,
    family: int = 0,
    only: bool = False,
    guest: bool = False,
) -> int:
    """The errno; 0 if it went well."""
    with node.client(family or (V6 if ":" in address else V4), kind, guest=guest) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return bound(sock, address, port, only=only)


REFUSED = [
    ("0.0.0.0", WEB, TCP),
    ("10.9.1.1", WEB, TCP),
    ("10.9.3.1", WEB, TCP),
    ("::", WEB, TCP),  # which is every address of IPv4, too
    ("::ffff:10.9.1.1", WEB, TCP),
    ("::ffff:0.0.0.0", WEB, TCP),
    ("0.0.0.0", DNS, UDP),
    ("10.9.2.1", DNS, UDP),
    ("::", SIX, TCP),
    ("fd09:1::1", SIX, TCP),
    ("0.0.0.0", BOTH, TCP),
    ("::", BOTH, TCP),
]
ALLOWED = [
    ("127.0.0.1", WEB, TCP),  # no address that the service has
    ("203.0.113.2", WEB, TCP),
    ("::ffff:203.0.113.2", WEB, TCP),
    ("203.0.113.2", DNS, UDP),
    ("::1", SIX, TCP),
    ("0.0.0.0", WEB, UDP),  # another protocol's
    ("0.0.0.0", DNS, TCP),
    ("0.0.0.0", SIX, TCP),  # the other family's
    ("10.9.1.1", SIX, TCP),
    ("0.0.0.0", WEB + 1, TCP),
    ("0.0.0.0", 0, TCP),
    ("::", 0, UDP),
    ("203.0.113.2", 30070, TCP),
    ("0.0.0.0", 30070, TCP),
]


@pytest.mark.parametrize(("address", "port", "kind"), REFUSED)
def test_a_node_port_is_refused(node: Node, address: str, port: int, kind: int) -> None:
    before = node.calls().get("REFUSED_NODE_PORT", 0)
    assert bind(node, address, port, kind) == errno.EADDRINUSE
    assert node.calls()["REFUSED_NODE_PORT"] == before + 1


@pytest.mark.parametrize(("address", "port", "kind"), ALLOWED)
def test_everything_else_is_not(node: Node, address: str, port: int, kind: int) -> None:
    before = node.calls().get("PASS_BIND", 0)
    assert bind(node, address, port, kind) == 0
    assert node.calls()["PASS_BIND"] > before


def test_a_socket_of_ipv6_alone_takes_no_port_of_ipv4(node: Node) -> None:
    assert bind(node, "::", WEB, only=True) == 0
    assert bind(node, "::", SIX, only=True) == errno.EADDRINUSE


def test_other_namespaces_have_ports_of_their_own(node: Node) -> None:
    assert bind(node, "0.0.0.0", WEB, guest=True) == 0
    node.settings(sockets="all")
    try:
        assert bind(node, "0.0.0.0", WEB, guest=True) == 0
        assert bind(node, "0.0.0.0", WEB) == errno.EADDRINUSE
    finally:
        node.settings()


def test_the_log_names_the_port_the_program_and_the_service_once(node: Node) -> None:
    """A real program that nobody here wrote, which tries again and again."""
    tries = [node.here.run("python3", "-m", "http.server", str(BOTH), check=False) for _ in "abc"]
    assert {"Address already in use" in done.stderr for done in tries} == {True}
    node.until(lambda: "bind() of 'python3' (pid " in node.log.read_text(), "is told")
    told = node.log.read_text()
    (line,) = (x for x in told.splitlines() if "bind() of 'python3'" in x)
    assert f"to every address, port {BOTH}/tcp was refused" in line
    assert f"{BOTH}/tcp is a port of service np-both on this node's addresses" in told
    assert "fix: let the program listen on another port" in told


def test_the_log_names_the_address(node: Node) -> None:
    assert bind(node, "fd09:1::1", BOTH) == errno.EADDRINUSE
    want = f"(pid {os.getpid()}) to fd09:1::1, port {BOTH}/tcp"
    node.until(lambda: want in node.log.read_text(), "is told")


def test_a_flood_is_counted_and_hardly_told(node: Node) -> None:
    """Neither the ring nor the log takes more than a second's worth."""
    node.until(lambda: bind(node, "0.0.0.0", DNS, UDP) == errno.EADDRINUSE, "refuses")
    before, size = node.calls()["REFUSED_NODE_PORT"], node.log.stat().st_size
    for _ in range(2000):
        assert bind(node, "0.0.0.0", DNS, UDP) == errno.EADDRINUSE
    assert node.calls()["REFUSED_NODE_PORT"] == before + 2000
    assert node.log.stat().st_size - size < 3000


def test_who_listens_already_goes_on(node: Node) -> None:
    listener = node.client()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("0.0.0.0", 30099))
    listener.listen()
    late = {"name": "late", "vip": "node/10.9.0.0/16", "ports": [30099], "mode": "nat"}
    with listener:
        node.write("late", {**late, "backends": [f"{BE1}:80"], "health": "none"})
        before = node.calls().get("REFUSED_NODE_PORT", 0)
        node.until(
            lambda: (
                bind(node, "10.9.2.1", 30099) != 0
                and node.calls().get("REFUSED_NODE_PORT", 0) > before
            ),
            "is reserved",
        )
        with node.client(guest=True) as sock:  # by eth3, where nothing of Shunt's is
            sock.connect(("10.9.3.1", 30099))
            taken, _ = listener.accept()
            taken.close()
    assert bind(node, "127.0.0.1", 30099) == 0
    (node.services / "late.yaml").unlink()
    node.until(lambda: bind(node, "0.0.0.0", 30099) == 0, "is free again")


def test_an_address_that_comes_is_the_services_too(node: Node) -> None:
    node.here.ip("addr add 10.9.1.77/24 dev eth1")
    try:
        node.until(lambda: bind(node, "10.9.1.77", WEB) == errno.EADDRINUSE, "takes it")
    finally:
        node.here.ip("addr del 10.9.1.77/24 dev eth1")


def test_an_address_that_another_service_names_is_its_servers(node: Node) -> None:
    assert bind(node, "fd09:2::1", BOTH) == errno.EADDRINUSE
    six = {"name": "six", "vip": "fd09:2::1", "ports": [BOTH], "backends": [SIX1]}
    node.write("six", {**six, "health": "none"})
    try:
        node.until(lambda: bind(node, "fd09:2::1", BOTH) == 0, "is yielded")
        assert bind(node, "fd09:1::1", BOTH) == bind(node, "::", BOTH) == errno.EADDRINUSE
    finally:
        (node.services / "six.yaml").unlink()
        node.until(lambda: bind(node, "fd09:2::1", BOTH) == errno.EADDRINUSE, "is taken again")


def test_the_switch(node: Node) -> None:
    links = node.bpffs / "sockets/links"
    node.settings(sockets={"node_ports": "share"})
    try:
        assert bind(node, "0.0.0.0", WEB) == 0
        assert not (links / "shunt_bind4").exists()
        shown = node.json("status")["sockets"]
        assert (shown["scope"], shown["attached"], shown["node_ports"]) == ("host", True, "share")
        assert "node ports may be bound by others" in node.shunt("status").out
    finally:
        node.settings()
    assert bind(node, "0.0.0.0", WEB) == errno.EADDRINUSE
    assert (links / "shunt_bind6").exists()
    assert node.json("status")["sockets"]["node_ports"] == "reserve"


def test_while_the_daemon_is_away_and_after(node: Node) -> None:
    assert node.process is not None
    node.process.kill()
    assert bind(node, "0.0.0.0", WEB) == errno.EADDRINUSE
    assert bind(node, "0.0.0.0", WEB + 1) == 0
    node.start()
    assert bind(node, "0.0.0.0", WEB) == errno.EADDRINUSE
    assert bind(node, "0.0.0.0", WEB + 1) == 0


def test_the_daemons_own_listener_is_refused_like_others(node: Node) -> None:
    """`metrics.listen` on a node port: nobody would reach it."""
    text = node.config.read_text()
    node.config.write_text(f"{text}\nmetrics: {{listen: '10.9.1.1:{WEB}'}}\n")
    try:
        node.until(
            lambda: any(str(WEB) in p for p in node.shunt("status", "-o", "json").json["problems"]),
            "is told",
        )
        node.until(lambda: f"10.9.1.1, port {WEB}/tcp was" in node.log.read_text(), "is told")
    finally:
        node.config.write_text(text)
    node.until(lambda: node.shunt("status").code == 0, "is well again")


def test_this_file_can_fail(node: Node) -> None:
    """Without the programs every bind above goes well."""
    node.settings(sockets="off")
    try:
        assert {bind(node, *each) for each in REFUSED} == {0}
    finally:
        node.settings()
    assert sys.platform == "linux"
