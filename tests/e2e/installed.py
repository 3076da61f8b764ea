# SPDX-License-Identifier: Apache-2.0
"""Shunt on a booted machine, installed and started as an operator does it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from tests.e2e.machine import ROOT, Machine


@dataclass
class Installed:
    """The daemon on a machine, as its operator sees it."""

    machine: Machine

    def install(self, settings: Mapping[str, Any], services: Sequence[Mapping[str, Any]]) -> None:
        """Until shuntd has all of it in force."""
        self.machine.run(str(ROOT / "tools/install"))
        self.machine.write("/etc/shunt/shunt.yaml", yaml.safe_dump(dict(settings)))
        for service in services:
            self.write(service)
        self.machine.run("systemctl", "enable", "--now", "shuntd")

    def write(self, *documents: Mapping[str, Any]) -> None:
        """Services' files, each by its name."""
        for each in documents:
            path = f"/etc/shunt/services.d/{each['name']}.yaml"
            self.machine.write(path, yaml.safe_dump(dict(each)))

    def serve(self, *documents: Mapping[str, Any]) -> None:
        """The same, in force."""
        self.write(*documents)
        self.machine.run("systemctl", "reload", "shuntd")

    def pid(self) -> int:
        """Of the daemon, as the machine counts; 0 if there is none."""
        return int(self.machine.run("systemctl", "show", "-P", "MainPID", "shuntd"))

    def restarted(self, before: int) -> bool:
        active = self.machine.run("systemctl", "is-active", "shuntd", check=False).strip()
        return active == "active" and self.pid() not in (0, before)

    def status(self, *, check: bool = True) -> Any:
        """Without `check` it may tell of problems, too."""
        return json.loads(self.machine.run("shunt", "status", "-o", "json", check=check))

    def records(self, *matches: str) -> list[dict[str, str]]:
        """Of the journal."""
        shown = self.machine.run("journalctl", "-o", "json", "--all", "-u", "shuntd", *matches)
        return [json.loads(line) for line in shown.splitlines() if line.startswith("{")]
