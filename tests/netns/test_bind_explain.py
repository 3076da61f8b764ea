# SPDX-License-Identifier: Apache-2.0
"""`shunt explain --from socket --call bind`: what a real bind() then ends in, who has the port, and
what to do instead.

socket_node.py draws the node.
"""

from __future__ import annotations

import errno
import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shunt.agent.bind_explain import REASONS
from shunt.agent.socket_upkeep import INSTEAD
from shunt.kern import cgroup, namespace
from tests.netns.socket_node import Node, a_node
from tests.netns.test_socket_binds import (
    ALLOWED,
    BOTH,
    DNS,
    REFUSED,
    SERVICES,
    SIX,
    TCP,
    UDP,
    WEB,
    bind,
)

GROUP = f"/shunt-bind-{os.getpid()}"
EXCLUDED = {"exclude": [GROUP]}
# Each of another kind: every one, the host's own (with node ports, and without), and nobody's.
ADDRESSES = (
    *("0.0.0.0", "::", "::ffff:0.0.0.0", "10.9.1.1", "::ffff:10.9.1.1", "fd09:1::1"),
    *("127.0.0.1", "::1", "203.0.113.2", "10.9.1.2", "fd09:1::2"),
)
PORTS = (0, WEB, DNS, SIX, BOTH, WEB + 1)
IN_A_GROUP = """
import os, socket, sys
group, address, port = sys.argv[1:]
open(group + "/cgroup.procs", "w").write(str(os.getpid()))
try:
    socket.socket().bind((address, int(port)))
except OSError as e:
    sys.exit(e.errno)
"""


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with a_node("bindexp", dns=False, serving=False) as node:
        for name, document in SERVICES.items():
            node.write(name, {"name": name, "mode": "nat", "health": "none", **document})
        node.settings(sockets=EXCLUDED)
        node.start()
        yield node


def call(address: str, port: int, *more: str) -> tuple[str, ...]:
    to = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    return ("explain", "--from", "socket", "--call", "bind", "--to", to, *more)


def explain(node: Node, address: str, port: int, *more: str) -> dict[str, Any]:
    return node.json(*call(address, port, *more))  # type: ignore[no-any-return]


def steps(found: dict[str, Any]) -> list[str]:
    return [step["step"] for step in found["steps"]]


def test_it_says_what_a_real_bind_ends_in(node: Node) -> None:
    """Every address, port and protocol, with IPV6_V6ONLY and without."""
    ends = Counter[str]()
    for address, port, (kind, proto) in itertools.product(
        ADDRESSES, PORTS, ((TCP, "tcp"), (UDP, "udp"))
    ):
        for only in (False, True) if ":" in address else (False,):
            found = explain(
                node, address, port, "--proto", proto, *(("--ipv6-only",) if only else ())
            )
            ended = bind(node, address, port, kind, only=only)
            case = f"{address} {port}/{proto} {only}: {ended}"
            assert (found["verdict"] == "refuse") == (ended == errno.EADDRINUSE), case
            assert found["reason"] == ("REFUSED_NODE_PORT" if ended == 98 else "PASS_BIND"), case
            assert bool(found["service"]) == bool(found["fix"]) == (ended == 98), case
            # What the kernel itself minds is not Shunt's to say.
            assert ended in {0, errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EINVAL}, case
            ends[found["verdict"]] += 1
    assert ends["refuse"] > 20 < ends["pass"]


@pytest.mark.parametrize(("address", "port", "kind"), [*REFUSED, *ALLOWED])
def test_it_says_what_that_files_cases_end_in(
    node: Node, address: str, port: int, kind: int
) -> None:
    """Those that tests/netns/test_socket_binds.py has by name."""
    found = explain(node, address, port, "--proto", "tcp" if kind == TCP else "udp")
    refused = (address, port, kind) in REFUSED
    assert found["verdict"] == ("refuse" if refused else "pass")
    holders = {WEB: "np-web", DNS: "np-dns", SIX: "np-six", BOTH: "np-both"}
    assert found["service"] == (holders[port] if refused else "")


def test_each_step_is_told(node: Node) -> None:
    told = ["node-port", "frontend", "service", "verdict"]
    assert steps(explain(node, "10.9.1.1", WEB)) == told
    named = explain(node, "203.0.113.2", WEB)
    assert (steps(named), named["verdict"]) == (told, "pass"), "a VIP that a service names"
    assert "service named-too" in named["steps"][1]["text"]
    assert "asks for no address of this node" in named["steps"][2]["text"]
    assert steps(explain(node, "127.0.0.1", WEB)) == ["node-port", "frontend", "verdict"]
    assert steps(explain(node, "0.0.0.0", WEB)) == ["node-port", "verdict"]
    assert steps(explain(node, "::", BOTH)) == ["node-port", "verdict"]
    assert steps(explain(node, "::", WEB)) == ["node-port", "node-port", "verdict"]
    assert steps(explain(node, "::", 0)) == ["port", "verdict"]
    done = node.shunt(*call("0.0.0.0", WEB))
    assert done.code == 0
    assert done.out == (
        f"bind() of tcp to 0.0.0.0:{WEB}\n"
        f"  node-port  a service has {WEB}/tcp on this node's addresses of IPv4\n"
        f"  verdict    the call fails with EADDRINUSE: {WEB}/tcp is a port of service np-web on"
        " this node's addresses: what clients send there would never reach a listener"
        " (refused-node-port)\n"
        f"  fix        {INSTEAD}\n"
    )


def test_what_to_do_instead_is_so(node: Node) -> None:
    """Each way that the fix names."""
    found = explain(node, "::", WEB)
    assert (
        found["fix"] == f"let the socket have IPV6_V6ONLY, which leaves IPv4's alone; or {INSTEAD}"
    )
    for address, port, only in (("::", WEB, True), ("::", WEB + 1, False), ("::1", WEB, False)):
        more = ("--ipv6-only",) if only else ()
        assert explain(node, address, port, *more)["verdict"] == "pass"
        assert bind(node, address, port, only=only) == 0
    assert explain(node, "::", SIX)["fix"] == INSTEAD, "that port is IPv6's"
    assert bind(node, "::", SIX, only=True) == errno.EADDRINUSE
    told = explain(node, "::", WEB, "--ipv6-only")["steps"][0]["text"]
    assert told.endswith("of IPv4's it takes none (IPV6_V6ONLY)")


def test_all_services_that_have_the_port_are_named(node: Node) -> None:
    node.write("np-web-two", {
        "name": "np-web-two", "vip": "node/fd09::/16", "ports": [WEB], "mode": "nat",
        "backends": ["[fd09:1::2]:80"], "health": "none",
    })  # fmt: skip
    try:
        node.until(lambda: bind(node, "fd09:1::1", WEB) == errno.EADDRINUSE, "is reserved")
        assert explain(node, "0.0.0.0", WEB)["service"] == "np-web"
        assert explain(node, "fd09:1::1", WEB)["service"] == "np-web-two"
        # IPv6's is found first, and no more is asked.
        assert explain(node, "::", WEB)["service"] == "np-web-two"
        want = f"fd09:1::1, port {WEB}/tcp was refused"
        node.until(lambda: want in node.log.read_text(), "is told")
        assert f"{WEB}/tcp is a port of service np-web-two on" in node.log.read_text()
    finally:
        (node.services / "np-web-two.yaml").unlink()
        node.until(lambda: bind(node, "fd09:1::1", WEB) == 0, "is free again")


def test_another_network_namespace(node: Node) -> None:
    """Whatever `sockets` covers."""
    with node.guest.inside():
        theirs = str(namespace.cookie())
    with node.here.inside():
        own = str(namespace.cookie())

    def check() -> None:
        found = explain(node, "0.0.0.0", WEB, "--netns", theirs)
        assert (found["verdict"], found["reason"]) == ("pass", "PASS_NAMESPACE")
        assert "this host's network namespace" in found["text"]
        assert bind(node, "0.0.0.0", WEB, guest=True) == 0
        assert explain(node, "0.0.0.0", WEB, "--netns", own)["verdict"] == "refuse"

    check()
    node.settings(sockets="all")
    try:
        check()
    finally:
        node.settings(sockets=EXCLUDED)


def test_an_excluded_control_group_is_no_way_round(node: Node) -> None:
    group = cgroup.root() / GROUP.lstrip("/")
    group.mkdir()
    try:
        node.until(lambda: _is_seen(node), "is seen")
        for address, ended in (("0.0.0.0", errno.EADDRINUSE), ("127.0.0.1", 0)):
            argv = [sys.executable, "-c", IN_A_GROUP, str(group), address, str(WEB)]
            done = subprocess.run([*node.here.enter, *argv], check=False)
            found = explain(node, address, WEB, "--cgroup", GROUP)
            assert (done.returncode, found["verdict"]) == (ended, "refuse" if ended else "pass")
            assert "control groups are not looked at" in found["steps"][-2]["text"]
        assert node.shunt(*call("0.0.0.0", WEB, "--cgroup", "/none")).code == 1
    finally:
        _remove(node, group)


def _is_seen(node: Node) -> bool:
    return bool(node.json("status")["sockets"]["excluded_cgroups"][0]["there"])


def _remove(node: Node, group: Path) -> None:
    events = group / "cgroup.events"
    node.until(lambda: "populated 0" in events.read_text(), "is empty")
    group.rmdir()


def test_while_node_ports_are_shared(node: Node) -> None:
    node.settings(sockets={**EXCLUDED, "node_ports": "share"})
    try:
        found = explain(node, "0.0.0.0", WEB)
        assert bind(node, "0.0.0.0", WEB) == 0
        assert (found["verdict"], found["reason"]) == ("pass", "PASS_BIND")
        assert (found["service"], found["fix"]) == ("np-web", "")
        assert "`sockets: {node_ports: share}`; but" in found["text"]
        assert "would never reach a listener" in found["text"]
        assert explain(node, "0.0.0.0", WEB + 1)["text"] == REASONS["PASS_BIND"]
    finally:
        node.settings(sockets=EXCLUDED)
    assert explain(node, "0.0.0.0", WEB)["verdict"] == "refuse"


def test_while_sockets_are_off(node: Node) -> None:
    node.settings(sockets="off")
    try:
        assert bind(node, "0.0.0.0", WEB) == 0
        done = node.shunt(*call("0.0.0.0", WEB))
        assert done.code == 1
        assert "may bind any port" in done.err
    finally:
        node.settings(sockets=EXCLUDED)


def test_asking_neither_counts_nor_tells(node: Node) -> None:
    before, log = node.calls().get("REFUSED_NODE_PORT", 0), node.log.read_text()
    for _ in range(5):
        assert explain(node, "10.9.2.1", BOTH)["verdict"] == "refuse"
    assert node.calls().get("REFUSED_NODE_PORT", 0) == before
    assert bind(node, "10.9.3.1", BOTH) == errno.EADDRINUSE
    assert node.calls()["REFUSED_NODE_PORT"] == before + 1, "a real one is counted"
    node.until(lambda: "to 10.9.3.1" in node.log.read_text(), "is told")
    assert "to 10.9.2.1" not in node.log.read_text().removeprefix(log)


def test_what_makes_no_sense_is_refused(node: Node) -> None:
    assert node.shunt(*call("0.0.0.0", WEB, "--bound", "10.9.1.1")).code == 2
    assert node.shunt(*call("0.0.0.0", WEB, "--proto", "sctp")).code == 2
    assert node.shunt(*call("0.0.0.0", 65536)).code == 1
    assert node.shunt("explain", "--from", "10.9.1.2:9", "--to", "10.9.1.1:1",
                      "--call", "bind").code == 2  # fmt: skip
    done = node.shunt("explain", "--from", "socket", "--to", "10.9.1.1:0")
    assert (done.code, "port 0 can be bound" in done.err) == (1, True)
