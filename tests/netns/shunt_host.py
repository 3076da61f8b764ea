# SPDX-License-Identifier: Apache-2.0
"""A node under test: shuntd as it is started, and the command as it is given.

```
    here                        outside
    eth0 10.9.0.1/24 ---------- eth0 10.9.0.2, .3   backends; TCP 80 and 8080 answer
         fd09::1/64                  10.9.0.9       a client; VIPs are via 10.9.0.1
    shuntd                           10.9.0.77      does not exist
```
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shunt.cli.main import run
from shunt.lab.netns import Namespace, Process, veth
from shunt.lab.topology import remove_tree

BACKENDS = ("10.9.0.2", "10.9.0.3")
CLIENT, ABSENT = "10.9.0.9", "10.9.0.77"
WEB, NAT, EMPTY, HALF, DIRECT = (f"203.0.113.{n}" for n in range(10, 15))
FAST = {"type": "tcp", "interval": "300ms", "timeout": "200ms", "rise": 1, "fall": 1}
SETTINGS = {"interfaces": ["eth0"], "limits": {"slots": 65536, "flows": 4096, "nat": 4096}}
SERVICES: dict[str, dict[str, Any]] = {
    "web": {
        "vip": [WEB, "2001:db8::10"],
        "ports": [80, "53/udp"],
        "backends": ["10.9.0.2", {"address": "10.9.0.3", "weight": 3}],
        "health": FAST,
    },
    "translated": {
        "vip": NAT,
        "ports": [80],
        "mode": "nat",
        "backends": ["10.9.0.2:8080"],
        "health": FAST,
    },
    "empty": {"vip": EMPTY, "ports": ["53/udp"], "backends": []},
    "direct": {"vip": DIRECT, "ports": ["53/udp"], "mode": "dsr-l2", "backends": ["10.9.0.3"]},
    "half": {"vip": HALF, "ports": [80], "backends": ["10.9.0.2", ABSENT], "health": FAST},
}
BACKEND_KEYS = {
    *("service", "backend", "address", "port", "state", "drained", "reason", "weight"),
    *("configured_weight", "slots", "share", "server_id", "nexthop", "health", "packets", "bytes"),
}
FLOW_KEYS = {
    *("service", "client", "client_port", "vip", "vip_port", "protocol", "state", "backend"),
    "idle_s",
}


def at(address: str, port: int) -> str:
    """As the configuration has it."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


@dataclass
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def lines(self, word: str) -> list[str]:
        return [line for line in self.out.splitlines() if word in line]


class Host:
    """The node under test: its namespace, its files, its daemon."""

    def __init__(self, here: Namespace, outside: Namespace, directory: Path) -> None:
        self.here, self.outside, self.directory = here, outside, directory
        self.bpffs = Path(f"/sys/fs/bpf/shunt-test-{os.getpid()}")
        self.run = directory / "run"
        self.config, self.services = directory / "shunt.yaml", directory / "services.d"
        self.state = directory / "state"
        self.log = directory / "shuntd.log"
        self.process: Process | None = None

    @property
    def sock(self) -> Path:
        return self.run / "shunt.sock"

    def write(self, name: str, document: object) -> None:
        (self.services / f"{name}.yaml").write_text(yaml.safe_dump(document))

    def argv(self, *more: str) -> list[str]:
        """How shuntd is started; the last of two equal options counts."""
        return [
            *(sys.executable, "-m", "shunt.agent.daemon"),
            *("--config", str(self.config), "--services", str(self.services)),
            *("--bpffs", str(self.bpffs), "--run", str(self.run)),
            *("--state", str(self.state), *more),
        ]

    def start(self, timeout_s: float = 60) -> None:
        self.process = self.here.start(self.argv(), self.log)
        self.until(lambda: self.shunt("service", "list").code == 0, "answers", timeout_s)

    def until(self, condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            ended = self.process is None or not self.process.running
            assert not ended, f"shuntd has ended: {self.process and self.process.log_tail(30)}"
            assert time.monotonic() < deadline, f"{what}: {self.log.read_text()[-3000:]}"
            time.sleep(0.05)

    def shunt(self, *argv: str) -> Done:
        """The command in this process, with the node's network."""
        out, err = io.StringIO(), io.StringIO()
        with (
            self.here.inside(),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = run(["--socket", str(self.sock), *argv])
        return Done(code, out.getvalue(), err.getvalue())

    def json(self, *argv: str) -> Any:
        done = self.shunt(*argv, "-o", "json")
        assert (done.code, done.err) == (0, "")
        return done.json

    def backend(self, service: str, name: str) -> Any:
        rows = self.json("backend", "list", service)
        return next(row for row in rows if row["backend"] == name)

    def connect(self, vip: str, port: int = 80) -> socket.socket:
        """Send a SYN; whether anybody answers does not matter here."""
        with self.outside.inside():
            client = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        client.bind((CLIENT, 0))
        client.connect_ex((vip, port))
        return client

    def datagram(self, vip: str, ttl: int = 64) -> int:
        """Send one; the client's port."""
        with self.outside.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, ttl)
            client.bind((CLIENT, 0))
            client.sendto(b"question", (vip, 53))
            return int(client.getsockname()[1])

    def attached(self) -> bool:
        """Whether the kernel has an XDP program on eth0."""
        shown = self.here.run("ip", "-j", "link", "show", "dev", "eth0").stdout
        return "xdp" in json.loads(shown)[0]

    def close(self) -> None:
        if self.process:
            self.process.stop()
        remove_tree(self.bpffs)


@contextlib.contextmanager
def a_host(name: str) -> Iterator[Host]:
    made: list[Namespace] = []
    # Not below pytest's directory: a socket's path is short, and that one is root's alone.
    directory = Path(tempfile.mkdtemp(prefix="shunt-api-"))
    directory.chmod(0o755)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        for end in ("here", "out"):
            made.append(Namespace.create(f"shunt-{name}-{os.getpid()}-{end}"))
            stack.callback(made[-1].delete)
        here, outside = made
        veth(here, "eth0", outside, "eth0", 1500)
        here.ip("addr add 10.9.0.1/24 dev eth0", "addr add fd09::1/64 dev eth0 nodad")
        outside.ip(*(f"addr add {a}/24 dev eth0" for a in (*BACKENDS, CLIENT)))
        outside.ip("route add 203.0.113.0/24 via 10.9.0.1")
        with outside.inside():
            for port in (80, 8080):
                # Nobody accepts: a backlog for all the checks that a test can take.
                listener = stack.enter_context(socket.create_server(("", port), backlog=4096))
                assert listener.getsockname()[1] == port
        host = Host(here, outside, directory)
        stack.callback(host.close)
        host.services.mkdir()
        host.config.write_text(yaml.safe_dump(SETTINGS))
        for service, document in SERVICES.items():
            host.write(service, {"name": service, **document})
        yield host


def refused(done: Done, *words: str) -> None:
    """Exit code 1, nothing on stdout, what/why/fix on stderr."""
    assert (done.code, done.out) == (1, "")
    what, why, fix = done.err.splitlines()[:3]
    assert what.startswith("shunt: ")
    assert why.startswith("  why: ")
    assert fix.startswith("  fix: ")
    for word in words:
        assert word in done.err


@contextlib.contextmanager
def watching(host: Host, *options: str) -> Iterator[subprocess.Popen[str]]:
    """`shunt monitor` as a process; it is gone afterwards."""
    watcher = subprocess.Popen(
        [
            *(sys.executable, "-m", "shunt.cli.main", "--socket", str(host.sock)),
            *("monitor", *options),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield watcher
    finally:
        watcher.kill()
        watcher.communicate()
