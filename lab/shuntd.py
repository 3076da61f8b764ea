# SPDX-License-Identifier: Apache-2.0
"""`shuntd` on the lab's load balancers, and `shunt`, as an operator would run them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from shunt.cli.client import Client, Unreachable
from shunt.lab.netns import Process
from shunt.lab.topology import BPFFS, Host, Lab, remove_tree
from shunt.lb.errors import ShuntError
from shunt.lb.model import IPAddress
from shunt.xdp import decap

# A lab's traffic is small; tables of the default size would take seconds to age and to dump.
SETTINGS: Mapping[str, Any] = {
    "interfaces": ["eth0"],
    "limits": {"slots": 65536, "flows": 65536, "nat": 65536},
}


class Shuntd:
    """One load balancer's daemon: its own configuration, pins and socket."""

    def __init__(self, lab: Lab, host: Host) -> None:
        self.host = host
        self.directory = lab.directory / host.role
        self.bpffs = BPFFS / f"{lab.name}-{host.role}"
        self.config = self.directory / "shunt.yaml"
        self.services = self.directory / "services.d"
        self.run = self.directory / "run"
        self.log = self.directory / "shuntd.log"
        # Where something is asked again and again: the command takes a Python's start each time.
        self.client = Client(self.run / "shunt.sock")
        self.process: Process | None = None
        self.services.mkdir(parents=True)
        self.configure({})

    def configure(self, settings: Mapping[str, Any]) -> None:
        _write(self.config, {**SETTINGS, **settings})

    def write_services(self, services: Sequence[Mapping[str, Any]]) -> None:
        """One file each; each appears in one piece, since the daemon watches the directory."""
        for service in services:
            _write(self.services / f"{service['name']}.yaml", service)

    def start(self) -> None:
        """Start the daemon; `wait_ready` says when it answers."""
        self.process = self.host.namespace.start(
            [
                *(sys.executable, "-m", "shunt.agent.daemon"),
                *("--config", str(self.config), "--services", str(self.services)),
                *("--bpffs", str(self.bpffs), "--run", str(self.run)),
                *("--state", str(self.directory / "state")),
            ],
            self.log,
        )

    def wait_ready(self, timeout_s: float = 15.0) -> None:
        """Until the daemon answers.

        Raises: ShuntError with the log's end if it ended, or did not answer in time.
        """
        self.wait_until(self.answers, "answers", timeout_s)

    def answers(self) -> bool:
        try:
            self.client.get("errors")
        except Unreachable:
            return False
        return True

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = 15.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            ended = self.process is None or not self.process.running
            if ended or time.monotonic() > deadline:
                raise ShuntError(
                    f"shuntd on {self.host.role} "
                    + ("has ended" if ended else f"{what}: not so after {timeout_s:g} s"),
                    why=self.log_tail(),
                    fix=f"see {self.log}",
                )
            time.sleep(0.1)

    def wait_up(self, timeout_s: float = 15.0) -> None:
        """Until the daemon answers, and has checked every backend and found it healthy."""
        self.wait_ready(timeout_s)
        self.wait_until(
            lambda: all(b["state"] == "up" and b["health"]["checks"] for b in self.backends()),
            "finds every backend up",
            timeout_s,
        )

    def wait_backend(self, host: Host, *, up: bool, timeout_s: float = 15.0) -> None:
        """Until the daemon finds this backend healthy, or not, in every service."""
        own = {str(address) for address in host.addresses}

        def found() -> bool:
            states = {b["state"] for b in self.backends() if b["address"] in own}
            return bool(states) and ("failing" not in states if up else states == {"failing"})

        self.wait_until(found, f"finds {host.role} {'up' if up else 'down'}", timeout_s)

    def backends(self) -> list[dict[str, Any]]:
        """Every backend of every service, as the API tells them."""
        found: list[dict[str, Any]] = self.client.get("backends")["backends"]
        return found

    def drain(self, host: Host) -> None:
        """Send a backend no new connections, in any service."""
        for address in host.addresses:
            self.cli("backend", "drain", str(address))

    def swap(self) -> None:
        """Load the program anew, and put it in the old one's place."""
        self.cli("program", "swap")

    def program(self) -> int:
        """The id of the XDP program on the interface, as the kernel has it."""
        shown = self.host.namespace.run("ip", "-j", "link", "show", "dev", "eth0").stdout
        return int(json.loads(shown)[0]["xdp"]["prog"]["id"])

    def log_tail(self) -> str:
        return self.process.log_tail() if self.process else "it was not started"

    def stop(self) -> None:
        """SIGTERM. What it pinned stays, and forwards."""
        if self.process:
            self.process.stop()

    def kill(self) -> None:
        """SIGKILL. What it pinned stays, and forwards."""
        if self.process:
            self.process.kill()

    def power_off(self) -> None:
        """Lose everything a machine loses with its power: the process, the programs, the maps."""
        self.kill()
        # The last reference to a link is its pin: removing it detaches the program.
        remove_tree(self.bpffs)
        remove_tree(self.run)

    def cli(
        self, *arguments: str, check: bool = True, timeout_s: float = 30
    ) -> subprocess.CompletedProcess[str]:
        """`shunt ARGUMENTS` against this daemon.

        Raises: ShuntError with what it printed, if it failed and `check` is true.
        """
        return self.host.namespace.run(
            *(sys.executable, "-m", "shunt.cli.main"),
            *("--socket", str(self.run / "shunt.sock"), *arguments),
            check=check,
            timeout_s=timeout_s,
        )


@contextlib.contextmanager
def daemons(
    lab: Lab, services: Sequence[Mapping[str, Any]], settings: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Shuntd]]:
    """A daemon on every load balancer of the lab, answering, by role; gone on leaving."""
    running = {host.role: Shuntd(lab, host) for host in lab.balancers}
    try:
        for daemon in running.values():
            daemon.configure(settings or {})
            daemon.write_services(services)
            daemon.start()
        for daemon in running.values():
            daemon.wait_ready(30)
        yield running
    finally:
        for daemon in running.values():
            daemon.power_off()


def attach_decap(lab: Lab, host: Host, addresses: Sequence[IPAddress] = ()) -> decap.Decap:
    """Let a backend take packets out of their outer headers, as `shunt decap` does.

    It goes with the lab: the pin has the lab's name.
    """
    with host.namespace.inside():
        return decap.attach("eth0", bpffs=BPFFS / f"{lab.name}-{host.role}", addresses=addresses)


def _write(path: Path, document: Mapping[str, Any]) -> None:
    draft = path.with_suffix(".draft")
    draft.write_text(yaml.safe_dump(dict(document), sort_keys=False))
    draft.replace(path)
