# SPDX-License-Identifier: Apache-2.0
"""Stale sockets of a real resolver, of other network namespaces, and with few capabilities.

socket_node.py draws the node.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shunt.lab.netns import CLONE_NEWNET, Process
from tests.netns.socket_node import Node, a_node, say
from tests.netns.stale import GOES_ON, VIP, VIP6, aborted, closing, fate, only_stale, serve
from tests.netns.test_sockets_life import started_in

UDP = socket.SOCK_DGRAM


@pytest.fixture(scope="module")
def around() -> Iterator[Node]:
    with a_node("stale-else") as node:
        only_stale(node)
        yield node


@pytest.fixture
def node(around: Node) -> Iterator[Node]:
    """All are with the second backend; a daemon and pins of its own for each test."""
    around.settings(sockets={"cover": "all"})
    serve(around, 2, wait=False)
    around.start()
    try:
        yield around
    finally:
        around.close()
        around.process = None


# A resolver ----------------------------------------------------------------------------------

WAITS_S = 3  # for an answer, twice


def resolving(node: Node, server: str) -> Process:
    """The C library's resolver, which asks by a connected socket."""
    conf = node.directory / "resolv.conf"
    conf.write_text(f"nameserver {server}\noptions timeout:{WAITS_S} attempts:2\n")
    script = f"mount --bind {conf} /etc/resolv.conf; exec getent ahostsv4 address.example"
    (node.directory / "getent.log").unlink(missing_ok=True)
    argv = ["unshare", "--mount", "sh", "-ec", script]
    return node.here.start(argv, node.directory / "getent.log")


def replaced(node: Node, server: str) -> tuple[int, float, str]:
    """A name server stops answering with a question on its way, and is replaced.

    The resolver's exit code, how long it took from then on, and what it found.
    """
    silent = node.name_servers["be2"].popen
    silent.send_signal(signal.SIGSTOP)
    try:
        asked = node.calls().get("TO_BACKEND_CONNECT", 0)
        resolver = resolving(node, server)
        node.until(lambda: node.calls().get("TO_BACKEND_CONNECT", 0) > asked, "asks")
        time.sleep(0.2)
        assert resolver.running, "waits for an answer"
        serve(node, 1)
        began = time.monotonic()
        code = resolver.popen.wait(30)
        return code, time.monotonic() - began, resolver.log.read_text()
    finally:
        silent.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("server", [VIP, VIP6], ids=["4", "6"])
def test_a_resolver_asks_the_next_server_at_once(node: Node, server: str) -> None:
    code, took_s, found = replaced(node, server)
    assert code == 0
    assert found.split()[0] == "192.0.2.1", "the answer of the other server"
    assert took_s < WAITS_S / 2
    assert closing(node)["udp"] == 1


def test_without_it_the_resolver_waits_and_gives_up(node: Node) -> None:
    """What the test above rests on."""
    node.settings(sockets={"close": "off"})
    code, took_s, found = replaced(node, VIP)
    assert (code, found) == (2, "")
    assert took_s > WAITS_S


# Other network namespaces --------------------------------------------------------------------

# A way to everywhere is enough to be connected.
ROUTED = ("link set lo up", "addr add 192.0.2.1/24 dev lo", "route add default dev lo")

# In a namespace that nobody gave a name to, by the whole process or by one thread of it.
ELSEWHERE = f"""
import ctypes, socket, subprocess, sys, threading
def talk():
    assert ctypes.CDLL(None).unshare({CLONE_NEWNET}) == 0
    for command in {ROUTED}:
        subprocess.run(["ip", *command.split()], check=True)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(30)
        sock.connect(("{VIP}", 7))
        print("connected", flush=True)
        try:
            sock.recv(1)
        except OSError as e:
            print(e.errno, flush=True)
if sys.argv[1] == "thread":
    thread = threading.Thread(target=talk)
    thread.start()
    thread.join()
else:
    talk()
"""


@pytest.mark.parametrize("who", ["thread", "process"])
def test_in_a_namespace_without_a_name(node: Node, who: str) -> None:
    log = node.directory / f"elsewhere-{who}.log"
    there = node.here.start([sys.executable, "-c", ELSEWHERE, who], log)
    try:
        node.until(lambda: "connected" in log.read_text(), "is connected")
        serve(node, 1)
        node.until(lambda: not there.running, "gets an error", 10)
        assert log.read_text().split() == ["connected", str(errno.ECONNABORTED)]
        assert closing(node)["udp"] == 1
    finally:
        there.stop()


def test_in_named_ones_and_the_daemon_stays_in_its_own(node: Node) -> None:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(node.client(kind=UDP, guest=g)) for g in (True, False)]
        for sock in sockets:
            sock.connect((VIP, 7))
            assert say(sock) == "be2"
        serve(node, 1)
        aborted(node, sockets)
        assert closing(node)["udp"] == 2
        assert node.process is not None
        tasks = Path(f"/proc/{node.process.pid}/task").iterdir()
        assert {(t / "ns/net").stat().st_ino for t in tasks} == {node.here.path.stat().st_ino}


@contextlib.contextmanager
def a_socket_of_nowhere() -> Iterator[socket.socket]:
    """Nothing but the socket itself keeps its network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)

    def make() -> socket.socket:
        assert libc.unshare(CLONE_NEWNET) == 0
        for command in (
            "link set lo up",
            "addr add 192.0.2.1/24 dev lo",
            "route add default dev lo",
        ):
            subprocess.run(["ip", *command.split()], check=True)
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    with ThreadPoolExecutor(1) as thread:
        sock = thread.submit(make).result()
    with sock:
        yield sock


def test_one_that_cannot_be_entered_is_told_of(node: Node) -> None:
    with a_socket_of_nowhere() as sock:
        sock.connect((VIP, 7))
        serve(node, 1)
        node.until(lambda: closing(node)["left"] == 1, "is seen")
        assert fate(sock) is GOES_ON
        shown = node.shunt("status")
        assert shown.code == 1
        assert "1 cannot be closed" in shown.out
        assert "a network namespace that has no name, and no process to be seen" in shown.out
        assert "shunt_sockets_stale 1.0" in node.shunt("metrics").out
    serve(node, 1, 2)
    serve(node, 1)
    node.until(lambda: closing(node)["left"] == 0, "is gone")
    assert node.shunt("status").code == 0


# The unit ------------------------------------------------------------------------------------


SYSTEMD = Path(__file__).resolve().parents[2] / "systemd"


def capabilities(name: str) -> list[str]:
    """That a file of a unit gives."""
    lines = (SYSTEMD / name).read_text().splitlines()
    (bounding,) = (x for x in lines if x.startswith("CapabilityBoundingSet="))
    return bounding.partition("=")[2].lower().replace("cap_", "").split()


@pytest.mark.parametrize("more", [False, True], ids=["unit", "drop-in"])
def test_what_the_unit_allows(node: Node, *, more: bool) -> None:
    """Its own namespace's sockets; others' with the drop-in, of which here the capabilities count.
    tests/e2e/test_systemd_sockets.py has all of it."""
    held = [*capabilities("shuntd.service"), *(capabilities("namespaces.conf") if more else ())]
    only = ",".join(["-all", *(f"+{name}" for name in held)])
    prepare = f'set -- setpriv --bounding-set={only} --inh-caps=-all "$@"'
    with started_in(node, prepare), contextlib.ExitStack() as stack:
        own, other = (stack.enter_context(node.client(kind=UDP, guest=g)) for g in (False, True))
        for sock in (own, other):
            sock.connect((VIP, 7))
        serve(node, 1)
        aborted(node, [own, other] if more else [own])
        node.until(lambda: closing(node)["left"] == (0 if more else 1), "is counted")
        assert (closing(node)["barred"] is None) == more
        if not more:
            assert fate(other) is GOES_ON
            shown = node.shunt("status").out
            assert "network namespaces cannot be entered" in shown
            assert "fix: start shuntd with CAP_SYS_ADMIN and CAP_SYS_PTRACE" in shown
            settings = node.config.read_text()
            assert "cover: all" in settings
            node.config.write_text(settings.replace("cover: all", "cover: host"))
            node.until(lambda: closing(node)["barred"] is None, "needs no other namespace")
