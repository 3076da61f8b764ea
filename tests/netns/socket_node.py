# SPDX-License-Identifier: Apache-2.0
"""A node whose own processes talk to VIPs, its backends, and a neighbour's namespace.

```
    here, shuntd                       be1: eth0 10.9.1.2, fd09:1::2
      eth1 10.9.1.1, fd09:1::1 ------- be2: eth0 10.9.2.2, fd09:2::2
      eth2 10.9.2.1, fd09:2::1 ---'      nginx 80, echo 7, dnsmasq 53: each says who answered
      eth3 10.9.3.1 ------------------ guest: eth0 10.9.3.2, its way out is by `here`
      lo   203.0.113.2
```

`here` has routes to its three networks alone: 203.0.113.1 and the VIPs of IPv6 are nowhere.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import yaml

from shunt.lab import topology
from shunt.lab.netns import Namespace, Process, veth
from shunt.lab.servers import Servers, running
from tests.netns.shunt_host import FAST, Host

NOWHERE, ON_LO, SIX = "203.0.113.1", "203.0.113.2", "2001:db8::1"
BE1, BE2 = "10.9.1.2", "10.9.2.2"
SIX1, SIX2 = "fd09:1::2", "fd09:2::2"
SETTINGS = {
    "interfaces": ["eth1"],
    "limits": {"slots": 65536, "flows": 4096, "nat": 4096},
}
SERVICES: dict[str, dict[str, Any]] = {
    "web": {
        "vip": [NOWHERE, ON_LO],
        "ports": [80, 7, "7/udp", "53/udp", 53],
        "backends": [BE1, BE2],
    },
    "six": {"vip": SIX, "ports": [80, 7, "7/udp", "53/udp"], "backends": [SIX1, SIX2]},
    "other-port": {
        "vip": "203.0.113.3",
        "ports": [8080],
        "backends": [f"{BE1}:80"],
        "mode": "nat",
    },
    "empty": {"vip": "203.0.113.4", "ports": [80, "53/udp"], "backends": []},
    "every": {"vip": "203.0.113.5", "ports": ["any"], "backends": [BE1]},
    "six-to-four": {"vip": "2001:db8::6", "ports": [7, "7/udp"], "backends": [BE1]},
    "four-to-six": {"vip": "203.0.113.6", "ports": [7, "7/udp"], "backends": [SIX1]},
    "denied": {
        "vip": "203.0.113.7",
        "ports": [7, "7/udp"],
        "backends": [BE1],
        "sources": {"allow": "198.51.100.0/24"},
    },
    "allowed": {
        "vip": "203.0.113.8",
        "ports": [7, "7/udp"],
        "backends": [BE1],
        "sources": {"allow": "10.9.1.1"},
    },
    "affine": {
        "vip": "203.0.113.9",
        "ports": [7],
        "backends": [BE1, BE2],
        "affinity": "10m",
    },
    "checked": {
        "vip": "203.0.113.10",
        "ports": [7, "7/udp"],
        "backends": [BE1, BE2],
        "health": FAST,
    },
}


class Node(Host):
    """The host under test, and who is around it."""

    def __init__(
        self, here: Namespace, guest: Namespace, servers: dict[str, Servers], directory: Path
    ) -> None:
        super().__init__(here, guest, directory)
        self.guest, self.servers = guest, servers
        self.name_servers: dict[str, Process] = {}
        self.spaces: dict[str, Namespace] = {}  # by role

    def client(
        self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, *, guest: bool = False
    ) -> socket.socket:
        with (self.guest if guest else self.here).inside():
            made = socket.socket(family, kind)
        made.settimeout(5)
        return made

    def connected(self, vip: str, port: int = 7, kind: int = socket.SOCK_STREAM) -> socket.socket:
        made = self.client(socket.AF_INET6 if ":" in vip else socket.AF_INET, kind)
        made.connect((vip, port))
        return made

    def settings(self, **more: Any) -> None:
        """Have shuntd read other settings, and wait until they are in force."""
        generation = self.json("status")["generation"] if self.process else 0
        self.config.write_text(yaml.safe_dump({**SETTINGS, **more}))
        if self.process:
            self.until(lambda: self.json("status")["generation"] > generation, "in force")

    def calls(self) -> dict[str, int]:
        """What became of sockets' calls, so far."""
        found: dict[str, int] = self.json("status")["sockets"]["calls"]
        return found


def say(sock: socket.socket, text: str = "hello") -> str:
    """Ask the echo server over a connected socket; who answered."""
    sock.sendall(f"{text}\n".encode())
    name, _peer, back = sock.recv(1000).decode().split()
    assert back == text
    return name


def say_to(sock: socket.socket, vip: str, port: int = 7) -> tuple[str, Any]:
    """The same by a datagram; who answered, and from where the socket says that it was."""
    sock.sendto(b"hello", (vip, port))
    data, peer = sock.recvfrom(1000)
    return data.decode().split()[0], peer[:2]


def dnsmasq(host: topology.Host, directory: Path) -> Process:
    """A real name server that says who it is."""
    number = host.role.removeprefix("be")
    argv = [
        *("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file="),
        *("--no-resolv", "--no-hosts", "--user=root", "--local=/example/"),
        f"--txt-record=who.example,{host.role}",
        f"--host-record=address.example,192.0.2.{number},2001:db8:2::{number}",
        "--host-record=host.example,192.0.2.1,2001:db8:5::1",
    ]
    return host.namespace.start(argv, directory / f"dnsmasq-{host.role}.log")


@contextlib.contextmanager
def a_node(name: str, *, dns: bool = True, serving: bool = True) -> Iterator[Node]:
    """Everything but shuntd runs. Guests have no name server.

    Without `serving` there are the namespaces alone, no services.
    """
    directory = Path(tempfile.mkdtemp(prefix="shunt-sock-"))
    directory.chmod(0o755)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        spaces = {}
        for role in ("here", "be1", "be2", "guest"):
            spaces[role] = Namespace.create(f"shunt-{name}-{os.getpid()}-{role}")
            stack.callback(spaces[role].delete)
        here = spaces["here"]
        backends = []
        for n, role in enumerate(("be1", "be2", "guest"), 1):
            there = spaces[role]
            veth(here, f"eth{n}", there, "eth0", 1500)
            here.ip(
                f"addr add 10.9.{n}.1/24 dev eth{n}", f"addr add fd09:{n}::1/64 dev eth{n} nodad"
            )
            there.ip(
                f"addr add 10.9.{n}.2/24 dev eth0",
                f"addr add fd09:{n}::2/64 dev eth0 nodad",
                f"route add default via 10.9.{n}.1",
                f"route add default via fd09:{n}::1",
            )
            backends.append(
                topology.Host(role, there, IPv4Address(f"10.9.{n}.2"), IPv6Address(f"fd09:{n}::2"))
            )
        here.ip(f"addr add {ON_LO}/32 dev lo")
        here.sysctl({"ipv4.ip_forward": 1})
        serve = backends[:2] if serving else []
        servers = stack.enter_context(running(serve, directory))
        node = Node(here, spaces["guest"], servers, directory)
        node.spaces = spaces
        for backend in serve if dns else ():
            node.name_servers[backend.role] = dnsmasq(backend, directory)
            stack.callback(node.name_servers[backend.role].stop)
            await_dns(here, backend)
        node.bpffs = node.bpffs.with_name(f"{node.bpffs.name}-{name}")
        stack.callback(node.close)
        node.services.mkdir()
        node.settings()
        for service, document in SERVICES.items() if serving else ():
            node.write(service, {"name": service, **document})
        yield node


def await_dns(here: Namespace, backend: topology.Host) -> None:
    deadline = time.monotonic() + 30
    while True:
        with here.inside():
            sock = socket.socket()
        with sock:
            if sock.connect_ex((str(backend.address4), 53)) == 0:
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)
