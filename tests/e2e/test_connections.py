# SPDX-License-Identifier: Apache-2.0
"""100,000 short connections in a row, of one client to one backend, while shuntd comes and goes.

The node is that of tests/netns/test_tc_datapath.py, with a service of one backend more. A client
has some 28,000 ports, so each is used again and again, and each time the backend still has the
connection before in TIME-WAIT.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from shunt.lab.netns import Namespace, Process
from tests.netns.shunt_host import Host
from tests.netns.test_tc_datapath import CLIENT_ADDR, NODE_ADDR, POD_ADDR, a_node

CONNECTIONS = Path(__file__).resolve().parents[2] / "build/connections"
COUNT, PORTS = 100_000, 60_999 - 32_768 + 1
VIP = {4: "203.0.113.9", 6: "2001:db8:a::9"}
PORT, LISTEN = 80, 9090
PATIENCE_S = 600


class Generator:
    """build/connections at work: COUNT of them, and then until it is told to end."""

    def __init__(self, host: Host, server: Namespace, address: str, port: int, count: int) -> None:
        self.log = host.directory / "connections.log"
        self.log.unlink(missing_ok=True)
        to = address if ":" in address else f"::ffff:{address}"
        argv = [str(CONNECTIONS), str(server.path), str(LISTEN), to, str(port), "1", str(count)]
        self.process: Process = host.outside.start(argv, self.log, pipes=True)

    def until(self, done: int) -> None:
        """Wait until so many have been made."""
        deadline = time.monotonic() + PATIENCE_S
        while self.done() < done:
            assert self.process.running, self.process.log_tail()
            assert time.monotonic() < deadline, self.process.log_tail()
            time.sleep(0.05)

    def done(self) -> int:
        return max((int(n) for n in self.log.read_text().split() if n.isdecimal()), default=0)

    def end(self) -> dict[str, float]:
        """What it found: connections, failed, wall_s, cpu_s."""
        out, _ = self.process.popen.communicate(timeout=PATIENCE_S)
        found: dict[str, float] = json.loads(out)
        return found


@pytest.fixture
def node() -> Iterator[tuple[Host, Namespace]]:
    with a_node("conn", xdp="off") as (host, pod):
        yield host, pod


@pytest.mark.timeout(2 * PATIENCE_S)
@pytest.mark.parametrize(("place", "ip"), [("pod", 4), ("node", 6)])
def test_no_connection_fails(node: tuple[Host, Namespace], place: str, ip: int) -> None:
    host, pod = node
    address = (POD_ADDR if place == "pod" else NODE_ADDR)[ip]
    backend = f"{address}:{LISTEN}" if ip == 4 else f"[{address}]:{LISTEN}"
    host.write(
        "short",
        {
            "name": "short",
            "vip": VIP[ip],
            "ports": [PORT],
            "mode": "local",
            "backends": [backend],
            "health": "none",
        },
    )
    host.start()
    assert host.process is not None
    generator = Generator(host, pod if place == "pod" else host.here, VIP[ip], PORT, COUNT)
    generator.until(COUNT // 10)
    assert host.shunt("program", "swap").code == 0
    generator.until(COUNT * 3 // 10)
    host.process.stop()
    generator.until(COUNT * 4 // 10)  # without it
    host.start()
    generator.until(COUNT * 6 // 10)
    host.process.kill()
    host.start()
    generator.until(COUNT * 8 // 10)
    assert host.shunt("program", "swap").code == 0
    assert generator.process.running, "all of that was in their midst"
    found = generator.end()
    assert found["connections"] >= COUNT > 3 * PORTS
    assert found["failed"] == 0, generator.log.read_text()[:2000]
    counted = {n: c["packets"] for n, c in host.json("status")["reasons"].items() if c["packets"]}
    assert {n for n in counted if "DROP" in n} == set(), counted
    assert counted["SENT_TO_BACKEND"] >= 4 * found["connections"], "SYN, ACK, byte, FIN"


def test_that_failures_are_seen(node: tuple[Host, Namespace]) -> None:
    host, pod = node
    generator = Generator(host, pod, CLIENT_ADDR[4], PORT, 1)  # nobody listens there
    found = generator.end()
    assert found["failed"] == found["connections"] > 0
    assert "connect: Connection refused" in generator.log.read_text()
