# SPDX-License-Identifier: Apache-2.0
"""A node's own services through tc/, beside nftables and iptables as kube-proxy writes them.

    make perf-tc                as root; ARGS="--rounds 2 --only 1000" for a look

Writes results/tc.json and results/tc.machine.json beside this file, and the tables in
docs/performance.md, which says what is measured; nothing if --only left sizes out. Never fails
because something is slow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import click

from perf import harness
from perf.harness import Spread, ratio_of
from perf.ways import KINDS, Way, ways

SIZES = (1, 1000, 10_000)
ROUNDS = 15
# The first connections fill caches.
WARM_UP, TIMED = 1000, 2000
THROUGHPUT_S = 1
MEASURED = ("connections_per_s", "cpu_us", "gbit_per_s")
COLUMNS = {
    "connections_per_s": "connections a second",
    "cpu_us": "CPU a connection, µs",
    "gbit_per_s": "Gbit/s",
}
OURS = ("tc", "tc-peer")
COMPARED = {"connections_per_s": "nftables", "cpu_us": "direct"}
RATE, CPU = 1.3, 1.15


def connections(cpu: int, way: Way) -> dict[str, float]:
    """Short connections.

    Raises: ShuntError if not all came to their end.
    """
    way.connections(WARM_UP)
    before = harness.ksoftirqd_s(cpu)
    made = way.connections(TIMED)
    handed_on = harness.ksoftirqd_s(cpu) - before
    return {
        "connections_per_s": made.connections / made.wall_s,
        "cpu_us": (made.cpu_s + handed_on) / made.connections * 1e6,
    }


def throughput(way: Way) -> dict[str, float]:
    """One connection's.

    Raises: ShuntError if iperf3 cannot say.
    """
    return {"gbit_per_s": way.gbit_per_s(THROUGHPUT_S)}


def records(
    samples: Mapping[tuple[str, int], Sequence[Mapping[str, float]]],
) -> list[dict[str, Any]]:
    """The results as they are written: of each way its rounds' medians and extremes, and the
    medians of what it was, round by round, of others."""
    rows = []
    for (kind, services), taken in samples.items():
        row: dict[str, Any] = {"way": kind, "services": services}
        for name in MEASURED:
            spread = Spread.of([one[name] for one in taken])
            row[name] = round(spread.median, 2)
            row[f"{name}_min"], row[f"{name}_max"] = round(spread.low, 2), round(spread.high, 2)
        for name, other in COMPARED.items():
            row[f"{name}_of_{other}"] = ratio_of(name, taken, samples[(other, services)])
        rows.append(row)
    return rows


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results for people: the table, and which targets are met. In Markdown."""
    header = ["way", "services"]
    for name in MEASURED:
        header += [COLUMNS[name], "min", "max"]
    lines = []
    for row in rows:
        line: list[object] = [row["way"], row["services"]]
        for name in MEASURED:
            digits = 0 if name == "connections_per_s" else 1
            line += [_shown(row[name + end], digits) for end in ("", "_min", "_max")]
        lines.append(line)
    text = harness.table(header, lines) + "\n"
    largest = {row["way"]: row for row in rows if row["services"] == SIZES[-1]}
    if set(KINDS) <= largest.keys():
        header = [f"with {SIZES[-1]} services, round by round", "measured", "limit", ""]
        judged = [line for kind in OURS for line in _judged(largest[kind])]
        text += "\n" + harness.table(header, judged) + "\n"
    return text


def _judged(row: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    kind = row["way"]
    rate, cost = (row[f"{name}_of_{other}"] for name, other in COMPARED.items())
    met = harness.verdict
    return [
        (
            f"{kind}: connections a second, of nftables', at least",
            f"{rate:.2f}",
            f"{RATE:.2f}",
            met(rate >= RATE),
        ),
        (
            f"{kind}: CPU a connection, of direct's, at most",
            f"{cost:.2f}",
            f"{CPU:.2f}",
            met(cost <= CPU),
        ),
    ]


def _shown(value: float, digits: int) -> int | float:
    return round(value) if digits == 0 else float(value)


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--rounds", default=ROUNDS, show_default=True, type=click.IntRange(min=1))
@click.option("--only", type=int, help="this number of services; writes no files")
def main(rounds: int, only: int | None) -> None:
    """Measure, print, write."""
    sizes = [only] if only else list(SIZES)
    facts = harness.machine() | {"rounds": rounds}
    harness.say("loading rules, starting daemons")
    with ways(sizes) as every, harness.pinned() as cpu:
        cases = (partial(connections, cpu), throughput)
        samples = harness.by_rounds(
            every, rounds, lambda group, order: harness.by_turns(group, cases, order)
        )
    rows = records(samples)
    print(report(rows))
    if not only:
        harness.publish("tc", rows, facts | {"pinned_to": cpu}, report(rows))


if __name__ == "__main__":
    harness.run(main)
