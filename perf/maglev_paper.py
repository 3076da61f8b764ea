# SPDX-License-Identifier: Apache-2.0
"""Maglev in the paper's own setting, and at Shunt's sizes: balance, slots that move, time.

The paper (Eisenbud et al., NSDI 2016, section 5.3) takes 1,000 backends and tables of 65,537 and
655,373 slots, and counts the entries that change when some of the backends fail at once. Here the
same for its rule ("claim", constant steps) and for ours ("try"); then one removal at the sizes
Shunt gives its services. Writes results/maglev_paper.json and .png beside this file.

    make perf-maglev
"""

import random
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

from perf import harness
from shunt.lb import maglev

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
Rule = Literal["try", "claim"]
RULES: tuple[Rule, ...] = ("claim", "try")

PAPER_BACKENDS = 1000
PAPER_SLOTS = (65537, 655373)
FAILURES = (1, 2, 5, 10, 20, 30, 40, 50)  # of 1,000 at once: 0.1 % to 5 %
PAPER_ROUNDS = 10

# Backends, and the largest prime below the power of two that Shunt takes for so many.
SIZES = {2: 251, 3: 509, 5: 509, 10: 1021, 30: 4093, 100: 16381, 300: 32749, 1000: 131071}
VARIANTS: dict[str, tuple[Rule, bool]] = {
    "try, 2^k slots (Shunt)": ("try", False),
    "claim, 2^k slots": ("claim", False),
    "claim, prime slots (paper)": ("claim", True),
}
TIMED_TABLES = 10_000


def names_of(chance: random.Random, count: int) -> list[str]:
    """Random addresses, as backends have them."""
    return [
        f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}:80" for n in chance.sample(range(1 << 22), count)
    ]


def owners(
    names: list[str], weights: list[int], up: NDArray[np.int64], slots: int, rule: Rule
) -> NDArray[np.int64]:
    """The table of those that are up, as indexes into `names`."""
    table = maglev.fill([names[i] for i in up], [weights[i] for i in up], slots, rule=rule)
    return up[table]


def paper_setting(slots: int, rule: Rule) -> dict[str, Any]:
    """Balance of 1,000 equal backends, and entries that change when k of them fail."""
    balance: list[float] = []
    changed: dict[int, list[float]] = {k: [] for k in FAILURES}
    for seed in range(PAPER_ROUNDS):
        chance = random.Random(seed)
        names, weights = names_of(chance, PAPER_BACKENDS), [1] * PAPER_BACKENDS
        everyone = np.arange(PAPER_BACKENDS)
        before = owners(names, weights, everyone, slots, rule)
        counts = np.bincount(before, minlength=PAPER_BACKENDS)
        balance += [counts.max() / counts.mean() - 1, counts.min() / counts.mean() - 1]
        for k in FAILURES:
            up = np.delete(everyone, chance.sample(range(PAPER_BACKENDS), k))
            after = owners(names, weights, up, slots, rule)
            changed[k].append(float(np.mean(before != after)))
    return {
        "slots": slots,
        "backends": PAPER_BACKENDS,
        "rule": rule,
        "rounds": PAPER_ROUNDS,
        "most_above_mean": round(max(balance), 5),
        "most_below_mean": round(min(balance), 5),
        "changed": [
            {
                "failures": k,
                "mean": round(statistics.mean(parts), 5),
                "min": round(min(parts), 5),
                "max": round(max(parts), 5),
            }
            for k, parts in changed.items()
        ],
    }


def removal(backends: int, heaviest: int, variant: str) -> dict[str, Any]:
    """Slots that change when one backend goes, beyond its share by weight, as a part of all."""
    rule, prime = VARIANTS[variant]
    slots = SIZES[backends] if prime else 1 << maglev.log2_slots(backends)
    chance = random.Random(backends)
    beyond = []
    sets = 300 if backends <= 100 else 50
    for _ in range(sets):
        names = names_of(chance, backends)
        weights = [chance.randint(1, heaviest) for _ in names]
        everyone, gone = np.arange(backends), chance.randrange(backends)
        before = owners(names, weights, everyone, slots, rule)
        after = owners(names, weights, np.delete(everyone, gone), slots, rule)
        beyond.append(float(np.mean(before != after)) - weights[gone] / sum(weights))
    return {
        "variant": variant,
        "backends": backends,
        "slots": slots,
        "heaviest": heaviest,
        "sets": sets,
        "mean_beyond": round(statistics.mean(beyond), 5),
        "p95_beyond": round(float(np.quantile(beyond, 0.95)), 5),
        "max_beyond": round(max(beyond), 5),
    }


def timing(heaviest: int) -> dict[str, Any]:
    """Seconds for 10,000 tables of 10 backends and 1,024 slots; identities hashed before."""
    chance = random.Random(1)
    hashes = [
        maglev.hash_array([maglev.hash_identity(name) for name in names_of(chance, 10)])
        for _ in range(TIMED_TABLES)
    ]
    weights = [
        np.array([chance.randint(1, heaviest) for _ in range(10)], dtype=np.uint32) for _ in hashes
    ]
    out = np.zeros(TIMED_TABLES << 10, dtype=np.uint32)
    seconds = []
    for _ in range(7):
        start = time.perf_counter()
        for i in range(TIMED_TABLES):
            maglev.fill_hashed(hashes[i], weights[i], out[i << 10 : (i + 1) << 10])
        seconds.append(time.perf_counter() - start)
    return {
        "tables": TIMED_TABLES,
        "backends": 10,
        "slots": 1024,
        "heaviest": heaviest,
        "median_s": round(statistics.median(seconds), 4),
        "min_s": round(min(seconds), 4),
        "max_s": round(max(seconds), 4),
    }


def plot_paper(axes: Axes, cases: list[dict[str, Any]]) -> None:
    for case in cases:
        percent = [100 * row["failures"] / case["backends"] for row in case["changed"]]
        mean = [100 * row["mean"] for row in case["changed"]]
        off = 100 * max(case["most_above_mean"], -case["most_below_mean"])
        axes.plot(
            percent,
            mean,
            marker="o",
            color="tab:red" if case["rule"] == "claim" else "tab:blue",
            linestyle="-" if case["slots"] > 100_000 else "--",
            label=f"{case['rule']}, {case['slots']:,} slots (balance within {off:.2f} %)",
        )
    axes.plot([0, 5], [0, 5], color="grey", linestyle=":", label="least possible")
    axes.set_title("The paper's setting: 1,000 backends, prime tables")
    axes.set_xlabel("backends failing at once, %")
    axes.set_ylabel("slots that change owner, %")


def plot_removal(axes: Axes, cases: list[dict[str, Any]]) -> None:
    colours = ("tab:blue", "tab:orange", "tab:red")
    for variant, colour in zip(VARIANTS, colours, strict=True):
        rows = [row for row in cases if row["variant"] == variant and row["heaviest"] == 1]
        sizes = [row["backends"] for row in rows]
        mean, most = ([100 * row[k] for row in rows] for k in ("mean_beyond", "max_beyond"))
        axes.plot(sizes, mean, marker="o", color=colour, label=f"{variant}: mean")
        axes.plot(sizes, most, marker="^", color=colour, linestyle=":", label="worst set")
    axes.axhline(3, color="grey", linewidth=1, label="3 %, the bound for the mean")
    axes.set_xscale("log")
    axes.set_title("One of N backends removed, at Shunt's sizes")
    axes.set_xlabel("backends")
    axes.set_ylabel("slots that change beyond 1/N, %")


def main() -> None:
    started = time.perf_counter()
    paper = [paper_setting(slots, rule) for slots in PAPER_SLOTS for rule in RULES]
    removals = [
        removal(backends, heaviest, variant)
        for variant in VARIANTS
        for heaviest in (1, 10, 100)
        for backends in SIZES
    ]
    times = [timing(heaviest) for heaviest in (1, 10)]
    result = {
        "machine": harness.machine() | {"numpy": np.__version__},
        "paper": paper,
        "removal": removals,
        "time": times,
    }
    harness.write_json(RESULTS / "maglev_paper.json", result)
    figure, (left, right) = plt.subplots(1, 2, figsize=(14, 5.5))
    plot_paper(left, paper)
    plot_removal(right, removals)
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS / "maglev_paper.png", dpi=110)
    for row in removals:
        print(
            f"{row['variant']:28} N={row['backends']:5} weights 1..{row['heaviest']:<4}"
            f" beyond: mean {row['mean_beyond']:7.2%} p95 {row['p95_beyond']:7.2%}"
            f" max {row['max_beyond']:7.2%}"
        )
    for row in times:
        print(f"{row['tables']:,} tables, weights 1..{row['heaviest']}: {row['median_s']} s")
    print(f"took {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
