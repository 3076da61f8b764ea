# SPDX-License-Identifier: Apache-2.0
"""`shunt socket list`: exactly the sockets that have a backend in a VIP's place.

socket_node.py draws the node.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shunt.kern import cgroup
from tests.netns.own_vips import vip4, vip6
from tests.netns.socket_node import BE1, BE2, SIX1, SIX2, Node, a_node, say, say_to

NOWHERE, OTHER, SIX = vip4(1), vip4(2), vip6(1)
PORTS = [7, "7/udp"]
TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with a_node("socklist", dns=False) as node:
        four = {"name": "four", "vip": [NOWHERE, OTHER], "ports": PORTS, "backends": [BE1, BE2]}
        node.write("four", four)
        six = {"name": "v6", "vip": SIX, "ports": PORTS, "backends": [SIX1, SIX2]}
        node.write("v6", six)
        node.write("one", {"name": "one", "vip": vip4(3), "ports": [7], "backends": [BE1]})
        node.start()
        yield node


def listed(node: Node, *more: str) -> list[dict[str, Any]]:
    return node.json("socket", "list", *more)  # type: ignore[no-any-return]


def of(node: Node, sock: socket.socket) -> list[dict[str, Any]]:
    inode = os.fstat(sock.fileno()).st_ino
    return [row for row in listed(node) if row["inode"] == inode]


@pytest.mark.parametrize("vip", [NOWHERE, OTHER, SIX, f"::ffff:{NOWHERE}"])
def test_a_connection(node: Node, vip: str) -> None:
    with node.connected(vip) as sock:
        name = say(sock)
        (row,) = of(node, sock)
        plain = vip.removeprefix("::ffff:")
        assert (row["protocol"], row["vip"], row["vip_port"]) == ("tcp", plain, 7)
        assert (row["state"], row["connected"], row["backend_state"]) == ("established", True, "up")
        local, port = sock.getsockname()[:2]
        assert (row["local"], row["local_port"]) == (local.removeprefix("::ffff:"), port)
        where = {"be1": "10.9.1.2", "be2": "10.9.2.2"} if plain != SIX else {
            "be1": "fd09:1::2", "be2": "fd09:2::2",
        }  # fmt: skip
        shown = f"[{where[name]}]:7" if ":" in where[name] else f"{where[name]}:7"
        assert row["backend"] == shown
        assert (row["service"], row["netns"]) == ("v6" if plain == SIX else "four", "host")
        assert (row["uid"], row["cgroup"]) == (os.geteuid(), "/")
        assert row["since_s"] < 60
        # A connection to the backend itself is none of ours.
        with node.connected(BE1) as other:
            assert say(other) == "be1"
            assert of(node, other) == []
    # It is not while the other end has not closed its own.
    node.until(lambda: port not in {row["local_port"] for row in listed(node)}, "it has closed")


def test_a_process_that_closes_files_meanwhile_is_told_too(node: Node) -> None:
    """This one: looking through /proc opens and closes files of its own."""
    with node.connected(NOWHERE) as sock:
        inode = os.fstat(sock.fileno()).st_ino
        (row,) = (r for r in listed(node, "-p") if r["inode"] == inode)
        assert os.getpid() in {each["pid"] for each in row["processes"]}


def test_datagrams(node: Node) -> None:
    with node.client(kind=UDP) as sock, node.connected(NOWHERE, kind=UDP) as other:
        assert of(node, sock) == []
        say_to(sock, NOWHERE)
        say_to(sock, OTHER)
        rows = of(node, sock)
        assert {(row["vip"], row["connected"]) for row in rows} == {
            (NOWHERE, False), (OTHER, False),
        }  # fmt: skip
        say(other)
        (row,) = of(node, other)
        assert (row["protocol"], row["connected"], row["state"]) == ("udp", True, "established")


def test_of_another_namespace(node: Node) -> None:
    node.settings(sockets="all")
    try:
        with node.client(guest=True) as sock:
            sock.connect((NOWHERE, 7))
            say(sock)
            (row,) = of(node, sock)
            assert row["netns"] == node.guest.name
            assert row["local"] == "10.9.3.2"
            with node.connected(NOWHERE) as own:
                (mine,) = of(node, own)
                assert mine["netns_cookie"] != row["netns_cookie"]
    finally:
        node.settings()


def test_of_one_service_and_a_limit(node: Node) -> None:
    with contextlib.ExitStack() as stack:
        for vip in (NOWHERE, NOWHERE, SIX):
            stack.enter_context(node.connected(vip))
        assert {row["service"] for row in listed(node, "v6")} == {"v6"}
        assert len(listed(node, "four")) == 2
        done = node.shunt("socket", "list", "--limit", "1", "-o", "json")
        assert len(done.json) == 1
        assert "there are more than 1" in done.err
        assert node.shunt("socket", "list", "nobody").code == 1


def test_the_process_and_its_control_group(node: Node) -> None:
    """A client of its own group, in the midst of a transfer."""
    group = cgroup.root() / f"shunt-list-{os.getpid()}"
    group.mkdir()
    code = f"import socket; s = socket.create_connection(('{NOWHERE}', 7)); s.recv(1)"
    script = f'echo $$ > {group}/cgroup.procs; exec {sys.executable} -c "{code}"'
    done = subprocess.Popen(
        [*node.here.enter, "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    try:
        rows: list[Any] = []

        def found() -> bool:
            rows[:] = [r for r in listed(node, "-p") if r["cgroup"] == f"/{group.name}"]
            return bool(rows)

        node.until(found, "connects")
        name = Path(f"/proc/{done.pid}/comm").read_text().strip()
        assert [each["name"] for each in rows[0]["processes"]] == [name]
        assert rows[0]["processes"][0]["pid"] == done.pid
        line = next(
            x for x in node.shunt("socket", "list", "-p").out.splitlines() if str(done.pid) in x
        )
        assert f"{name}/{done.pid}" in line.split()[-1]
        assert f"/{group.name}" in line
    finally:
        done.kill()
        done.communicate()
        node.until(lambda: not _populated(group), "is empty")
        group.rmdir()


def _populated(group: Any) -> bool:
    return "populated 1" in (group / "cgroup.events").read_text()


def test_what_has_become_of_the_backend(node: Node) -> None:
    with node.connected(vip4(3)) as sock:
        assert say(sock) == "be1"
        node.shunt("backend", "drain", "one", "10.9.1.2")
        assert [row["backend_state"] for row in of(node, sock)] == ["draining"]
        assert f"{BE1}:7 (draining)" in node.shunt("socket", "list", "one").out
        node.shunt("backend", "undrain", "one", "10.9.1.2")
        assert [row["backend_state"] for row in of(node, sock)] == ["up"]


def test_a_thousand_connections_are_told_one_by_one(node: Node) -> None:
    node.until(lambda: listed(node) == [], "those of earlier tests have ended")
    with contextlib.ExitStack() as stack:
        inodes = set()
        for _ in range(1000):
            sock = stack.enter_context(node.connected(NOWHERE))
            inodes.add(os.fstat(sock.fileno()).st_ino)
        rows = listed(node, "--limit", "100000")
        assert len(rows) == 1000
        assert {row["inode"] for row in rows} == inodes
    node.until(lambda: listed(node) == [], "are freed by the kernel, with nobody's help")


def test_while_sockets_are_off_there_are_none(node: Node) -> None:
    with node.connected(NOWHERE) as sock:
        assert len(of(node, sock)) == 1
        node.settings(sockets="off")
        assert listed(node) == []
        node.settings()
