# SPDX-License-Identifier: Apache-2.0
"""Network namespaces on a booted machine, as pods have them, and programs in the machine's own
control groups: programs that are started from outside would be in none of them.

```
    switch ---- eth0  lb1, the machine  p1 10.77.1.1 ---- eth0 10.77.1.2  pod 1
                10.0.0.11               p2 10.77.2.1 ---- eth0 10.77.2.2  pod 2
```
"""

from __future__ import annotations

import itertools

from shunt.lab.topology import Lab
from tests.e2e.machine import ROOT, Machine

NETWORK = "10.77.0.0/16"
OUT = "/run/pods"  # what programs say


class Pods:
    """Of one machine."""

    def __init__(self, machine: Machine, lab: Lab) -> None:
        self.machine = machine
        self._numbers = itertools.count(1)
        self._programs: list[str] = []
        machine.run("mkdir", "-p", OUT)
        for host in lab.backends:
            host.namespace.ip(f"route add {NETWORK} via {lab.balancers[0].address4}")

    def add(self) -> str:
        """Its name, by which `ip netns` knows it. Its address: 10.77.NUMBER.2."""
        number = next(self._numbers)
        name, net = f"pod{number}", f"10.77.{number}"
        self.machine.shell(f"""set -e
            ip netns add {name}
            ip link add p{number} type veth peer name eth0 netns {name}
            ip addr add {net}.1/24 dev p{number}
            ip link set p{number} up
            ip -n {name} link set lo up
            ip -n {name} addr add {net}.2/24 dev eth0
            ip -n {name} link set eth0 up
            ip -n {name} route add default via {net}.1""")
        return name

    def forget(self, name: str) -> None:
        """The name; the namespace stays while it has programs."""
        self.machine.run("ip", "netns", "del", name)

    def start(self, program: str, where: str, *argv: str) -> None:
        """As a unit of its own; `where`: a pod, or empty for the machine itself."""
        place = ["-p", f"NetworkNamespacePath=/run/netns/{where}"] if where else []
        output = ["-p", f"StandardOutput=truncate:{OUT}/{program}"]
        # systemd-run is back before the program's own file is made: nothing of one before it.
        self.machine.shell(f": >{OUT}/{program}")
        self.machine.run(
            *("systemd-run", "--quiet", "--collect", f"--unit={program}", *place, *output),
            *("python3", *argv),
        )
        self._programs.append(program)

    def ask(self, program: str, where: str, *argv: str) -> list[str]:
        """As `start`, of clients/asking.py, and until somebody has answered."""
        self.start(program, where, f"{ROOT}/tests/e2e/clients/asking.py", *argv)
        self.machine.until(lambda: len(self.said(program)) > 1, f"has an answer to {program}")
        return self.said(program)

    def serve(self, program: str, where: str) -> None:
        """The echo server of backends, on port 7."""
        self.start(program, where, f"{ROOT}/lab/echo.py", program, "7")

    def said(self, program: str) -> list[str]:
        return self.machine.run("cat", f"{OUT}/{program}").split()

    def until_answered_by(self, name: str, program: str) -> None:
        """It has last been."""
        self.machine.until(lambda: self.said(program)[-1] == name, f"has {name} for {program}")

    def until_more(self, program: str, number: int = 3) -> None:
        """It says so much more than by now."""
        before = len(self.said(program))
        self.machine.until(lambda: len(self.said(program)) >= before + number, f"{program} goes on")

    def stop(self, *programs: str) -> None:
        """These, or all."""
        those = [each for each in self._programs if not programs or each in programs]
        if those:
            self.machine.run("systemctl", "stop", *those, check=False)
        self._programs = [each for each in self._programs if each not in those]
