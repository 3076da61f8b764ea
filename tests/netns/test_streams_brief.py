# SPDX-License-Identifier: Apache-2.0
"""Which connections are worth being paired: by what others of the same process carried."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from shunt.sockops.streams import BRIEF, CREDIT, TRIAL
from tests.netns.stream_forms import Guarded, guarded

# Opens CONNECTIONS to ADDRESS PORT, one after the other; each has MESSAGES answered. For each line
# of standard input, CONNECTIONS MESSAGES, until it ends.
CLIENT = """
import socket, sys
address, port = sys.argv[1], int(sys.argv[2])
for line in sys.stdin:
    connections, messages = map(int, line.split())
    for _ in range(connections):
        with socket.create_connection((address, port), 5) as sock:
            for n in range(messages):
                sock.sendall(b"question")
                if sock.recv(8) != b"question":
                    sys.exit("a wrong answer")
            sock.shutdown(socket.SHUT_WR)
            if sock.recv(1):  # its end: then both ends are closed, and it counts
                sys.exit("more than an answer")
    print("done", flush=True)
"""
SERVER = """
import socket, sys, threading
def echo(sock):
    with sock:
        while data := sock.recv(8):
            sock.sendall(data)
with socket.create_server((sys.argv[1], 0), backlog=1024) as listener:
    print(listener.getsockname()[1], flush=True)
    while True:
        threading.Thread(target=echo, args=(listener.accept()[0],), daemon=True).start()
"""


class Client:
    """A process that opens connections by way of the VIP."""

    def __init__(self, form: Guarded, port: int) -> None:
        self.form = form
        self.process = subprocess.Popen(
            [*form.client_space.enter, sys.executable, "-c", CLIENT, form.vip, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def opens(self, connections: int, messages: int) -> dict[str, int]:
        """Which events came of them."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self.form.counted() as events:
            self.process.stdin.write(f"{connections} {messages}\n")
            self.process.stdin.flush()
            assert self.process.stdout.readline() == "done\n"
        return events


@pytest.fixture(scope="module")
def ours() -> Iterator[Guarded]:
    with guarded("brief") as form:
        yield form


@pytest.fixture(scope="module")
def port(ours: Guarded) -> Iterator[int]:
    argv = [*ours.server_space.enter, sys.executable, "-c", SERVER, ours.address]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        yield int(server.stdout.readline())
        server.kill()


@pytest.fixture
def client(ours: Guarded, port: int) -> Iterator[Client]:
    one = Client(ours, port)
    with one.process:
        yield one
        one.process.kill()


def test_brief_connections_are_left_to_tcp_but_for_some(client: Client) -> None:
    events = client.opens(CREDIT + 10 * TRIAL, BRIEF - 1)
    assert CREDIT + 10 <= events["PAIRED"] <= CREDIT + 12
    assert events["PAIRED"] + events["LEFT_BRIEF"] == CREDIT + 10 * TRIAL


def test_others_are_all_paired(client: Client) -> None:
    events = client.opens(3 * CREDIT, BRIEF)
    assert events["PAIRED"] == 3 * CREDIT
    assert "LEFT_BRIEF" not in events


def test_a_client_whose_connections_grow_long_is_found_out(client: Client) -> None:
    assert client.opens(CREDIT + TRIAL, 1)["LEFT_BRIEF"] >= TRIAL - 2
    # The trial among them makes good all that went before.
    assert client.opens(TRIAL, 64 * CREDIT)["PAIRED"] >= 1
    assert client.opens(CREDIT - 1, 1)["PAIRED"] == CREDIT - 1


def test_each_process_has_its_own(client: Client, ours: Guarded, port: int) -> None:
    client.opens(CREDIT + TRIAL, 1)
    other = Client(ours, port)
    with other.process:
        assert other.opens(CREDIT - 1, 1)["PAIRED"] == CREDIT - 1
        other.process.kill()
