# SPDX-License-Identifier: Apache-2.0
"""Nanoseconds a packet through the real program, beside references of our own.

    make perf-packet            as root; ARGS="--rounds 3 --only settled" for a look

Writes results/packet.json and results/packet.machine.json beside this file, and the tables in
docs/performance.md, which says how to read them; nothing if --only left cases out. Never fails
because something is slow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import click

from perf import harness
from perf.cases import SENT, Subject, outcomes, subjects
from perf.driver import SYN, Driver, References, Stream, frame_is_sound
from perf.harness import Spread
from perf.tables import Balancer, Layout
from shunt.kern.libbpf import XDP_PASS, XDP_TX
from shunt.lb.errors import ShuntError
from shunt.lb.model import Mode

ROUNDS = 15
# Enough to sweep the caches, and to see most of a million flows in a few rounds.
WARM_UP, TIMED = 150_000, 300_000
# Of flows that are new each time; the tables are emptied after each sample.
NEW_WARM_UP, NEW_TIMED = 20_000, 100_000
CHECKED = 4096
# A case whose packets take another way now and then is not what its name says.
ENOUGH = 0.999


class Bench:
    """The loaded programs, and their cases. Close it to unload them all."""

    def __init__(self) -> None:
        """Raises: ShuntError."""
        self._stack = ExitStack()
        self._driver = Driver()
        self._stack.callback(self._driver.close)
        self._balancers: dict[tuple[Layout, bool], Balancer] = {}
        self._references: dict[tuple[int, bool], References] = {}

    def close(self) -> None:
        """Unload everything."""
        self._stack.close()

    def prepare(self, subject: Subject) -> harness.Case:
        """Load and fill what the case needs, and see that it does what its name says.

        Raises: ShuntError if it does not.
        """
        fd = self._program(subject)
        if subject.remembers and not subject.new:
            stream = subject.stream
            nat = subject.layout is not None and subject.layout.mode == Mode.NAT
            for flags in (SYN, stream.flags) if nat else (stream.flags,):
                every = Stream(stream.flows, stream.services, stream.ipv6, True, flags)
                self._driver.aim(fd, every)
                self._driver.send(stream.flows)
        self._run(subject, 0, CHECKED)
        return partial(self._run, subject, *_packets(subject))

    def _program(self, subject: Subject) -> int:
        """The program with tables of its own; a case of new flows shares them with none."""
        if subject.layout is not None:
            where = subject.layout, subject.new
            if where not in self._balancers:
                self._balancers[where] = balancer = Balancer(subject.layout)
                self._stack.callback(balancer.close)
            return self._balancers[where].fd
        at = subject.stream.services, subject.new
        if at not in self._references:
            self._references[at] = references = References(subject.stream.services)
            self._stack.callback(references.close)
        return self._references[at].fd(subject.program)

    def _run(self, subject: Subject, warm_up: int, packets: int) -> float:
        """One sample, in ns a packet.

        Raises: ShuntError if packets did not take the way that the case is about.
        """
        fd, driver = self._program(subject), self._driver
        if subject.new:
            driver.aim_at_new_flows(fd, subject.stream, warm_up + packets)
        else:
            driver.aim(fd, subject.stream)
        if warm_up:
            driver.send(warm_up)
        before = self._counters(subject)
        ran = driver.send(packets)
        after = self._counters(subject)
        wanted = XDP_TX if subject.reason == SENT else XDP_PASS
        problems = [f"the last verdict is {ran.verdict}, not {wanted}"] * (ran.verdict != wanted)
        if subject.program == "nothing" and not frame_is_sound(ran.data):
            problems.append("the wrapper's frame has a wrong length or checksum")
        if after:
            expected = {"packets": packets, "flows": packets * (subject.new and subject.remembers)}
            for what, number in expected.items():
                got = after[what] - before[what]
                if abs(got - number) > (1 - ENOUGH) * packets:
                    problems.append(f"{got} {what} were counted instead of {number}")
        if problems:
            raise ShuntError(
                f"case {subject.case} does not measure what it says",
                "; ".join(problems),
                "a defect in perf/ or in the program; please report it",
            )
        if subject.new and subject.layout:
            self._balancers[subject.layout, True].forget()
        return float(ran.duration_ns)

    def _counters(self, subject: Subject) -> Mapping[str, int]:
        """Packets that left as they should, and flows that were stored; none of references."""
        if not subject.layout:
            return {}
        balancer = self._balancers[subject.layout, subject.new]
        stored = balancer.happened("FLOW_REMEMBERED") + balancer.happened("NAT_CREATED")
        return {"packets": balancer.counted(subject.reason), "flows": stored}


def _packets(subject: Subject) -> tuple[int, int]:
    return (NEW_WARM_UP, NEW_TIMED) if subject.new else (WARM_UP, TIMED)


def records(chosen: list[Subject], measured: Mapping[str, Spread]) -> list[dict[str, Any]]:
    """The results as they are written. Units: ns a packet, gross of the wrapper."""
    return [
        {
            "case": s.case,
            "mode": s.mode,
            "state": s.state,
            "flows": NEW_TIMED if s.new else s.stream.flows,
            "services": s.stream.services,
            "median_ns": measured[s.case].median,
            "min_ns": measured[s.case].low,
            "max_ns": measured[s.case].high,
            "wrapper_ns": measured[s.wrapper].median,
        }
        for s in chosen
    ]


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results for people: the table, and which targets are met. In Markdown."""
    header = ("case", "flows", "services", "median", "min", "max", "above the wrapper")
    lines = []
    for r in rows:
        times = (r["median_ns"], r["min_ns"], r["max_ns"], r["median_ns"] - r["wrapper_ns"])
        lines.append((r["case"], r["flows"], r["services"], *map(float, times)))
    found = [
        (o.target.claim, float(o.measured), float(o.limit), harness.verdict(o.met))
        for o in outcomes({r["case"]: r["median_ns"] for r in rows})
    ]
    text = harness.table(header, lines) + "\n"
    if found:
        text += "\n" + harness.table(("at most", "measured", "limit", ""), found) + "\n"
    return text


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--rounds", default=ROUNDS, show_default=True, type=click.IntRange(min=1))
@click.option("--only", default="", help="cases whose name has this in it; writes no files")
def main(rounds: int, only: str) -> None:
    """Measure, print, write."""
    every = subjects()
    chosen = [s for s in every if only in s.case]
    wrappers = {s.wrapper for s in chosen}
    chosen = [s for s in every if s in chosen or s.case in wrappers]
    bench = Bench()
    facts = harness.machine() | {"rounds": rounds}
    try:
        with harness.pinned() as cpu:
            cases = {}
            for s in chosen:
                harness.say(f"filling tables: {s.case}")
                cases[s.case] = bench.prepare(s)
            measured = harness.measure(
                cases, rounds, progress=lambda n: harness.say(f"round {n} of {rounds}")
            )
    finally:
        bench.close()
    harness.say("")
    rows = records(chosen, measured)
    print(report(rows))
    if not only:
        harness.publish("packet", rows, facts | {"pinned_to": cpu}, report(rows))


if __name__ == "__main__":
    harness.run(main)
