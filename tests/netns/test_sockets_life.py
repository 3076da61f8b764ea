# SPDX-License-Identifier: Apache-2.0
"""Translated sockets while backends, the daemon, the settings and the host around them change.

socket_node.py draws the node.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from shunt.kern import cgroup, links
from shunt.kern.objects import open_pin
from tests.netns.socket_node import NOWHERE, SIX, Node, a_node, say, say_to

UDP = socket.SOCK_DGRAM
CHECKED = "203.0.113.10"
ROUNDS = 24


@pytest.fixture(scope="module")
def around() -> Iterator[Node]:
    with a_node("sockets-life") as node:
        yield node


@pytest.fixture
def node(around: Node) -> Iterator[Node]:
    """With a daemon and pins of its own for each test."""
    around.settings()
    around.start()
    try:
        yield around
    finally:
        around.close()
        around.process = None


def answering(node: Node, vip: str, rounds: int = ROUNDS) -> set[str]:
    """Who answers new connections."""
    seen = set()
    for _ in range(rounds):
        with node.connected(vip) as sock:
            seen.add(say(sock))
    return seen


def attached_programs() -> set[int]:
    """The ids of all programs at the root of the control groups, as bpftool has them."""
    shown = subprocess.run(
        ["bpftool", "-j", "cgroup", "show", str(cgroup.root())], capture_output=True, check=True
    )
    return {each["id"] for each in json.loads(shown.stdout.strip() or "[]")}


def pinned_programs(node: Node) -> set[int]:
    found = set()
    for path in (node.bpffs / "sockets/links").iterdir():
        fd = open_pin(path)
        found.add(links.cgroup_info(fd)[1])
        socket.close(fd)
    return found


class Traffic:
    """Connections, one after the other, and what went on before: all have to be answered."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.answers: Counter[str] = Counter()
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(one,))
            for one in (self._connect, self._send, self._talk)
        ]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        assert self.failures == []

    def wait(self, more: int = 50) -> None:
        """Until so many more of each kind were answered."""
        before = self.answers.copy()
        kinds = ("connect", "send", "talk")
        self.node.until(
            lambda: all(self.answers[k] >= before[k] + more for k in kinds) or self.failures != [],
            "answers",
        )

    def _run(self, one: object) -> None:
        try:
            assert callable(one)
            one()
        except (OSError, AssertionError, ValueError) as e:
            self.failures.append(f"{one}: {e!r}")

    def _connect(self) -> None:
        while not self._stop.is_set():
            for vip in (NOWHERE, SIX):
                with self.node.connected(vip) as sock:
                    assert sock.getpeername()[:2] == (vip, 7)
                    say(sock)
            self.answers["connect"] += 1

    def _send(self) -> None:
        """One socket, never connected: it stays with its backend."""
        with self.node.client(kind=UDP) as sock:
            first = say_to(sock, NOWHERE)
            while not self._stop.is_set():
                assert say_to(sock, NOWHERE) == first
                self.answers["send"] += 1

    def _talk(self) -> None:
        with self.node.connected(NOWHERE) as tcp, self.node.connected(SIX, kind=UDP) as udp:
            names = say(tcp), say(udp)
            while not self._stop.is_set():
                assert (say(tcp), say(udp)) == names
                assert tcp.getpeername() == (NOWHERE, 7)
                self.answers["talk"] += 1


# Backends ------------------------------------------------------------------------------------


def test_a_drained_backend_gets_nothing_new_and_keeps_what_it_has(node: Node) -> None:
    with contextlib.ExitStack() as stack:
        old = [stack.enter_context(node.connected(NOWHERE)) for _ in range(ROUNDS)]
        names = [say(sock) for sock in old]
        sender = stack.enter_context(node.client(kind=UDP))
        while say_to(sender, NOWHERE)[0] != "be2":
            sender = stack.enter_context(node.client(kind=UDP))
        assert node.shunt("backend", "drain", "web", "10.9.2.2").code == 0
        assert answering(node, NOWHERE) == {"be1"}
        assert [say(sock) for sock in old] == names
        assert set(names) == {"be1", "be2"}
        assert say_to(sender, NOWHERE)[0] == "be2", "a flow that goes on"
        for _ in range(ROUNDS):
            with node.client(kind=UDP) as sock:
                assert say_to(sock, NOWHERE)[0] == "be1"
        assert node.shunt("backend", "undrain", "web", "10.9.2.2").code == 0
        assert answering(node, NOWHERE) == {"be1", "be2"}


def test_a_lost_backend_is_left_by_all_but_its_connections(node: Node) -> None:
    node.until(lambda: answering(node, CHECKED) == {"be1", "be2"}, "both are up")
    with contextlib.ExitStack() as stack:
        kept = [stack.enter_context(node.connected(CHECKED)) for _ in range(ROUNDS)]
        ours = [sock for sock in kept if say(sock) == "be1"]
        sender = stack.enter_context(node.client(kind=UDP))
        while say_to(sender, CHECKED)[0] != "be2":
            sender = stack.enter_context(node.client(kind=UDP))
        node.servers["be2"].kill()
        node.until(
            lambda: node.backend("checked", "10.9.2.2")["state"] == "failing", "sees the loss"
        )
        assert answering(node, CHECKED) == {"be1"}
        assert say_to(sender, CHECKED) == ("be1", (CHECKED, 7)), "the same socket, another backend"
        assert {say(sock) for sock in ours} == {"be1"}
    node.servers["be2"].start()
    node.servers["be2"].wait_ready()


# The daemon ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["restart", "kill -9"])
def test_the_daemon_goes_and_comes_again(node: Node, number: int) -> None:
    with Traffic(node) as traffic:
        traffic.wait()
        assert node.process is not None
        node.process.popen.send_signal(number)
        node.process.popen.wait()
        before = pinned_programs(node)
        assert len(before) == 10
        assert before <= attached_programs()
        for _ in range(5):
            assert answering(node, NOWHERE) == {"be1", "be2"}
        node.start()
        traffic.wait()
        assert not pinned_programs(node) & before, "swapped"
        assert node.json("status")["sockets"]["attached"]


def test_map_sizes_change_under_traffic(node: Node) -> None:
    with Traffic(node) as traffic:
        traffic.wait()
        assert node.process is not None
        node.process.stop()
        node.process = None
        node.settings(limits={"slots": 131072, "backends": 65536, "flows": 4096, "nat": 4096})
        node.start()
        traffic.wait()
        assert node.shunt("backend", "drain", "web", "10.9.1.2").code == 0
        assert answering(node, NOWHERE) == {"be2"}, "the new tables are read"


# The settings --------------------------------------------------------------------------------


def test_all_namespaces_or_this_one_or_none(node: Node) -> None:
    def by_guest() -> str:
        with node.client(guest=True) as sock:
            sock.settimeout(0.5)
            try:
                sock.connect((NOWHERE, 7))
            except OSError:
                return "nobody"
            assert sock.getpeername() == (NOWHERE, 7)
            return say(sock)

    assert by_guest() == "nobody"
    node.settings(sockets="all")
    assert by_guest() in {"be1", "be2"}
    assert answering(node, NOWHERE) == {"be1", "be2"}
    assert node.json("status")["sockets"]["scope"] == "all"
    with node.client(guest=True) as sock:
        sock.settimeout(0.5)
        # Which address of the guest's it would have shows later: the packet goes its way.
        with pytest.raises(OSError, match=r"timed out|unreachable|No route"):
            sock.connect(("203.0.113.8", 7))
    assert node.calls()["PASS_SOURCE_UNKNOWN"] == 1
    node.settings(sockets="host")
    assert by_guest() == "nobody"
    with node.connected(NOWHERE) as kept:
        name, ours = say(kept), pinned_programs(node)
        node.settings(sockets="off")
        assert not ours & attached_programs()
        assert not (node.bpffs / "sockets").exists()
        assert say(kept) == name
        with node.client() as sock, pytest.raises(OSError, match="unreachable"):
            sock.connect((NOWHERE, 7))
    shown = node.json("status")
    sockets = shown["sockets"]
    assert (sockets["scope"], sockets["cgroup"], sockets["attached"]) == ("off", "", False)
    assert (sockets["whole"], sockets["calls"]) == (False, {})
    assert sockets["closing"]["which"] == "off"
    assert sockets["streams"]["attached"] is False
    assert [problem for problem in shown["problems"] if "socket" in problem] == []


def test_status_sees_that_somebody_detached_a_program(node: Node) -> None:
    fd = open_pin(node.bpffs / "sockets/links/shunt_connect4")
    links.detach(fd)
    socket.close(fd)
    shown = node.shunt("status")
    assert shown.code == 1
    assert "NOT ATTACHED" in shown.out
    assert "sockets: a program has been detached from /sys/fs/cgroup" in shown.out
    assert node.process is not None
    node.process.stop()
    node.start()
    assert node.json("status")["sockets"]["attached"]
    assert answering(node, NOWHERE) == {"be1", "be2"}


def test_cleanup_leaves_nothing_attached(node: Node) -> None:
    ours = pinned_programs(node)
    assert len(ours & attached_programs()) == 10
    assert node.process is not None
    node.process.stop()
    done = node.shunt("cleanup", "--yes", "--bpffs", str(node.bpffs))
    assert done.code == 0
    assert f"removed {node.bpffs}/sockets/links/shunt_connect4" in done.out
    assert not ours & attached_programs()
    assert not node.bpffs.exists()


# The host around it --------------------------------------------------------------------------


@contextlib.contextmanager
def started_in(node: Node, prepare: str) -> Iterator[None]:
    """shuntd in a mount namespace of its own, after `prepare` has run there."""
    assert node.process is not None
    node.process.stop()
    script = ["unshare", "--mount", "sh", "-ec", f'{prepare}; exec "$@"', "sh"]
    usual = node.argv
    node.argv = lambda *more: [*script, *usual(*more)]  # type: ignore[method-assign]
    try:
        node.start()
        yield
    finally:
        node.argv = usual  # type: ignore[method-assign]


def test_without_cgroup_v2_packets_are_balanced_and_status_says_why(node: Node) -> None:
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()
              if line.split()[2] == "cgroup2"]  # fmt: skip
    with started_in(node, "; ".join(f"umount {mount}" for mount in mounts)):
        done = node.shunt("status", "-o", "json")
        assert done.code == 1
        shown = done.json
        assert not shown["sockets"]["attached"]
        assert any("no cgroup v2 hierarchy is mounted" in p for p in shown["problems"])
        assert "mount -t cgroup2" in node.log.read_text()
        assert node.json("service", "list")
        assert [i["attached"] for i in shown["interfaces"]] == [True]
        # What the daemon before attached goes on.
        assert answering(node, NOWHERE) == {"be1", "be2"}


def test_what_the_unit_allows_is_enough(node: Node) -> None:
    """ProtectControlGroups=yes, and the capabilities of systemd/shuntd.service."""
    assert node.process is not None
    node.process.stop()
    assert node.shunt("cleanup", "--yes", "--bpffs", str(node.bpffs)).code == 0
    node.bpffs.mkdir()
    unit = Path(__file__).resolve().parents[2] / "systemd/shuntd.service"
    lines = unit.read_text().splitlines()
    assert "ProtectControlGroups=yes" in lines
    bounding = next(x for x in lines if x.startswith("CapabilityBoundingSet="))
    held = bounding.partition("=")[2].lower().replace("cap_", "").split()
    only = ",".join(["-all", *(f"+{name}" for name in held)])
    mount = cgroup.root()
    prepare = (
        f"mount -o remount,bind,ro {mount}; mkdir {node.directory}/x;"
        f" ! mkdir {mount}/shunt-test 2>/dev/null;"
        f' set -- setpriv --bounding-set={only} --inh-caps=-all "$@"'
    )
    with started_in(node, prepare):
        shown = node.json("status")["sockets"]
        assert (shown["scope"], shown["attached"]) == ("host", True)
        assert answering(node, NOWHERE) == {"be1", "be2"}
        with node.connected(NOWHERE) as sock:
            name = say(sock)
            rows = node.json("socket", "list", "web")
            assert [r["local_port"] for r in rows] == [sock.getsockname()[1]]
            assert rows[0]["backend"] == {"be1": "10.9.1.2:7", "be2": "10.9.2.2:7"}[name]
        told = node.json("explain", "--from", "socket", "--to", f"{NOWHERE}:7")
        assert told["verdict"] == "translate"
        assert node.process is not None
        status = Path(f"/proc/{node.process.pid}/status").read_text()
        effective = next(x for x in status.splitlines() if x.startswith("CapEff:"))
        assert int(effective.split()[1], 16).bit_count() == len(held)


def test_this_file_can_fail(node: Node) -> None:
    """Without the programs none of the connections above comes to be."""
    code = (
        "import socket, sys\n"
        f"try: socket.create_connection(('{NOWHERE}', 7), 1)\n"
        "except OSError as e: sys.exit(e.errno)\n"
    )
    assert node.here.run(sys.executable, "-c", code, check=False).returncode == 0
    node.settings(sockets="off")
    assert node.here.run(sys.executable, "-c", code, check=False).returncode == 101  # ENETUNREACH
