# SPDX-License-Identifier: Apache-2.0
"""What a running shuntd says of itself, judged: the backends whose next hop is not resolved.

Pure: everything follows from its status, as `GET /v1/status` answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from shunt.agent.doctor import Finding, Level


def check_resolution(status: Mapping[str, Any]) -> Iterator[Finding]:
    """Backends whose next hop is not in the tables, and what goes slowly for that."""
    slow = int(status["events"].get("FIB_FALLBACK", 0))
    cost = f"{slow} packets have asked the kernel's routes, one by one, for want of a next hop"
    for problem in status["nexthop_problems"]:
        yield Finding(
            Level.WARN,
            f"resolved {problem['address']}",
            f"the next hop of backend {problem['address']} is not resolved: {problem['what']}",
            problem["why"] + (f"; {cost}" if slow else ""),
            problem["fix"],
        )
    if not status["nexthop_problems"]:
        before = f"; before, {cost}" if slow else ""
        yield Finding(Level.OK, "resolved", f"shuntd has every backend's next hop{before}")
