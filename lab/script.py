# SPDX-License-Identifier: Apache-2.0
"""The demo's script: what is done to a running Shunt, and what has to come of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shunt.lab.reports import Kind
from shunt.lab.scenario import NAT, SERVICES
from shunt.lab.servers import Servers
from shunt.lab.shuntd import Shuntd, attach_decap
from shunt.lab.topology import Host, Lab
from shunt.lab.traffic import Counts, Traffic
from shunt.lab.verdict import Step, judge, nat_through, sent_to_killed
from shunt.lab.view import View
from shunt.lb.errors import ShuntError

OBSERVE_S = 3.0
NOTICE_S = 0.5  # the generator reports every 0.2 s


@dataclass
class Script:
    """Everything the steps touch. Each step is a method; `run` has their order."""

    lab: Lab
    servers: dict[str, Servers]
    daemons: dict[str, Shuntd]
    traffic: Traffic
    view: View

    def run(self) -> None:
        for step in (
            self.look,
            self.stop_balancer,
            self.return_balancer,
            self.drain_backend,
            self.kill_backend,
            self.add_backend,
            self.restart_daemons,
            self.kill_daemons,
            self.swap_programs,
        ):
            step()

    def look(self) -> None:
        with self._step("every service in every mode") as step:
            self._observe(OBSERVE_S)
            self._expect_answers(step, {host.role for host in self.lab.backends}, step.before)

    def stop_balancer(self) -> None:
        """Power lost: cable, process, programs and tables at once; BGP takes its routes away."""
        lost, *others = self.lab.balancers
        with self._step(f"{lost.role} loses its power") as step:
            self.lab.unplug(lost)
            self.lab.announce(others)
            withdrawn_s = time.monotonic()
            self.view.states[lost.role] = "off"
            self.daemons[lost.role].power_off()
            self._observe(NOTICE_S)
            own = {str(address) for address in lost.addresses}
            through = {n for n, f in self.traffic.all_flows().items() if f.peer in own}
            step.excuses.append(nat_through(lost.role, through, NAT, withdrawn_s))
            self._observe(OBSERVE_S)

    def return_balancer(self) -> None:
        """It comes back with nothing but its configuration, and is announced when it is ready."""
        back = self.lab.balancers[0]
        with self._step(f"{back.role} comes back, with empty tables") as step:
            self.lab.plug_in(back)
            daemon = self.daemons[back.role]
            started_s = time.monotonic()
            daemon.start()
            daemon.wait_up()
            step.notes.append(f"{back.role} ready after {time.monotonic() - started_s:.1f} s")
            self.lab.announce(self.lab.balancers)
            self.view.states[back.role] = "shuntd"
            self._observe(OBSERVE_S)

    def drain_backend(self) -> None:
        host = self.lab.backends[1]
        with self._step(f"{host.role} is drained") as step:
            for daemon in self.daemons.values():
                daemon.drain(host)
            self.view.states[host.role] = "drained"
            before = self._counts_after(NOTICE_S)
            held = len(self._flows_at(host))
            self._observe(OBSERVE_S)
            step.notes.append(f"{len(self._flows_at(host))} of its {held} flows stay with it")
            rest = {h.role for h in self.lab.backends} - {host.role}
            self._expect_answers(step, rest, before)

    def kill_backend(self) -> None:
        host = self.lab.backends[3]
        with self._step(f"{host.role}'s servers are killed") as step:
            killed_s = time.monotonic()
            self.servers[host.role].kill()
            self.view.states[host.role] = "killed"
            for daemon in self.daemons.values():
                daemon.wait_backend(host, up=False)
            found_s = time.monotonic()
            step.excuses.append(sent_to_killed(host.role, killed_s, found_s + 0.1))
            step.notes.append(f"both health checks knew after {found_s - killed_s:.1f} s")
            before = self._counts_after(NOTICE_S)
            self._observe(OBSERVE_S)
            left = {self.lab.backends[0].role, self.lab.backends[2].role}
            self._expect_answers(step, left, before)

    def add_backend(self) -> None:
        with self._step("a backend is added to the files") as step:
            host = self.lab.add_backend()
            new = self.servers[host.role] = Servers(host, self.lab.directory)
            new.start()
            new.wait_ready()
            attach_decap(self.lab, host)
            self.view.states[host.role] = "nginx"
            for daemon in self.daemons.values():
                daemon.write_services([s.document(self.lab.backends) for s in SERVICES])
            started_s = time.monotonic()
            self.traffic.wait_until(
                lambda t: all(host.role in who for who in answering(t.answers()).values()),
                f"{host.role} answers for every service",
            )
            took_s = time.monotonic() - started_s
            step.notes.append(f"{host.role} served every service after {took_s:.1f} s")
            self._observe(OBSERVE_S)

    def restart_daemons(self) -> None:
        with self._step("shuntd is restarted on both nodes") as step:
            self._without_daemons(step, lambda daemon: daemon.stop(), 0.0)

    def kill_daemons(self) -> None:
        with self._step("shuntd is killed with -9 on both nodes") as step:
            self._without_daemons(step, lambda daemon: daemon.kill(), 1.0)

    def swap_programs(self) -> None:
        with self._step("shuntd swaps its programs on both nodes") as step:
            before = {role: daemon.program() for role, daemon in self.daemons.items()}
            for daemon in self.daemons.values():
                daemon.swap()
            for role, daemon in self.daemons.items():
                if daemon.program() == before[role]:
                    step.broken.append(f"{role} still runs program {before[role]}")
            self._observe(OBSERVE_S)

    def _without_daemons(self, step: Step, end: Callable[[Shuntd], None], pause_s: float) -> None:
        started_s = time.monotonic()
        for role, daemon in self.daemons.items():
            end(daemon)
            self.view.states[role] = "no shuntd"
        self._observe(pause_s)
        for daemon in self.daemons.values():
            daemon.start()
        for role, daemon in self.daemons.items():
            daemon.wait_ready()
            self.view.states[role] = "shuntd"
        took_s = time.monotonic() - started_s
        step.notes.append(f"both nodes forwarded {took_s:.1f} s without it")
        self._observe(OBSERVE_S)

    @contextlib.contextmanager
    def _step(self, title: str) -> Iterator[Step]:
        step = Step(title, time.monotonic(), self.traffic.answers(), len(self.traffic.live()))
        self.view.steps.append(step)
        self.view.doing = title
        sent_again = self._sent_again()
        yield step
        step.end(time.monotonic(), self.traffic.answers())
        if again := self._sent_again() - sent_again:
            step.notes.append(f"packets lost or late, and sent again: {again}")
        self.judge()
        self.view.finish(step)

    def judge(self) -> None:
        judge(self.view.steps, self.traffic.failures(), self.traffic.all_flows())

    def _observe(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.2))
            self.traffic.check()

    def _sent_again(self) -> int:
        """TCP segments, by either side, and datagrams."""
        ends = [self.lab.client, *(host.namespace for host in self.lab.backends)]
        return sum(end.retransmitted() for end in ends) + self.traffic.resent().total()

    def _counts_after(self, seconds: float) -> Counts:
        self._observe(seconds)
        return self.traffic.answers()

    def _flows_at(self, host: Host) -> list[int]:
        return [f.flow for f in self.traffic.live() if f.backend == host.role]

    def _expect_answers(self, step: Step, backends: set[str], before: Counts) -> None:
        """Since `before`, new connections went to all of these and to no others."""
        # Few requests may all miss one backend by chance: then there are more.
        with contextlib.suppress(ShuntError):
            self.traffic.wait_until(
                lambda t: all(backends <= who for who in answering(t.answers() - before).values()),
                "all have answered",
            )
        for service, who in answering(self.traffic.answers() - before).items():
            if who != backends:
                names = ", ".join(sorted(who)) or "nobody"
                step.broken.append(
                    f"{service}: {names} answered, not {', '.join(sorted(backends))}"
                )


def answering(counts: Counts) -> dict[str, set[str]]:
    """By service: the backends that answer HTTP requests."""
    found: dict[str, set[str]] = {service.name: set() for service in SERVICES}
    for service, kind, backend in counts:
        if kind is Kind.HTTP:
            found[service].add(backend)
    return found
