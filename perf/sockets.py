# SPDX-License-Identifier: Apache-2.0
"""A node's own processes and its services: at the socket, beside nftables, iptables and nothing.

    make perf-sockets           as root; ARGS="--quick" or ARGS="--rounds 2 --only 1000" for a look
    WRK2=PATH make perf-sockets latencies by wrk2 and nginx

Writes results/sockets.json and results/sockets.machine.json beside this file, and the tables in
docs/performance.md, which says what is measured; nothing with --quick or --only. Never fails
because something is slow.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import click

from perf import generators, harness
from perf.generators import Generator
from perf.harness import Spread
from perf.socket_targets import outcomes
from perf.socket_ways import BUILD, KINDS, PORT, Way, processors, ways
from shunt.kern.programs import enable_statistics
from shunt.lab.netns import Process
from shunt.lb.errors import ShuntError

SIZES = (1000, 10_000)
ROUNDS = 5
CLOSED_S, PACED_S = 0.4, 1.0
# Which processor a client and a server wake each other on is chance, and lasts while they live.
PACED_TIMES = 3
QUICK_S = 0.2
KEPT = (1, 32)
WRITES = {4096: "bulk_4k", 65536: "bulk_64k"}
# What a round measures, and in which unit.
CLOSED = (
    *(f"requests_{n}_{what}" for n in KEPT for what in ("per_s", "cpu_us")),
    *("connections_per_s", "connections_cpu_us", "connect_us"),
    *(f"{name}_gbit_per_s" for name in WRITES.values()),
)
PACED = tuple(
    f"{case}_{part}_us"
    for case in (*(f"requests_{n}" for n in KEPT), "connections")
    for part in ("p50", "p99", "p999")
)
MEASURED = (*CLOSED, *PACED)
# And what may be nothing: this way's programs, and how many of its messages passed TCP by.
PROGRAMS = tuple(f"{case}_programs_ns" for case in ("requests_32", "connections"))
REDIRECTED = "connections_redirected"
BESIDES = (*PROGRAMS, REDIRECTED)
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


def sample(way: Way, generator: Generator, closed_s: float, paced_s: float) -> dict[str, float]:
    """One round of one way.

    Raises: ShuntError if an answer was not right.
    """
    found = {}
    with way.serving([str(BUILD / "socket_server"), str(PORT)]) as server:
        for kept in KEPT:
            before = way.redirected()
            # Alone, a connection would mostly wait for a processor to wake up.
            did = way.did("requests", closed_s, kept, server, together=kept == 1)
            check_redirected(way, way.redirected() - before, did.count)
            found[f"requests_{kept}_per_s"] = did.count / did.wall_s
            found[f"requests_{kept}_cpu_us"] = did.cpu_s / did.count * 1e6
        before = way.redirected()
        did = way.did("connections", closed_s, None, server, together=True)
        # A question and an answer each.
        found[REDIRECTED] = (way.redirected() - before) / did.count / 2
        found["connections_per_s"] = did.count / did.wall_s
        found["connections_cpu_us"] = did.cpu_s / did.count * 1e6
        found["connect_us"] = did.p50_us
        for size, name in WRITES.items():
            did = way.did("bulk", closed_s, size, server, together=False)
            found[f"{name}_gbit_per_s"] = did.count / did.wall_s * 8 / 1e9
        found |= programs(way, server, closed_s)
    for kept in (*KEPT, 0):
        with harness.awake():
            paced = [generator.latency(way, kept, paced_s) for _ in range(PACED_TIMES)]
        case = f"requests_{kept}" if kept else "connections"
        for part in ("p50", "p99", "p999"):
            found[f"{case}_{part}_us"] = statistics.median(getattr(one, part) for one in paced)
    return found


def programs(way: Way, server: Process, seconds: float) -> dict[str, float]:
    """How long a way's own programs run for a request, or a connection; taking their time takes
    time, so that it is done apart."""
    found = {}
    taken = enable_statistics()
    try:
        for name, (what, kept) in zip(
            PROGRAMS, (("requests", 32), ("connections", None)), strict=True
        ):
            before = way.programs_s()
            did = way.did(what, seconds, kept, server, together=kept is None)
            found[name] = (way.programs_s() - before) / did.count * 1e9
    finally:
        os.close(taken)
    return found


def check_redirected(way: Way, messages: int, requests: int) -> None:
    """Raises: ShuntError if the way's messages did not go the way that its name says."""
    # A request is two of them; some connections may have fallen back to TCP.
    if (messages >= requests) != (way.kind == "redirected"):
        raise ShuntError(
            f"{way}: {messages} messages of {requests} requests were redirected",
            "it would measure another way than it says",
            "see `shunt status`, and the log of its shuntd",
        )


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
        for other in ("direct", "translated"):
            pairs = list(zip(taken, samples[(other, services)], strict=True))
            row[f"of_{other}"] = {
                name: round(statistics.median(one[name] / than[name] for one, than in pairs), 4)
                for name in MEASURED
            }
        pairs = list(zip(taken, samples[("direct", services)], strict=True))
        more = statistics.median(one["connect_us"] - direct["connect_us"] for one, direct in pairs)
        row["connect_more_us"] = round(more, 3)
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
        samples: dict[tuple[str, int], list[dict[str, float]]] = {
            (kind, size): [] for size in sizes for kind in KINDS
        }
        for n in range(rounds):
            for way in random.Random(n).sample(every, len(every)):
                harness.say(f"round {n + 1} of {rounds}: {way}")
                taken = sample(way, generator, closed_s, paced_s)
                samples[way.kind, way.services].append(taken)
    harness.say("")
    rows = records(samples)
    print(report(rows))
    if not only and not quick:
        harness.publish("sockets", rows, facts, report(rows))


if __name__ == "__main__":
    harness.run(main)
