# SPDX-License-Identifier: Apache-2.0
"""What a running shuntd says of itself, judged: the backends whose next hop is not resolved, and
whether it reaches the sockets that it translates.

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


def check_closing(status: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether sockets of other network namespaces are closed when their backends go."""
    sockets = status["sockets"]
    closing, check = sockets["closing"], "other namespaces"
    if barred := closing["barred"]:
        yield Finding(Level.WARN, check, barred["what"], barred["why"], barred["fix"])
    elif sockets["scope"] == "all" and closing["by"]:
        what = "shuntd closes their connections to backends that have gone"
        yield Finding(Level.OK, check, what)
