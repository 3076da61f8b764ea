# SPDX-License-Identifier: Apache-2.0
"""`shunt explain --from socket`: the decision that a call would get, and nothing changed by asking.

socket_node.py draws the node.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from shunt.agent import bind_explain
from shunt.agent.socket_explain import REASONS, UNASKED
from shunt.kern import cgroup
from shunt.kern.maps import Map
from tests.netns.own_vips import vip4, vip6
from tests.netns.socket_node import BE1, BE2, NOWHERE, SIX, Node, a_node, say

ROUNDS = 24
AFFINE, CROSSES = vip4(1), vip6(1)


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with a_node("sockexp", dns=False) as node:
        affine = {"name": "mine", "vip": AFFINE, "ports": [7], "backends": [BE1, BE2]}
        node.write("mine", {**affine, "affinity": "10m"})
        node.write("crosses", {"name": "crosses", "vip": CROSSES, "ports": [7], "backends": [BE1]})
        off = {"name": "off", "vip": "203.0.113.11", "ports": [7], "backends": [BE1]}
        node.write("off", {**off, "sockets": "off"})
        node.settings(sockets={"exclude": [f"/shunt-exp-{os.getpid()}"]})
        node.start()
        yield node


def explain(node: Node, to: str, *more: str) -> dict[str, Any]:
    return node.json("explain", "--from", "socket", "--to", to, *more)  # type: ignore[no-any-return]


def seen(node: Node) -> bool:
    """Whether the excluded control group is there."""
    return bool(node.json("status")["sockets"]["excluded_cgroups"][0]["there"])


def steps(found: dict[str, Any]) -> list[str]:
    return [step["step"] for step in found["steps"]]


def test_each_step_is_told(node: Node) -> None:
    found = explain(node, f"{NOWHERE}:7")
    assert (found["verdict"], found["reason"]) == ("translate", "TO_BACKEND_CONNECT")
    assert (found["service"], found["backend"] in {"10.9.1.2", "10.9.2.2"}) == ("web", True)
    assert steps(found) == [
        *("port", "frontend", "service", "hash", "slot", "backend", "verdict"),
    ]
    text = node.shunt("explain", "--from", "socket", "--to", f"{NOWHERE}:7").out
    assert text.startswith(f"connect() of tcp to {NOWHERE}:7\n")
    assert f"{NOWHERE}:7/tcp: service web" in text
    assert "(to-backend-connect)" in text


def test_it_names_whom_connections_reach(node: Node) -> None:
    told = {explain(node, f"{NOWHERE}:7")["backend"] for _ in range(ROUNDS)}
    assert told == {"10.9.1.2", "10.9.2.2"}
    assert node.shunt("backend", "drain", "web", "10.9.2.2").code == 0
    try:
        assert {explain(node, f"{NOWHERE}:7")["backend"] for _ in range(ROUNDS)} == {"10.9.1.2"}
    finally:
        assert node.shunt("backend", "undrain", "web", "10.9.2.2").code == 0


@pytest.mark.parametrize(
    ("to", "more", "reason"),
    [
        (f"{NOWHERE}:81", (), "PASS_NOT_OURS"),
        (f"{BE1}:7", (), "PASS_NOT_OURS"),
        ("203.0.113.4:80", (), "REFUSED_NO_BACKEND"),
        ("203.0.113.7:7", (), "REFUSED_SOURCE"),
        ("203.0.113.8:7", (), "TO_BACKEND_CONNECT"),
        ("203.0.113.8:7", ("--bound", "10.9.2.1"), "REFUSED_SOURCE"),
        ("203.0.113.8:7", ("--bound", "10.9.1.1"), "TO_BACKEND_CONNECT"),
        ("203.0.113.11:7", (), "PASS_SERVICE"),
        ("203.0.113.6:7", (), "PASS_FAMILY"),
        ("[::ffff:203.0.113.6]:7", (), "TO_BACKEND_CONNECT"),
        ("[2001:db8::6]:7", (), "TO_BACKEND_CONNECT"),
        ("[2001:db8::6]:7", ("--bound", "fd09:1::1"), "PASS_FAMILY"),
        ("[2001:db8::6]:7", ("--ipv6-only",), "PASS_FAMILY"),
        (f"[{SIX}]:7", ("--ipv6-only",), "TO_BACKEND_CONNECT"),
        ("[2001:db8::6]:7", ("--proto", "udp", "--call", "sendto"), "PASS_FAMILY"),
        (f"[{SIX}]:7", ("--proto", "udp", "--call", "sendto"), "TO_BACKEND_SEND"),
        (f"{NOWHERE}:7", ("--netns", "1"), "PASS_NAMESPACE"),
    ],
)
def test_every_end(node: Node, to: str, more: tuple[str, ...], reason: str) -> None:
    """As the socket's call ends, too: tests/netns/test_sockets.py has each with a real one."""
    found = explain(node, to, *more)
    assert found["reason"] == reason
    assert found["steps"][-1]["step"] == "verdict"


def test_a_socket_that_is_bound_has_one_family(node: Node) -> None:
    """What explain says of it is what happens."""
    with node.client(socket.AF_INET6) as sock:
        sock.bind(("fd09:1::1", 0))
        before = node.calls().get("PASS_FAMILY", 0)
        with pytest.raises(OSError, match="unreachable"):
            sock.connect((CROSSES, 7))
        assert node.calls()["PASS_FAMILY"] == before + 1
    with node.client(socket.AF_INET6) as sock:
        sock.bind(("::ffff:10.9.1.1", 0))
        sock.connect((CROSSES, 7))
        assert say(sock) == "be1"


def test_source_ranges_of_another_namespace_are_not_known(node: Node) -> None:
    node.settings(sockets="all")
    try:
        found = explain(node, "203.0.113.8:7", "--netns", "1")
        assert found["reason"] == "PASS_SOURCE_UNKNOWN"
        assert "source" in steps(found)
    finally:
        node.settings(sockets={"exclude": [f"/shunt-exp-{os.getpid()}"]})


def test_an_excluded_control_group(node: Node) -> None:
    group = cgroup.root() / f"shunt-exp-{os.getpid()}"
    (group / "a").mkdir(parents=True)
    try:
        node.until(lambda: seen(node), "is seen")
        for path in (group.name, f"/{group.name}", f"/{group.name}/a"):
            assert explain(node, f"{NOWHERE}:7", "--cgroup", path)["reason"] == "PASS_CGROUP"
        assert explain(node, f"{NOWHERE}:7", "--cgroup", "/")["reason"] == "TO_BACKEND_CONNECT"
        assert explain(node, f"{NOWHERE}:7")["reason"] == "TO_BACKEND_CONNECT"
    finally:
        (group / "a").rmdir()
        group.rmdir()
    done = node.shunt("explain", "--from", "socket", "--to", f"{NOWHERE}:7", "--cgroup", "/none")
    assert done.code == 1
    assert "there is no control group '/none'" in done.err
    for wrong in ("/a/../b", "a\0b", "x" * 4000):
        argv = ("--from", "socket", "--to", f"{NOWHERE}:7", "--cgroup", wrong)
        assert node.shunt("explain", *argv).code == 1


def clients(node: Node) -> list[tuple[int, int, int]]:
    """Whom affinity remembers: (namespace, word, when)."""
    found = Map.pinned(node.bpffs / "sockets/maps/sock_clients")
    try:
        keys, values = found.items()
        return [
            (int(k["netns"]), int(v["word"]), int(v["seen_ns"]))
            for k, v in zip(keys, values, strict=True)
        ]
    finally:
        found.close()


def test_asking_leaves_no_trace_in_affinity(node: Node) -> None:
    assert clients(node) == []
    calls = node.calls()
    told = {explain(node, f"{AFFINE}:7")["backend"] for _ in range(ROUNDS)}
    assert told == {"10.9.1.2", "10.9.2.2"}, "nothing is remembered by asking"
    assert clients(node) == []
    with node.connected(AFFINE) as sock:
        name = say(sock)
    before = clients(node)
    assert len(before) == 1
    for _ in range(ROUNDS):
        found = explain(node, f"{AFFINE}:7")
        assert found["backend"] == {"be1": "10.9.1.2", "be2": "10.9.2.2"}[name]
        assert steps(found) == ["port", "frontend", "service", "client", "backend", "verdict"]
        assert found["steps"][3]["facts"]["known"]
    assert clients(node) == before
    after = node.calls()
    assert after.pop("TO_BACKEND_CONNECT") == calls.pop("TO_BACKEND_CONNECT", 0) + 1
    for quiet in ("PASS_NOT_OURS", "PASS_NAMESPACE", "PASS_BIND"):  # of others on this machine
        after.pop(quiet, None)
        calls.pop(quiet, None)
    assert after == calls


def test_it_needs_sockets_that_are_covered(node: Node) -> None:
    node.settings(sockets="off")
    try:
        done = node.shunt("explain", "--from", "socket", "--to", f"{NOWHERE}:7")
        assert done.code == 1
        assert "`sockets: off`" in done.err
    finally:
        node.settings(sockets={"exclude": [f"/shunt-exp-{os.getpid()}"]})
    assert explain(node, f"{NOWHERE}:7")["verdict"] == "translate"


def test_what_makes_no_sense_is_refused(node: Node) -> None:
    def code(*argv: str) -> int:
        return node.shunt("explain", *argv).code

    assert code("--from", "socket") == 2
    assert code("--from", "socket", "--to", f"{NOWHERE}:7", "--proto", "sctp") == 2
    assert code("--from", "10.9.1.1:9", "--to", f"{NOWHERE}:7", "--bound", BE1) == 2
    assert code("--from", "socket", "--to", f"{NOWHERE}:7", "--call", "sendto") == 1
    assert code("--from", "socket", "--to", f"{NOWHERE}:7", "--bound", "nobody") == 1


def test_every_reason_has_its_words_or_cannot_be_asked_for(node: Node) -> None:
    from tests.packets.sockets import SockReason

    asked = set(REASONS) | set(bind_explain.REASONS)
    assert asked | set(UNASKED) == set(SockReason.__members__) - {"REASONS"}
    assert not asked & set(UNASKED)
