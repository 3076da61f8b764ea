# SPDX-License-Identifier: Apache-2.0
"""The tests that kernels may differ in, on Debian's: `make test-kernels [ARGS=6.1]`.

All packet tests, each with one of its sets of parameters, the other kernel with another; and of
those across namespaces the ones of loading, attaching and netlink.

On each kernel the tests must pass, nothing but what tests/expected_skips.yaml lists may be
skipped (tests/conftest.py sees to that in the guest), and what is listed must really be skipped:
a feature that a kernel turns out to have comes off the list.
"""

import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

import yaml

from shunt.lb.errors import ShuntError
from tests.kernels import guest, images

EXPECTED_SKIPS = Path(__file__).resolve().parents[1] / "expected_skips.yaml"
# Emulated processors are some ten times slower than real ones; this is the limit of one kernel.
TIMEOUT_S = 2700

PACKETS, NETNS = "tests/packets/test_", "tests/netns/test_"
# About numbers of packets, or about the tests themselves: an emulated processor is too slow.
LEFT_OUT = (
    *(
        f"--ignore={PACKETS}{what}.py"
        for what in ("dry", "dry_tc", "floods", "fuzz", "prefixes", "tc_floods")
    ),
    *(
        f"--deselect={PACKETS}{what}"
        for what in (
            "dsr.py::test_outer_source_spreads_flows_and_keeps_each",
            "dsr.py::test_l2_updates_the_header_checksum_for_every_value",
            "dsr.py::test_whole_hash_shows_and_its_top_bits_are_the_slot",
            "flow_keeping.py::test_affinity_switched_off_without_lingering_is_caught",
            "flow_keeping.py::test_defects_of_the_agent_are_caught",
            "flow_keeping.py::test_defects_of_the_program_are_caught",
            "flow_keeping.py::test_flows_are_kept_with_affinity_switched_on_and_off",
            "flow_keeping.py::test_histories_reach_what_they_are_about",
            "flow_table.py::test_two_processors_insert_the_same_flows",
            "hash.py",
            "nat_state.py::test_ports_cannot_be_told_without_the_key",
        )
    ),
)
PYTEST = (
    *("env", "SHUNT_HYPOTHESIS=guest"),
    *("python", "-m", "pytest", "-p", "no:cacheprovider", "--timeout=600"),
    *("--durations=20", "--tb=short", "--junit-xml=/job/results/junit.xml"),
    *LEFT_OUT,
    "tests/packets",
    *(f"{NETNS}{what}.py" for what in ("datapath", "decap", "features", "handover")),
    *(f"{NETNS}{what}.py" for what in ("netdev", "netlink", "nexthops", "sctp", "stale_methods")),
    *(f"{NETNS}{what}.py" for what in ("streams", "streams_options", "streams_races")),
    *(f"{NETNS}{what}.py" for what in ("tc_attach", "trunk")),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the tests went on one kernel."""

    counts: Mapping[str, int]
    complaints: Sequence[str]


def judge(junit: bytes, status: int, lacking: Sequence[str]) -> Verdict:
    """Read pytest's report and exit status; `lacking` are the features this kernel lacks."""
    counts: Counter[str] = Counter()
    skipped: set[str] = set()
    for case in ET.fromstring(junit).iter("testcase"):
        kinds = {child.tag: child for child in case}
        if kinds.keys() & {"failure", "error"}:
            counts["failed"] += 1
        elif "skipped" in kinds:
            counts["skipped"] += 1
            reason = kinds["skipped"].get("message", "")
            skipped.add(reason.partition(":")[0].removeprefix("needs "))
        else:
            counts["passed"] += 1

    complaints = []
    if status:
        complaints.append(f"pytest ended with exit status {status}")
    if not counts["passed"]:
        complaints.append("no test passed")
    complaints += [
        f"{EXPECTED_SKIPS.name} says that it lacks {feature}, but nothing was skipped for that"
        for feature in sorted(set(lacking) - skipped)
    ]
    return Verdict(counts, complaints)


def try_kernel(series: str) -> Verdict:
    """Boot one kernel and run the tests there. What goes wrong is in the verdict."""
    begun = time.monotonic()
    argv = ("env", f"SHUNT_GUEST={list(images.SERIES).index(series)}", *PYTEST)
    try:
        outcome = guest.run_in_guest(
            series, argv, timeout_s=TIMEOUT_S, memory_mib=3072, prefix=f"{series} | "
        )
    except ShuntError as error:
        return Verdict({"failed": 1}, [str(error)])
    took_s = time.monotonic() - begun
    if "junit.xml" not in outcome.files:
        return Verdict({}, [f"pytest left no report; its exit status was {outcome.status}"])
    expected = yaml.safe_load(EXPECTED_SKIPS.read_text())
    verdict = judge(outcome.files["junit.xml"], outcome.status, expected[series])
    print(f"--- kernel {outcome.release}: {_words(verdict.counts)} in {took_s:.0f} s", flush=True)
    return verdict


def _words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{counts.get(kind, 0)} {kind}" for kind in ("passed", "failed", "skipped"))


def main(series: Sequence[str]) -> int:
    totals: Counter[str] = Counter()
    wrong = False
    kernels = list(series or images.SERIES)
    # The tests run on one processor, so the guests don't stand in each other's way.
    with ThreadPoolExecutor(min(len(kernels), os.cpu_count() or 1)) as pool:
        verdicts = list(pool.map(try_kernel, kernels))
    for kernel, verdict in zip(kernels, verdicts, strict=True):
        totals.update(verdict.counts)
        for complaint in verdict.complaints:
            wrong = True
            print(f"--- kernel {kernel}: {complaint}", flush=True)
    print(f"=== kernels {', '.join(kernels)}: {_words(totals)} ===")
    return 1 if wrong or totals["failed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
