# SPDX-License-Identifier: Apache-2.0
"""What every measurement here shares: rounds, a processor of its own, spread, machine facts, files.

A number measured once, or one case after the other, says as much about the machine's neighbours
as about the code. So the cases take turns: each round runs every case once, in an order of its
own; a disturbance then hits all cases alike, and the median over the rounds forgets it. The
smallest and the largest are reported beside it, so that a reader sees how quiet the machine was.
"""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from shunt.lb.errors import ShuntError

RESULTS = Path(__file__).parent / "results"
DOCUMENT = Path(__file__).parent.parent / "docs/performance.md"
LATENCY = Path("/dev/cpu_dma_latency")  # Documentation/power/pm_qos_interface.rst
Case = Callable[[], float]


class Compared(Protocol):
    """One of several ways to do the same."""

    @property
    def kind(self) -> str: ...

    @property
    def services(self) -> int: ...


Way = TypeVar("Way")
ComparedWay = TypeVar("ComparedWay", bound=Compared)


@dataclass(frozen=True)
class Spread:
    """One case's samples, a number for each round, in the unit that the case returns."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Raises: ValueError if there are none."""
        if not samples:
            raise ValueError("a spread needs samples")
        return cls(statistics.median(samples), min(samples), max(samples), len(samples))


def measure(
    cases: Mapping[str, Case],
    rounds: int,
    *,
    seed: int = 1,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Spread]:
    """Run each case once a round, the order drawn anew each round from `seed`.

    A case warms up by itself, as much as it needs. `progress` is told each finished round.

    Raises: whatever a case raises; ValueError if there are no rounds.
    """
    chance = random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for done in range(1, rounds + 1):
        for name in chance.sample(list(cases), len(cases)):
            samples[name].append(cases[name]())
        if progress:
            progress(done)
    return {name: Spread.of(values) for name, values in samples.items()}


def by_turns(
    ways: Sequence[Way],
    cases: Sequence[Callable[[Way], Mapping[str, float]]],
    order: random.Random,
) -> dict[Way, dict[str, float]]:
    """One round of each case by every way: one way right after the other, in an order drawn anew.

    So what will be compared lies seconds apart, and a disturbance that lasts longer hits all alike.

    Raises: whatever a case raises.
    """
    found: dict[Way, dict[str, float]] = {way: {} for way in ways}
    for case in cases:
        for way in order.sample(ways, len(ways)):
            found[way] |= case(way)
    return found


def by_rounds(
    ways: Sequence[ComparedWay],
    rounds: int,
    one_round: Callable[
        [Sequence[ComparedWay], random.Random], Mapping[ComparedWay, Mapping[str, float]]
    ],
) -> dict[tuple[str, int], list[Mapping[str, float]]]:
    """So many rounds of all ways, those with equally many services together.

    Shape: by a way's kind and number of services, what each round found.
    Raises: whatever a round raises.
    """
    samples: dict[tuple[str, int], list[Mapping[str, float]]]
    samples = {(way.kind, way.services): [] for way in ways}
    for n in range(rounds):
        for services in sorted({way.services for way in ways}):
            say(f"round {n + 1} of {rounds}: {services} services")
            group = [way for way in ways if way.services == services]
            for way, found in one_round(group, random.Random(n)).items():
                samples[way.kind, services].append(found)
    say("")
    return samples


def ratio_of(
    name: str, samples: Sequence[Mapping[str, float]], than: Sequence[Mapping[str, float]]
) -> float:
    """The median over the rounds of what the ratio was in each.

    Raises: ValueError if these are not as many rounds, or none; ZeroDivisionError.
    """
    pairs = zip(samples, than, strict=True)
    ratios = [one[name] / other[name] for one, other in pairs]
    return round(Spread.of(ratios).median, 4)


@contextmanager
def pinned(cpu: int | None = None) -> Iterator[int]:
    """Keep this process on one processor; the last it may use, as the first takes interrupts.

    Raises: OSError if the processor is not there; the affinity is as it was.
    """
    allowed = os.sched_getaffinity(0)
    chosen = max(allowed) if cpu is None else cpu
    os.sched_setaffinity(0, {chosen})
    try:
        yield chosen
    finally:
        os.sched_setaffinity(0, allowed)


@contextmanager
def awake() -> Iterator[bool]:
    """Keep idle processors from sleeping; yields whether the kernel could be asked to.

    A virtual processor that sleeps is woken by its hypervisor, in some tens of microseconds or in
    none, as chance has it.
    """
    try:
        file = LATENCY.open("wb", buffering=0)
    except OSError:
        yield False
        return
    with file:  # the wish holds while it is open
        file.write(struct.pack("=i", 0))
        yield True


def ksoftirqd_s(cpu: int) -> float:
    """What the kernel's own thread for packets of a processor has run so far. Units: seconds."""
    for comm in Path("/proc").glob("[0-9]*/comm"):
        if _read(str(comm)) == f"ksoftirqd/{cpu}":
            return int(_read(str(comm.with_name("schedstat"))).split()[0]) / 1e9
    return 0.0


def machine() -> dict[str, Any]:
    """What the numbers depend on. A fact this machine does not tell is left out."""
    cpuinfo = _read("/proc/cpuinfo")
    memory = _field(_read("/proc/meminfo"), "MemTotal").split()
    facts = {
        "kernel": platform.release(),
        "processor": _field(cpuinfo, "model name"),
        "processors": os.cpu_count(),
        "mhz": _field(cpuinfo, "cpu MHz"),
        "virtual": "hypervisor" in _field(cpuinfo, "flags").split(),
        "caches": _caches(Path("/sys/devices/system/cpu/cpu0/cache")),
        "memory_mb": int(memory[0]) // 1024 if memory else None,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "bpf_jit": _read("/proc/sys/net/core/bpf_jit_enable"),
        "mitigations": _mitigations(Path("/sys/devices/system/cpu/vulnerabilities")),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }
    return {name: fact for name, fact in facts.items() if fact not in ("", None, {})}


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _field(text: str, name: str) -> str:
    """The first value of `name : value`."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def _caches(folder: Path) -> dict[str, str]:
    found = {}
    for index in sorted(folder.glob("index*")):
        level, kind = _read(f"{index}/level"), _read(f"{index}/type")
        if kind != "Instruction":
            found[f"L{level}"] = _read(f"{index}/size")
    return found


def _mitigations(folder: Path) -> dict[str, str]:
    """Those that are in force: some make every return of a kernel function slow."""
    found = {path.name: _read(str(path)) for path in sorted(folder.glob("*"))}
    return {name: said for name, said in found.items() if said != "Not affected"}


def say(what: str) -> None:
    """Progress, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)


def write_json(path: Path, what: Any) -> None:
    """Write results so that a difference between two runs reads line by line.

    A list has an element a line. The file is replaced as a whole, or not at all.
    """
    if isinstance(what, list):
        text = "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in what) + "\n]\n"
    else:
        text = json.dumps(what, indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".tmp")
    draft.write_text(text)
    draft.replace(path)


def marks(name: str) -> tuple[str, str]:
    """Between which lines of the document the tables of `make perf-NAME` stand."""
    return f"<!-- make perf-{name}: begin -->", f"<!-- make perf-{name}: end -->"


def put_in(document: str, text: str, name: str) -> str:
    """The document with what stands between the two marks replaced.

    Raises: ValueError if the marks are not there.
    """
    begin, end = marks(name)
    before, _, rest = document.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"no {begin} ... {end} in the document")
    return f"{before}{begin}\n\n{text}\n{end}{after}"


def publish(name: str, rows: Any, facts: Mapping[str, Any], text: str) -> None:
    """Write results/NAME.json, results/NAME.machine.json, and the tables in the document.

    Raises: OSError; ValueError if the document has no place for them.
    """
    write_json(RESULTS / f"{name}.json", rows)
    write_json(RESULTS / f"{name}.machine.json", facts)
    # In place: the file stays its owner's.
    DOCUMENT.write_text(put_in(DOCUMENT.read_text(), text, name))


def run(main: Callable[[], object]) -> None:
    """A script's command, whose errors are for people."""
    try:
        main()
    except ShuntError as error:
        sys.exit(str(error))


def verdict(met: bool) -> str:
    """A target's last column."""
    return "met" if met else "missed"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table that also reads well in a terminal; numbers to the right.

    Units: floats are shown with one digit after the point.
    """
    cells = [list(header)] + [[_shown(cell) for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    right = [
        bool(rows) and all(isinstance(row[i], int | float) for row in rows)
        for i in range(len(header))
    ]

    def line(parts: Sequence[str]) -> str:
        padded = (
            p.rjust(w) if r else p.ljust(w) for p, w, r in zip(parts, widths, right, strict=True)
        )
        return "| " + " | ".join(padded) + " |"

    rule = ("-" * (w + 1) + ":" if r else "-" * (w + 2) for w, r in zip(widths, right, strict=True))
    return "\n".join([line(cells[0]), "|" + "|".join(rule) + "|", *map(line, cells[1:])])


def _shown(cell: object) -> str:
    return f"{cell:.1f}" if isinstance(cell, float) else str(cell)
