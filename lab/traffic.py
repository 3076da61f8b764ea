# SPDX-License-Identifier: Apache-2.0
"""Traffic from the client, and the accounts of what became of it."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Self

import msgspec

from shunt.lab.netns import Namespace, Process
from shunt.lab.reports import FLOWS, Answered, Answers, Failure, Kind, Opened, Plan, Report, Resent
from shunt.lb.errors import ShuntError

Counts = Counter[tuple[str, Kind, str]]


class Traffic:
    """One generator process in the client's namespace, from entering the context to leaving it.

    The accounts grow while it runs; what the methods return is a copy. `answers` counts by
    (target, kind, backend).
    """

    def __init__(self, client: Namespace, plan: Plan, directory: Path) -> None:
        self.client, self.plan, self.directory = client, plan, directory
        self._lock = threading.Lock()
        self._answers: Counts = Counter()
        self._resent: Counter[str] = Counter()
        self._failures: list[Failure] = []
        self._flows: dict[int, Opened] = {}
        self._live: set[int] = set()
        self._answered_s = 0.0

    def __enter__(self) -> Self:
        argv = [sys.executable, "-m", "shunt.lab.generator"]
        self._process = Process(
            argv, self.directory / "generator.log", namespace=self.client, pipes=True
        )
        assert self._process.popen.stdin
        self._process.popen.stdin.write(msgspec.json.encode(self.plan) + b"\n")
        self._process.popen.stdin.flush()
        self._reader = threading.Thread(target=self._read, name="traffic", daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Send nothing new, wait for the answers to what is under way, and end."""
        popen = self._process.popen
        if popen.stdin and not popen.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                popen.stdin.close()
            self._reader.join(self.plan.request_timeout_s + self.plan.stall_timeout_s)
            self._process.stop()
            self._reader.join()
            if popen.stdout:
                popen.stdout.close()

    def _read(self) -> None:
        decoder = msgspec.json.Decoder(Report)
        assert self._process.popen.stdout
        for line in self._process.popen.stdout:
            self._take(decoder.decode(line))

    def _take(self, report: Report) -> None:
        with self._lock:
            match report:
                case Answers(target, kind, backend, count):
                    self._answers[target, kind, backend] += count
                case Opened(flow=flow):
                    self._flows[flow] = report
                    self._live.add(flow)
                case Failure(flow=flow):
                    self._failures.append(report)
                    self._live.discard(flow)
                case Answered(since_s):
                    self._answered_s = since_s
                case Resent(target=target):
                    self._resent[target] += 1

    def answers(self) -> Counts:
        with self._lock:
            return Counter(self._answers)

    def failures(self) -> list[Failure]:
        with self._lock:
            return list(self._failures)

    def resent(self) -> Counter[str]:
        """Datagrams sent again, by target."""
        with self._lock:
            return Counter(self._resent)

    def all_flows(self) -> dict[int, Opened]:
        """Every flow that was ever open, by its number."""
        with self._lock:
            return dict(self._flows)

    def live(self) -> list[Opened]:
        """The flows that are up now."""
        with self._lock:
            return [self._flows[flow] for flow in sorted(self._live)]

    def wait_answered(self, timeout_s: float = 15.0) -> None:
        """Until every flow that is up then had an answer to something it sent after this call."""
        after_s = time.monotonic()
        self.wait_until(lambda t: t._answered_s > after_s, "every flow was answered", timeout_s)

    def check(self) -> None:
        """Raises: ShuntError if the generator itself has ended: silence is then no success."""
        if not (self._process.running and self._reader.is_alive()):
            raise ShuntError(
                "the traffic generator ended by itself",
                why=self._process.log_tail() or f"exit code {self._process.popen.returncode}",
                fix="this is a defect of the lab: please report it with the lines above",
            )

    def wait_until(
        self, condition: Callable[[Traffic], bool], what: str, timeout_s: float = 15.0
    ) -> None:
        """Raises: ShuntError naming `what` was waited for, and the last failures seen."""
        deadline = time.monotonic() + timeout_s
        while not condition(self):
            self.check()
            if time.monotonic() > deadline:
                last = [f"{f.target}: {f.kind} {f.reason} {f.detail}" for f in self.failures()[-5:]]
                raise ShuntError(
                    f"{what}: not so after {timeout_s:g} s",
                    why="; ".join(last) or "no failure was reported",
                    fix=f"see the logs in {self.directory}",
                )
            time.sleep(0.05)

    def wait_established(self, timeout_s: float = 15.0) -> None:
        """Until every flow of the plan is up, and every target answered every kind of request."""
        flows = sum(t.tcp_flows + t.udp_flows for t in self.plan.targets)
        asked = {(t.name, Kind.HTTP) for t in self.plan.targets if t.http_rate}
        asked |= {(t.name, Kind.UDP) for t in self.plan.targets if t.udp_rate}

        def ready(traffic: Traffic) -> bool:
            answered = {(target, kind) for target, kind, _ in traffic.answers()}
            return len(traffic.live()) >= flows and asked <= answered

        self.wait_until(ready, f"{flows} flows open, all targets answering", timeout_s)


def requests_of(counts: Counts) -> int:
    """Answered requests, without the messages of flows."""
    return sum(n for (_, kind, _), n in counts.items() if kind not in FLOWS)
