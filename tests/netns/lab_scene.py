# SPDX-License-Identifier: Apache-2.0
"""A lab with one daemon in it, and what tests across it share. lab/topology.py draws it."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shunt.lab.shuntd import Shuntd
from shunt.lab.topology import Lab
from shunt.lb.model import IPAddress
from tests.netns.reasons import leaving, packets

TIMEOUT_S = 20.0


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def is_refused(sock: socket.socket, data: bytes = b"anybody?") -> bool:
    """Whether what a connected socket sends is answered by an ICMP error."""
    try:
        sock.send(data)
        sock.recv(100)
    except ConnectionRefusedError:
        return True
    except TimeoutError:
        return False
    raise AssertionError("somebody answered")


def until_refused(sock: socket.socket) -> None:
    """Backends ration their errors, so it asks again."""
    sock.settimeout(2)
    until(lambda: is_refused(sock), "the error arrived")


@dataclass
class LabScene:
    lab: Lab
    daemon: Shuntd

    def reasons(self) -> dict[str, int]:
        return packets(self.daemon.client.get("status"))

    def counts(self, *reasons: str) -> contextlib.AbstractContextManager[None]:
        return leaving(self.reasons, *reasons)

    def curl(self, vip: IPAddress, path: str, *more: str, port: int = 80) -> str:
        """What the client gets from there. Raises: subprocess.CalledProcessError."""
        host = f"[{vip}]" if vip.version == 6 else str(vip)
        argv = ["curl", "-sS", "-m", "25", *more, f"http://{host}:{port}{path}"]
        return self.lab.client.run(*argv, timeout_s=40).stdout

    def dial(
        self, vip: IPAddress, port: int, kind: socket.SocketKind, source_port: int = 0
    ) -> socket.socket:
        """A connected socket of the client's, for which each call ends within TIMEOUT_S."""
        family = socket.AF_INET if vip.version == 4 else socket.AF_INET6
        with self.lab.client.inside():
            sock = socket.socket(family, kind)
        sock.settimeout(TIMEOUT_S)
        sock.bind(("", source_port))
        sock.connect((str(vip), port))
        return sock

    @contextlib.contextmanager
    def narrow(self, mtu: int) -> Iterator[None]:
        """The router's way to the client takes `mtu` bytes, and nobody knows yet."""
        self._forget()
        self.lab.router.ip(
            f"route replace 192.0.2.0/24 dev wan mtu lock {mtu}",
            f"route replace 2001:db8:1::/64 dev wan mtu {mtu} metric 1",
        )
        try:
            yield
        finally:
            self.lab.router.ip(
                "route replace 192.0.2.0/24 dev wan", "route del 2001:db8:1::/64 dev wan metric 1"
            )
            self._forget()

    def _forget(self) -> None:
        """What backends have learnt of the way."""
        for host in self.lab.backends:
            for family in ("-4", "-6"):
                host.namespace.run("ip", family, "route", "flush", "cache")


def set_mtus(lab: Lab, mtu: int) -> None:
    """Of the network that routers, balancers and backends share."""
    hosts = [*lab.balancers, *lab.backends]
    ports = ["router", *(host.role for host in hosts)]
    lab.switch.ip(*(f"link set dev {port} mtu {mtu}" for port in ports))
    lab.router.ip(f"link set dev lan mtu {mtu}")
    for host in hosts:
        host.namespace.ip(f"link set dev eth0 mtu {mtu}")
