# SPDX-License-Identifier: Apache-2.0
"""How the daemon grows: a real shuntd with 100, 1,000 and 10,000 services of ten backends.

    make perf-scale             as root; ARGS="--rounds 1 --only 1000" for a look

Writes results/scale.json and results/scale.machine.json beside this file, and the tables in
docs/performance.md, which says what is measured; nothing if --only left sizes out. Never fails
because something is slow.
"""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import click

from perf import harness
from perf.fleet import Fleet, Shuntd, a_fleet

SIZES = (100, 1000, 10_000)
BACKENDS = 10
ROUNDS = 3
CHANGES = 200  # a round; a drain and its end are two
RELOADS = 5  # a round
WORST = {"change_max_ms", "stall_ms"}  # the maximum says more than the median
# At the largest size. What the median of the rounds may be at most.
TARGETS = (
    ("compile and first apply", "first_apply_s", "s", 3.0),
    ("a changed backend, in the kernel", "change_ms", "ms", 5.0),
    ("private memory", "rss_anon_mb", "MB", 150.0),
    ("maps", "map_mb", "MB", 150.0),
)
COLUMNS = (
    ("services", "services"),
    ("load_s", "read, s"),
    ("first_apply_s", "first apply, s"),
    ("change_ms", "change, ms"),
    ("change_max_ms", "slowest, ms"),
    ("reload_s", "reload, s"),
    ("stall_ms", "change meanwhile, ms"),
    ("rss_anon_mb", "private, MB"),
    ("map_mb", "maps, MB"),
)


def sample(fleet: Fleet, seed: int) -> dict[str, float]:
    """One round of one size: a daemon with no maps yet, started, changed, reloaded, ended.

    Raises: ShuntError if the daemon did not do what it was told.
    """
    chance = random.Random(seed)
    with fleet.running() as shuntd:
        started = shuntd.status()["start"]
        memory = [shuntd.rss_anon_mb()]
        changes = _changes(shuntd, chance, CHANGES)
        reloads, stalls = [], []
        for _ in range(RELOADS):
            took_s, meanwhile_ms = shuntd.reload(fleet, chance)
            reloads.append(took_s)
            stalls += meanwhile_ms
            memory.append(shuntd.rss_anon_mb())
        return {
            "load_s": started["read_s"],
            "first_apply_s": started["apply_s"],
            "change_ms": statistics.median(changes),
            "change_max_ms": max(changes),
            "reload_s": statistics.median(reloads),
            "stall_ms": max(stalls),
            "rss_anon_mb": max(memory),
            "map_mb": shuntd.map_mb(),
        }


def _changes(shuntd: Shuntd, chance: random.Random, count: int) -> list[float]:
    """Drains of one backend of one service each, and their ends. Units: ms."""
    found = []
    for _ in range(count // 2):
        which = shuntd.choose(chance)
        found += [shuntd.change_ms(which, drained) for drained in (True, False)]
    return found


def records(sizes: Sequence[int], samples: Mapping[int, Sequence[Mapping[str, float]]]) -> Any:
    """The results as they are written: of each size the median of its rounds."""
    rows = []
    for size in sizes:
        row: dict[str, Any] = {"services": size, "backends": size * BACKENDS}
        for name in samples[size][0]:
            of = max if name in WORST else statistics.median
            row[name] = round(of([s[name] for s in samples[size]]), 3)
        rows.append(row)
    return rows


def report(rows: Sequence[Mapping[str, Any]]) -> str:
    """The results for people: the table, and which targets are met. In Markdown."""
    lines = [[_number(row[key]) for key, _ in COLUMNS] for row in rows]
    text = harness.table([title for _, title in COLUMNS], lines) + "\n"
    largest = rows[-1]
    if largest["services"] == SIZES[-1]:
        found = [
            (f"{claim}, {unit}", float(largest[key]), limit, harness.verdict(largest[key] <= limit))
            for claim, key, unit, limit in TARGETS
        ]
        header = (f"at most, with {SIZES[-1]} services", "measured", "limit", "")
        text += "\n" + harness.table(header, found) + "\n"
    return text


def _number(value: float) -> int | float:
    return value if isinstance(value, int) else float(value)


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--rounds", default=ROUNDS, show_default=True, type=click.IntRange(min=1))
@click.option("--only", type=int, help="this number of services; writes no files")
def main(rounds: int, only: int | None) -> None:
    """Measure, print, write."""
    sizes = [only] if only else list(SIZES)
    facts = harness.machine() | {"rounds": rounds}
    samples: dict[int, list[dict[str, float]]] = {size: [] for size in sizes}
    for n in range(rounds):
        for size in random.Random(n).sample(sizes, len(sizes)):
            harness.say(f"round {n + 1} of {rounds}: {size} services")
            with a_fleet(size, BACKENDS) as fleet:
                samples[size].append(sample(fleet, n))
    harness.say("")
    rows = records(sizes, samples)
    print(report(rows))
    if only:
        print(json.dumps(rows))
    else:
        harness.publish("scale", rows, facts, report(rows))


if __name__ == "__main__":
    harness.run(main)
