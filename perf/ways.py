# SPDX-License-Identifier: Apache-2.0
"""Ways from a client to services on a node, alike but for who translates.

```
    client                       node                             server
    eth0 192.0.2.2 --- 192.0.2.1 eth0, eth1 198.51.100.1 --- eth0 198.51.100.2
                                 direct, tc, nftables              10.0.0.0/8, every address of it
                                 or iptables
```
Every service has backends that answer. All ways stand beside each other, each with namespaces of
its own, and do nothing until they are measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from perf.fleet import FIRST, VIPS, Fleet, Shuntd
from perf.rivals import Published, iptables, nftables
from shunt.lab.netns import Namespace, Process, cable
from shunt.lb.errors import ShuntError

CONNECTIONS = Path(__file__).parent.parent / "build/connections"
KINDS = ("direct", "tc", "tc-peer", "nftables", "iptables")
BACKENDS, PORT = 2, 80
PATIENCE_S = 300.0


@dataclass(frozen=True)
class Rate:
    """Short connections. `failed` of them did not come to their end."""

    connections: int
    failed: int
    wall_s: float
    cpu_s: float


class Way:
    """A client, a node and a server. `kind` is one of KINDS."""

    def __init__(self, kind: str, services: int, directory: Path) -> None:
        """Raises: ShuntError; close() removes what there is."""
        self.kind, self.services, self.directory = kind, services, directory
        self.shuntd: Shuntd | None = None
        self._stack = contextlib.ExitStack()
        try:
            self._connect()
            if kind.startswith("tc"):
                self._start_shuntd()
            elif kind != "direct":
                self._load_rules()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove everything."""
        self._stack.close()

    def _connect(self) -> None:
        made = []
        for end in ("client", "node", "server"):
            name = f"shunt-way-{os.getpid()}-{self.kind}-{self.services}-{end}"
            made.append(Namespace.create(name))
            self._stack.callback(made[-1].delete)
        self.client, self.node, self.server = made
        cable(self.node, "eth0", self.client, "eth0")
        cable(self.node, "eth1", self.server, "eth0")
        self.node.ip(
            "addr add 192.0.2.1/24 dev eth0",
            "addr add 198.51.100.1/24 dev eth1",
            "route add 10.0.0.0/8 via 198.51.100.2",
        )
        self.client.ip("addr add 192.0.2.2/24 dev eth0", "route add default via 192.0.2.1")
        self.server.ip(
            "addr add 198.51.100.2/24 dev eth0",
            "route add default via 198.51.100.1",
            "route add local 10.0.0.0/8 dev lo",
        )
        self.node.sysctl({"ipv4.ip_forward": 1})

    def _start_shuntd(self) -> None:
        peer = self.kind == "tc-peer"
        here = self.node, self.directory, self.services, BACKENDS
        fleet = Fleet(*here, by_tc=True, by_peers=peer)
        self.shuntd = self._stack.enter_context(fleet.running())
        interface = self.shuntd.status()["interfaces"][-1]
        if interface["tc"] == "none":
            raise ShuntError("TC programs are not attached", str(interface), "see its log")

    def _load_rules(self) -> None:
        published = (
            Published(n, str(VIPS + n), PORT, [str(a) for a in self._backends(n)])
            for n in range(self.services)
        )
        rules = self.directory / "rules"
        if self.kind == "nftables":
            rules.write_text(nftables(published))
            argv = ["nft", "-f", str(rules)]
        else:
            rules.write_text(iptables(published))
            argv = ["iptables-restore", str(rules)]
        self.node.run(*argv, timeout_s=PATIENCE_S)

    @staticmethod
    def _backends(service: int) -> list[object]:
        return [FIRST + service * BACKENDS + b for b in range(BACKENDS)]

    def connections(self, count: int) -> Rate:
        """Make so many short connections to all services, in random order.

        Raises: ShuntError if one of them failed.
        """
        first, addresses = VIPS, self.services
        if self.kind == "direct":
            first, addresses = FIRST, self.services * BACKENDS
        where = [str(self.server.path), str(PORT), f"::ffff:{first}", str(PORT), str(addresses)]
        done = subprocess.run(
            [*self.client.enter, str(CONNECTIONS), *where, str(count)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        rate = Rate(**json.loads(done.stdout)) if done.returncode == 0 else None
        if not rate or rate.failed:
            why = "; ".join(done.stderr.splitlines()[-3:])
            raise ShuntError(f"connections {self}: not all came to their end", why, "see perf/")
        return rate

    def gbit_per_s(self, seconds: int) -> float:
        """What iperf3 receives over one connection.

        Raises: ShuntError if it cannot say.
        """
        log = self.directory / "iperf3.log"
        log.unlink(missing_ok=True)
        listening = ["iperf3", "-s", "-1", "-p", str(PORT), "--forceflush"]
        server = self.server.start(listening, log)
        try:
            _until_listening(server)
            to = FIRST if self.kind == "direct" else VIPS + self.services // 2
            done = self.client.run(
                *("iperf3", "-c", str(to), "-p", str(PORT), "-J", "-t", str(seconds)),
                timeout_s=PATIENCE_S,
            )
        finally:
            server.stop()
        return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 1e9

    def __str__(self) -> str:
        return f"{self.kind}, {self.services} services"


def _until_listening(server: Process) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while "listening" not in server.log_tail():
        if not server.running or time.monotonic() > deadline:
            raise ShuntError("iperf3 does not listen", server.log_tail(), "see its log")
        time.sleep(0.02)


@contextlib.contextmanager
def ways(services: list[int], kinds: tuple[str, ...] = KINDS) -> Iterator[list[Way]]:
    """All of them, for each number of services; they are gone on leaving.

    Raises: ShuntError.
    """
    with contextlib.ExitStack() as stack:
        made = []
        for number in services:
            for kind in kinds:
                directory = Path(tempfile.mkdtemp(prefix="shunt-way-"))
                stack.callback(shutil.rmtree, directory, ignore_errors=True)
                way = Way(kind, number, directory)
                stack.callback(way.close)
                made.append(way)
        yield made
