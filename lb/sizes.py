# SPDX-License-Identifier: Apache-2.0
"""How large the tables of flows are unless the configuration says: by the machine's memory."""

from __future__ import annotations

from typing import NamedTuple

from shunt.lb.model import Limits

# A machine sold with 32 GB has some 31, of which this is half.
TWICE_FROM_BYTES = 15 * 2**30
MOST_TIMES = 8


class FlowSizes(NamedTuple):
    """In elements, as in Limits."""

    flows: int
    nat: int


def by_memory(memory_bytes: int) -> FlowSizes:
    """Twice as many for each doubling of memory: some 0.2 % of it for the table of flows."""
    times = max(1, min(MOST_TIMES, memory_bytes // TWICE_FROM_BYTES))
    times = 1 << times.bit_length() - 1
    least = Limits()
    return FlowSizes(least.flows * times, least.nat * times)
