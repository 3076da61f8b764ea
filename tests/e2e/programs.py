# SPDX-License-Identifier: Apache-2.0
"""Health checks of type exec on a booted machine: one that is well, and one that never ends."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Set
from typing import Any

import yaml

from tests.e2e.machine import Machine

FILE, SCRIPT = "/etc/shunt/services.d/programs.yaml", "/run/check"
BOUND = "/run/systemd/system/shuntd.service.d"
# Exit code 0 only for somebody without any privilege, whose groups are his own.
UNPRIVILEGED = r"""
set -e
[ "$(id -un)" = nobody ] && [ "$(id -Gn)" = nogroup ] && [ "$1" = 10.0.0.101 ]
grep -Eq '^CapEff:\s*0+$' /proc/self/status
grep -Eq '^CapPrm:\s*0+$' /proc/self/status
grep -Eq '^NoNewPrivs:\s*1$' /proc/self/status
sleep 4321 & # what it leaves behind is ended too
"""


class Programs:
    """The two services, and what comes of their checks."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    def row(self, service: str) -> Any:
        shown = self.machine.run("shunt", "health", "list", service, "-o", "json")
        (row,) = json.loads(shown)["health"]
        return row

    def sleepers(self, seconds: str) -> list[str]:
        """Processes that sleep so long."""
        argv = f"^(/bin/)?sleep {seconds}$"
        return self.machine.run("pgrep", "-f", argv, check=False).split()

    @contextlib.contextmanager
    def bounded(self, capabilities: Set[str]) -> Iterator[None]:
        """shuntd started with these capabilities alone."""
        bound = " ".join(sorted(capabilities)).upper()
        lines = f"[Service]\\nCapabilityBoundingSet=\\nCapabilityBoundingSet={bound}\\n"
        self._restart(f"mkdir -p {BOUND} && printf '{lines}' >{BOUND}/less.conf")
        try:
            yield
        finally:
            self._restart(f"rm -r {BOUND}")
            self.machine.shell("pkill -KILL -u nobody -x sleep || true")

    def _restart(self, script: str) -> None:
        self.machine.shell(f"{script} && systemctl daemon-reload && systemctl restart shuntd")


@contextlib.contextmanager
def checking(machine: Machine) -> Iterator[Programs]:
    """The services are in force until the context ends."""
    machine.write(SCRIPT, UNPRIVILEGED)
    services = [
        _service("ends", "203.0.113.97", ["/bin/sh", SCRIPT, "{address}"]),
        _service("hangs", "203.0.113.98", ["/bin/sleep", "1234"]),
    ]
    machine.write(FILE, yaml.safe_dump(services))
    machine.run("systemctl", "reload", "shuntd")
    try:
        yield Programs(machine)
    finally:
        machine.run("rm", FILE)
        machine.run("systemctl", "reload", "shuntd")


def _service(name: str, vip: str, argv: list[str]) -> dict[str, Any]:
    check = {"type": "exec", "argv": argv, "interval": "2s", "timeout": "1500ms", "rise": 1}
    return {"name": name, "vip": vip, "ports": [80], "backends": ["10.0.0.101"], "health": check}
