# SPDX-License-Identifier: Apache-2.0
"""A node's own processes and its services: at the socket, beside nftables, iptables and nothing.

    make perf-sockets           as root; ARGS="--quick" or ARGS="--rounds 2 --only 1000" for a look
    WRK2=PATH make perf-sockets latencies by wrk2 and nginx

Writes results/sockets.json and results/sockets.machine.json beside this file, and the tables in
docs/performance.md, which says what is measured; nothing with --quick or --only. Never fails
because something is slow.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import click

from perf import generators, harness
from perf.harness import Spread, ratio_of
from perf.socket_rounds import BESIDES, MEASURED, PROGRAMS, WRITES, one_round
from perf.socket_targets import outcomes
from perf.socket_ways import processors, ways

SIZES = (1000, 10_000)
ROUNDS = 12
CLOSED_S, PACED_S = 0.6, 1.0
QUICK_S = 0.2
TITLES = {
    "requests_1": "1 kept connection",
    "requests_32": "32 kept connections",
    "connections": "a connection each",
}
RATIOS = {
    "requests_1_per_s": "1 kept",
    "requests_1_cpu_us": "its CPU",
    "requests_32_per_s": "32 kept",
    "requests_32_cpu_us": "its CPU",
    "connections_per_s": "a connection each",
    "connections_cpu_us": "its CPU",
    "bulk_4k_gbit_per_s": "4 KB",
    "bulk_64k_gbit_per_s": "64 KB",
}
Samples = Mapping[tuple[str, int], Sequence[Mapping[str, float]]]


def records(samples: Samples) -> list[dict[str, Any]]:
    """The results as they are written: of each way its rounds' medians and extremes.

    `of_direct` and `of_translated` compare within each round, and are the median of that: a
    disturbance that lasts for a round hits both.
    """
    rows = []
    for (kind, services), taken in samples.items():
        row: dict[str, Any] = {"way": kind, "services": services}
        for name in (*MEASURED, *BESIDES):
            spread = Spread.of([one[name] for one in taken])
            row[name] = round(spread.median, 3)
            row[f"{name}_min"], row[f"{name}_max"] = round(spread.low, 3), round(spread.high, 3)
        direct = samples[("direct", services)]
        for other in ("direct", "translated"):
            than = samples[(other, services)]
            row[f"of_{other}"] = {name: ratio_of(name, taken, than) for name in MEASURED}
        more = (a["connect_us"] - b["connect_us"] for a, b in zip(taken, direct, strict=True))
        row["connect_more_us"] = round(statistics.median(more), 3)
        rows.append(row)
    return rows


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results for people: the tables, and which targets are met. In Markdown."""
    tables = []
    for case, title in TITLES.items():
        header = ["way", "services", "a second", "CPU each, µs"]
        names = [f"{case}_per_s", f"{case}_cpu_us"]
        if case == "connections":
            header.append("connect(), µs")
            names.append("connect_us")
        if f"{case}_programs_ns" in PROGRAMS:
            header.append("programs, ns")
            names.append(f"{case}_programs_ns")
        header += ["p50, µs", "p99, µs", "p99.9, µs"]
        names += [f"{case}_{part}_us" for part in ("p50", "p99", "p999")]
        tables.append(f"**{title}**\n\n" + _table(header, names, rows))
    header = ["way", "services", "4 KB writes, Gbit/s", "64 KB writes, Gbit/s"]
    tables.append(
        "**Bulk**\n\n" + _table(header, [f"{name}_gbit_per_s" for name in WRITES.values()], rows)
    )
    header = ["of direct's, round by round", "services", *RATIOS.values()]
    ratios = [
        [row["way"], row["services"], *(f"{row['of_direct'][name]:.2f}" for name in RATIOS)]
        for row in rows
    ]
    tables.append(harness.table(header, ratios) + "\n")
    found = outcomes(rows)
    if found:
        lines = [(o.claim, o.measured, o.limit, harness.verdict(o.met)) for o in found]
        tables.append(harness.table(["target", "measured", "limit", ""], lines) + "\n")
    return "\n".join(tables)


def _table(header: Sequence[str], names: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        [row["way"], row["services"]]
        + [round(row[n]) if n.endswith("per_s") and "gbit" not in n else row[n] for n in names]
        for row in rows
    ]
    return harness.table(header, lines) + "\n"


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--rounds", default=ROUNDS, show_default=True, type=click.IntRange(min=1))
@click.option("--only", type=int, help="this number of services; writes no files")
@click.option("--quick", is_flag=True, help="one short round of the fewest; writes no files")
def main(rounds: int, only: int | None, quick: bool) -> None:
    """Measure, print, write."""
    sizes = [only] if only else list(SIZES)
    closed_s, paced_s = CLOSED_S, PACED_S
    if quick:
        sizes, rounds, closed_s, paced_s = sizes[:1], 1, QUICK_S, QUICK_S
    generator = generators.chosen()
    client_cpu, server_cpu = processors()
    facts = harness.machine() | {
        "rounds": rounds,
        "generator": generator.name,
        "client_on": client_cpu,
        "server_on": server_cpu,
    }
    harness.say("loading rules, starting daemons")
    with ways(sizes) as every:
        samples = harness.by_rounds(
            every,
            rounds,
            lambda group, order: one_round(group, generator, order, closed_s, paced_s),
        )
    rows = records(samples)
    print(report(rows))
    if not only and not quick:
        harness.publish("sockets", rows, facts, report(rows))


if __name__ == "__main__":
    harness.run(main)
