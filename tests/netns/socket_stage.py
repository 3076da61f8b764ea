# SPDX-License-Identifier: Apache-2.0
"""The node of socket_node.py, one moment after the other: shuntd runs, or does not."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shunt.kern import cgroup
from shunt.lab.netns import Namespace
from tests.netns.socket_node import BE1, BE2, NOWHERE, SERVICES, SIX, SIX1, SIX2, Node, a_node
from tests.netns.socket_programs import Proxies

STREAMED = ("web", "six")  # services
MOMENTS = ("running", "stopped", "killed", "started again")


class Stage:
    """The node with `sockets: host` or `all`, and the namespace whose programs are covered."""

    def __init__(
        self, node: Node, scope: str, stack: contextlib.ExitStack, *, redirected: bool
    ) -> None:
        self.node, self.scope, self._stack = node, scope, stack
        self.redirected = redirected
        self.group = cgroup.root() / f"shunt-test-{os.getpid()}-{scope}"
        self.group.mkdir()
        stack.callback(self._leave)
        covered = node.here if scope == "host" else node.guest
        self.space: Namespace = Grouped(covered.name, self.group)
        # What is redirected is not to be had by splice(): docs/operations.md.
        self.proxies = Proxies(self.space, node.directory, splice=not redirected)
        self.moment = MOMENTS[0]

    def _leave(self) -> None:
        """The kernel takes a moment to see that the last process has gone."""
        for _ in range(50):
            if not (self.group / "cgroup.procs").read_text():
                break
            time.sleep(0.1)
        self.group.rmdir()

    def events(self) -> dict[str, int]:
        """What became of streams, so far."""
        found: dict[str, int] = self.node.json("status")["sockets"]["streams"]["events"]
        return found

    def uncover(self) -> None:
        """Nothing is translated at sockets, and nothing redirected, until `node.settings()`."""
        if self.redirected:
            self.redirected = False
            for service in STREAMED:
                self.node.write(service, {"name": service, **SERVICES[service]})
            self.node.until(
                lambda: not any(self.node.json("service", "show", s)["redirect"] for s in STREAMED),
                "in force",
            )
        self.node.settings(sockets="off")

    def go_to(self, moment: str) -> None:
        """Forwards alone."""
        while self.moment != moment:
            self.moment = MOMENTS[MOMENTS.index(self.moment) + 1]
            assert self.node.process is not None
            if self.moment == "stopped":
                self.node.process.stop()
            else:
                self.node.start()
            if self.moment == "killed":
                self.node.process.kill()

    def serve(self) -> None:
        """Servers of QUIC and iperf3, with services, and the proxies."""
        node = self.node
        for name, vip, backends in (("web", NOWHERE, [BE1, BE2]), ("six", SIX, [SIX1, SIX2])):
            quic = {"name": f"quic-{name}", "vip": vip, "ports": ["443/udp"], "backends": backends}
            node.write(f"quic-{name}", quic)
        vips = ["203.0.113.40", "2001:db8::40"]
        node.write("iperf", {"name": "iperf", "vip": vips, "ports": [5201, "5201/udp"],
                             "backends": [BE1, SIX1]})  # fmt: skip
        there = node.servers["be1"].host.namespace
        iperf3 = there.start(["iperf3", "--server"], node.directory / "iperf3.log")
        self._stack.callback(iperf3.stop)
        self._serve_quic()
        node.until(lambda: node.shunt("service", "show", "iperf").code == 0, "in force")
        self._stack.callback(self.proxies.stop)
        self.proxies.start()

    def _serve_quic(self) -> None:
        folder = self.node.directory
        key, certificate = str(folder / "key.pem"), str(folder / "certificate.pem")
        options = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
        made = ("openssl", "req", "-x509", *options, "-days", "2", "-subj", "/CN=quic")
        subprocess.run(
            [*made, "-keyout", key, "-out", certificate], check=True, capture_output=True
        )
        for role, server in self.node.servers.items():
            log = folder / f"quic-{role}.log"
            argv = [sys.executable, "-m", "tests.netns.quic_server", "::", "443", f"000{role[-1]}"]
            process = server.host.namespace.start([*argv, certificate, key], log)
            self._stack.callback(process.stop)
            self.node.until(lambda log=log: "ready" in log.read_text(), log.name)  # type: ignore[misc]


@dataclass(frozen=True)
class Grouped(Namespace):
    """What is run there is in a control group of its own."""

    group: Path

    @property
    def enter(self) -> list[str]:
        join = f'echo $$ >{self.group}/cgroup.procs; exec "$@"'
        return ["sh", "-ec", join, "sh", *super().enter]


def contained(stage: Stage) -> None:
    """shuntd sees that control group alone, as in a container. With `sockets: all` it would cover
    the namespaces of tests that run at the same time, too."""
    usual = stage.node.argv
    script = f'mount --bind {stage.group} {cgroup.root()}; exec "$@"'
    argv = ["unshare", "--mount", "sh", "-ec", script, "sh"]
    stage.node.argv = lambda *more: [*argv, *usual(*more)]  # type: ignore[method-assign]


@contextlib.contextmanager
def a_stage(name: str, kind: str) -> Iterator[Stage]:
    """shuntd runs there, with `sockets: host` or `all`; or, `redirected`, with `host`, and the
    streams of its web servers redirected."""
    with a_node(name) as node, contextlib.ExitStack() as stack:
        node.here.sysctl({"ipv6.conf.all.forwarding": 1})  # the neighbour's way to the backends
        redirected = kind == "redirected"
        scope = "host" if redirected else kind
        node.settings(sockets=scope)
        for service in STREAMED if redirected else ():
            node.write(service, {"name": service, **SERVICES[service], "redirect": "on"})
        found = Stage(node, scope, stack, redirected=redirected)
        # Both ends of a stream have to be seen, and the servers are in no group of their own.
        if not redirected:
            contained(found)
        node.start()
        yield found
