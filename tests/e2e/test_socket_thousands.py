# SPDX-License-Identifier: Apache-2.0
"""10,000 connections at once through connect(), and what shuntd pays for them: nothing.

socket_node.py draws the node. The clients are processes of their own, for their descriptors.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shunt.lab.netns import Process
from tests.netns.socket_node import NOWHERE, SIX, Node, a_node

COUNT, CLIENTS, MADE_AT_ONCE = 10_000, 2, 200
MORE_KIB = 4096  # of shuntd's memory, for all 10,000: what any minute may bring

# Connects COUNT times to both VIPs in turn, MADE_AT_ONCE at a time; then, for each line read, sends
# one on every connection, takes the answers, and tells who answered how many and what was wrong.
CLIENT = """\
import asyncio, json, resource, sys
vips, count, at_once = sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_NOFILE, (count + 1000, count + 1000))

async def open_one(vip, turn):
    async with turn:
        reader, writer = await asyncio.open_connection(vip, 7)
        if writer.get_extra_info("peername")[0] != vip:
            raise OSError(f"peer {writer.get_extra_info('peername')}")
        return vip, reader, writer

async def ask(number, one, turn):
    vip, reader, writer = one
    async with turn:
        writer.write(b"%d\\n" % number)
        name, _peer, back = (await reader.readline()).decode().split()
        peer = writer.get_extra_info("socket").getpeername()[0]
        if int(back) != number or peer != vip:
            raise OSError(f"{back} of {peer}, not {number} of {vip}")
        return name

async def main():
    turn = asyncio.Semaphore(at_once)
    loop = asyncio.get_running_loop()
    opened = await asyncio.gather(
        *(open_one(vips[n % len(vips)], turn) for n in range(count)), return_exceptions=True)
    ones = [one for one in opened if not isinstance(one, BaseException)]
    wrong = [repr(one) for one in opened if isinstance(one, BaseException)]
    owners = None
    while await loop.run_in_executor(None, sys.stdin.readline):
        answers = await asyncio.gather(
            *(ask(n, one, turn) for n, one in enumerate(ones)), return_exceptions=True)
        wrong += [repr(a) for a in answers if isinstance(a, BaseException)]
        if owners not in (None, answers):
            wrong.append("answers from other backends than before")
        owners = answers
        told = {str(name): answers.count(name) for name in set(map(str, answers))}
        print(json.dumps({"open": len(ones), "wrong": wrong[:5], "answers": told}), flush=True)

asyncio.run(main())
"""


@pytest.fixture
def node() -> Iterator[Node]:
    with a_node("thousands") as node:
        node.start()
        yield node


def resident_kib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


def ask(clients: list[Process]) -> dict[str, Any]:
    """A line on every connection; what all clients tell, added up."""
    for client in clients:
        assert client.popen.stdin is not None
        client.popen.stdin.write(b"\n")
        client.popen.stdin.flush()
    total: dict[str, Any] = {"open": 0, "wrong": [], "answers": {}}
    for client in clients:
        assert client.popen.stdout is not None
        told = json.loads(client.popen.stdout.readline() or "{}")
        assert told, client.log_tail()
        total["open"] += told["open"]
        total["wrong"] += told["wrong"]
        for name, count in told["answers"].items():
            total["answers"][name] = total["answers"].get(name, 0) + count
    return total


@pytest.mark.timeout(300)
def test_ten_thousand_connections(node: Node) -> None:
    for server in node.servers.values():
        for process in server.processes:
            limit = f"--nofile={COUNT + 1000}"
            subprocess.run(["prlimit", f"--pid={process.pid}", limit], check=True)
    assert node.process is not None
    node.json("status")
    before, calls = resident_kib(node.process.pid), node.calls()
    clients = [
        node.here.start(
            [sys.executable, "-c", CLIENT, f"{NOWHERE},{SIX}", str(COUNT // CLIENTS),
             str(MADE_AT_ONCE)],
            node.directory / f"client-{n}.log", pipes=True,
        )
        for n in range(CLIENTS)
    ]  # fmt: skip
    try:
        told = ask(clients)
        assert (told["open"], told["wrong"]) == (COUNT, [])
        assert set(told["answers"]) == {"be1", "be2"}
        assert min(told["answers"].values()) > COUNT * 0.45
        made = node.calls()["TO_BACKEND_CONNECT"] - calls.get("TO_BACKEND_CONNECT", 0)
        assert made == COUNT
        assert resident_kib(node.process.pid) - before < MORE_KIB
        node.process.kill()
        assert ask(clients)["wrong"] == []
        node.start()
        assert ask(clients) == told, "each with the backend that it had"
    finally:
        for client in clients:
            client.stop()
            for pipe in (client.popen.stdin, client.popen.stdout):
                if pipe is not None:
                    pipe.close()
