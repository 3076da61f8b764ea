# SPDX-License-Identifier: Apache-2.0
"""What sockets should reach, compared with what they did; pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TRANSLATED_CPU, CONNECT_US = 1.02, 10.0
REDIRECTED_RATE, REDIRECTED_CPU = 1.4, 0.7
# So few of a case's messages passed TCP by that the guard has left it to TCP. Then redirection adds
# nothing that it could make good: it must not be slower than translation.
LEFT_TO_TCP = 0.1
# By so much a case may seem slower without being called so.
NOISE = 0.03
# More is better in the first, less in the second.
SPEEDS = (
    *("requests_1_per_s", "requests_32_per_s", "connections_per_s"),
    *("bulk_4k_gbit_per_s", "bulk_64k_gbit_per_s"),
)
DELAYS = ("requests_1_p50_us", "requests_32_p50_us", "connections_p50_us")


@dataclass(frozen=True)
class Outcome:
    """A target, as a line of the report."""

    claim: str
    measured: str
    limit: str
    met: bool


def than(row: Mapping[str, Any], name: str) -> str:
    """What a case of redirection must not be slower than."""
    # Requests on kept connections have no such part: all of them are to be redirected.
    case = re.sub(r"_(gbit_)?per_s$|_p50_us$", "", name)
    return "translated" if row.get(f"{case}_redirected", 1) < LEFT_TO_TCP else "direct"


def speeds(row: Mapping[str, Any]) -> dict[str, float]:
    """How fast a way is, as a part of `than`, in each case that was measured: above 1 is faster."""
    ratio = {name: row[f"of_{than(row, name)}"][name] for name in (*SPEEDS, *DELAYS)}
    return {name: ratio[name] if name in SPEEDS else 1 / ratio[name] for name in ratio}


def outcomes(rows: Sequence[Mapping[str, Any]]) -> list[Outcome]:
    """Of each target the worst over all numbers of services; none of ways that are not there."""
    return [*_of_translated(rows), *_of_redirected(rows)]


def _of_translated(rows: Sequence[Mapping[str, Any]]) -> Iterator[Outcome]:
    here = [row for row in rows if row["way"] == "translated"]
    if not here:
        return
    for kept in (1, 32):
        cpu = max(row["of_direct"][f"requests_{kept}_cpu_us"] for row in here)
        yield _at_most(
            f"translated, {kept} kept: CPU a request, of direct's, at most", cpu, TRANSLATED_CPU
        )
    more = max(row["connect_more_us"] for row in here)
    yield _at_most("translated: connect() takes longer than direct's by, µs", more, CONNECT_US)


def _of_redirected(rows: Sequence[Mapping[str, Any]]) -> Iterator[Outcome]:
    here = [row for row in rows if row["way"] == "redirected"]
    if not here:
        return
    rate = min(row["of_direct"]["requests_32_per_s"] for row in here)
    yield _at_least("redirected, 32 kept: requests a second, of direct's", rate, REDIRECTED_RATE)
    cpu = max(row["of_direct"]["requests_32_cpu_us"] for row in here)
    yield _at_most("redirected, 32 kept: CPU a request, of direct's, at most", cpu, REDIRECTED_CPU)
    for row in here:
        name, slowest = min(speeds(row).items(), key=lambda item: item[1])
        which = f"slowest case ({name}, of {than(row, name)}'s)"
        claim = f"redirected, {row['services']} services: {which}"
        yield _at_least(claim, slowest, 1 - NOISE)


def _at_most(claim: str, measured: float, limit: float) -> Outcome:
    return Outcome(claim, f"{measured:.2f}", f"{limit:.2f}", measured <= limit)


def _at_least(claim: str, measured: float, limit: float) -> Outcome:
    return Outcome(f"{claim}, at least", f"{measured:.2f}", f"{limit:.2f}", measured >= limit)
