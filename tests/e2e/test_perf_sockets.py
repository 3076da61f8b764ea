# SPDX-License-Identifier: Apache-2.0
"""The programs of `make perf-sockets` measure every way, and see what goes wrong."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from perf import generators, socket_rounds
from perf.socket_ways import BUILD, KINDS, PORT, SHUNT, Did, Way, ways
from shunt.lab.netns import Process
from shunt.lab.topology import BPFFS
from shunt.lb.errors import ShuntError

SERVER = [str(BUILD / "socket_server"), str(PORT)]
HELD_S = 0.2


@pytest.fixture(scope="module")
def every() -> Iterator[list[Way]]:
    with ways([40]) as made:
        yield made


@pytest.fixture
def direct(every: list[Way]) -> Way:
    return next(way for way in every if way.kind == "direct")


def test_every_way_is_measured_in_every_case(every: list[Way]) -> None:
    taken = socket_rounds.one_round(every, generators.Own(), random.Random(1), 0.1, 0.1)
    assert [way.kind for way in taken] == list(KINDS)
    for way, found in taken.items():
        assert set(found) == {*socket_rounds.MEASURED, *socket_rounds.BESIDES}
        assert min(found[name] for name in socket_rounds.MEASURED) > 0
        ours = way.kind in SHUNT
        assert all((found[name] > 0) == ours for name in socket_rounds.PROGRAMS)
        # The first ones of a process.
        for name in socket_rounds.REDIRECTED:
            assert (found[name] > 0) == (way.kind == "redirected"), name


def test_a_way_whose_services_nobody_translates_is_no_way(direct: Way) -> None:
    """What the test above rests on: without a translator nobody answers at a VIP."""
    with direct.serving(SERVER) as server:
        argv = [str(BUILD / "socket_client"), "connections", str(server.pid), "198.19.0.0", "40"]
        with pytest.raises(ShuntError, match="failed"):
            direct.client(*argv, str(PORT), "0.1")


def held_up(way: Way, server: Process, run: Callable[[], Did]) -> Did:
    """Run a client while the server stands still for HELD_S in its midst."""

    def hold() -> None:
        time.sleep(0.5)
        os.kill(server.pid, signal.SIGSTOP)
        time.sleep(HELD_S)
        os.kill(server.pid, signal.SIGCONT)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        return run()
    finally:
        thread.join()


@pytest.mark.parametrize("kept", [1, 32, 0])
def test_requests_that_were_due_while_the_server_stood_still_are_slow(
    direct: Way, kept: int
) -> None:
    with direct.serving(SERVER) as server:
        did = held_up(direct, server, lambda: direct.paced(1.0, 1000, kept))
    # A fifth of them were due then, and waited up to 0.2 s.
    assert did.count == 1000
    assert did.p99_us > HELD_S * 1e6 * 0.8


def test_a_client_that_waits_for_answers_would_leave_that_out(direct: Way) -> None:
    """Coordinated omission: one call of many is slow, as the others were not made meanwhile."""
    with direct.serving(SERVER) as server:
        run = lambda: direct.did("connections", 2.0, None, server, together=False)  # noqa: E731
        did = held_up(direct, server, run)
    assert did.count > 100
    assert did.p99_us < HELD_S * 1e6 * 0.2


def test_sockperf_asks_every_kind_of_way(every: list[Way]) -> None:
    for way in every:
        found = generators.Sockperf().latency(way, 1, 0.4)
        assert 0 < found.p50 <= found.p99 <= found.p999, way


def test_what_was_due_while_nothing_came_through_to_sockperf_is_slow(direct: Way) -> None:
    def cut() -> None:
        # It begins to measure half a second after it began to send, which may be seconds after its
        # start, and goes on for two and a half.
        begin, deadline = received(direct) + 1000, time.monotonic() + 60
        while received(direct) < begin and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(1)
        direct.pods.ip("link set dev eth0 down")
        time.sleep(HELD_S)
        direct.pods.ip("link set dev eth0 up")

    cutting = threading.Thread(target=cut)
    cutting.start()
    try:
        found = generators.Sockperf().latency(direct, 1, 2.4)
    finally:
        cutting.join()
    assert found.p99 > HELD_S * 1e6 * 0.8


def received(way: Way) -> int:
    """Packets that came to the servers' end."""
    with way.pods.inside():
        rows = Path("/proc/thread-self/net/dev").read_text().splitlines()
    return next(int(row.split()[2]) for row in rows if row.lstrip().startswith("eth0:"))


def serve(way: Way, answer: Callable[[socket.socket], None]) -> Callable[[], None]:
    """Take connections with `answer` until what is returned is called."""
    with way.pods.inside():
        listener = socket.create_server(("0.0.0.0", PORT), backlog=64)

    def accept() -> None:
        while True:
            try:
                taken, _ = listener.accept()
            except OSError:
                return
            with taken:
                answer(taken)

    thread = threading.Thread(target=accept)
    thread.start()

    def end() -> None:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()

    return end


def other_number(sock: socket.socket) -> None:
    message = bytearray(sock.recv(64))
    message[9] ^= 1
    sock.sendall(message)
    sock.recv(64)


def too_few(sock: socket.socket) -> None:
    taken = 0
    while got := len(sock.recv(1 << 16)):
        taken += got
    sock.sendall((taken - 1).to_bytes(8, "little"))


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        (["socket_client", "requests", "{pid}", "{at}", "1"], other_number),
        (["socket_client", "connections", "{pid}", "{at}", "1"], other_number),
        (["socket_client", "bulk", "{pid}", "{at}", "1"], too_few),
        (["socket_paced", "{at}", "1"], other_number),
    ],
    ids=["requests", "connections", "bulk", "paced"],
)
def test_a_wrong_answer_ends_the_measurement(
    direct: Way, argv: list[str], answer: Callable[[socket.socket], None]
) -> None:
    last = {"requests": ["1"], "bulk": ["4096"], "10.0.0.1": ["100", "1"]}
    words = [word.format(pid=os.getpid(), at="10.0.0.1") for word in argv]
    end = serve(direct, answer)
    try:
        with pytest.raises(ShuntError, match=r"wrong answer|bytes were lost"):
            direct.client(
                str(BUILD / words[0]), *words[1:], str(PORT), "0.2", *last.get(words[1], [])
            )
    finally:
        end()


def test_the_servers_work_is_part_of_the_cost(direct: Way) -> None:
    with direct.serving(SERVER) as server:
        first, addresses = direct.asked
        argv = [str(BUILD / "socket_client"), "requests"]
        rest = [first, str(addresses), str(PORT), "0.3", "32"]
        both, alone = (
            json.loads(direct.client(*argv, str(pid), *rest)) for pid in (server.pid, os.getpid())
        )
    assert both["cpu_s"] / both["count"] > alone["cpu_s"] / alone["count"] * 1.2


def test_nginx_answers_where_wrk2_would_ask(direct: Way) -> None:
    with generators.nginx(direct):
        said = direct.client("curl", "-sS", f"http://10.0.0.7:{PORT}/")
    assert said.startswith("pod ")


def test_closing_a_way_leaves_nothing() -> None:
    with ways([2], ["translated"]) as (way,):
        pins = BPFFS / way.node.name
        there = [way.node.path, way.pods.path, way.directory, pins]
        assert all(path.exists() for path in there)
    assert not any(path.exists() for path in there)
