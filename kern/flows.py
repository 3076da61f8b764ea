# SPDX-License-Identifier: Apache-2.0
"""Map flows from the agent's side: read, deleted and inserted beside the programs, without locks.

The table is a hash in an array, `struct flow_line` to a line (bpf/flow_table.h). Everything that
changes it goes through the same code as the programs' (kern/_flows.c).
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shunt.kern import _flows
from shunt.lb.errors import ShuntError

Words = NDArray[np.uint64]
Lines = NDArray[Any]
Index = NDArray[np.uint32]

_BACKEND = np.uint64((1 << _flows.STATE_SHIFT) - 1)
_STATE_SHIFT, _STATE_MASK = np.uint64(_flows.STATE_SHIFT), np.uint64(_flows.STATE_MASK)
_SEEN_SHIFT, _TICK_SHIFT = np.uint64(_flows.SEEN_SHIFT), np.uint64(_flows.TICK_SHIFT)


class State(IntEnum):
    """enum flow_state of bpf/abi.h, of lines that hold a flow."""

    OPENING = _flows.OPENING
    CONFIRMED = _flows.CONFIRMED
    CLOSING = _flows.CLOSING


def lines_for(flows: int) -> int:
    """How many lines the table has for so many flows: three quarters full at most.

    Units: lines of 64 bytes; a power of two.
    """
    return 1 << max(0, -(-flows * 4 // 3) - 1).bit_length()


def capacity(lines: int) -> int:
    """How many flows a table of so many lines is meant for."""
    return lines * 3 // 4


def backends(words: Words) -> NDArray[np.intp]:
    """The backends' ids."""
    return (words & _BACKEND).astype(np.intp)


def states(words: Words) -> NDArray[np.uint64]:
    """enum flow_state."""
    return words >> _STATE_SHIFT & _STATE_MASK


def seen_ns(words: Words) -> NDArray[np.int64]:
    """When the flows were seen last. Units: ns of the monotonic clock, in steps of 67 ms."""
    return (words >> _SEEN_SHIFT << _TICK_SHIFT).astype(np.int64)


def pack(backend: int, state: int, seen_ns: int) -> int:
    """A word from its parts."""
    ticks = seen_ns >> _flows.TICK_SHIFT
    return ticks << _flows.SEEN_SHIFT | state << _flows.STATE_SHIFT | backend


class FlowTable:
    """The table over the map's own memory.

    Shape: `lines` are a power of two of `struct flow_line`.
    """

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._words: Words = lines["word"]

    @property
    def capacity(self) -> int:
        """How many flows it is meant for; a few more find room, or a few fewer."""
        return capacity(len(self._lines))

    def batches(self, lines: int = 1 << 16) -> Iterator[tuple[Index, Lines]]:
        """All flows, from about so many lines at a time; safe while others write.

        Flows that exist throughout are seen; those that come or go meanwhile may be.
        Shape: (index, records): where each stands, and a copy of it.
        """
        for first in range(0, len(self._lines), lines):
            live = states(self._words[first : first + lines]) >= State.OPENING
            index = np.flatnonzero(live) + first
            if not len(index):
                continue
            found = self._lines[index]
            # A record is not copied by one load: again, until its word is the same after it.
            while len(stale := np.flatnonzero(self._words[index] != found["word"])):
                found[stale] = self._lines[index[stale]]
            kept = states(found["word"]) >= State.OPENING
            yield index[kept].astype(np.uint32), found[kept]

    def flows(self) -> Lines:
        """All flows at once. Shape: records of `struct flow_line`."""
        found = [records for _, records in self.batches()]
        return np.concatenate(found, dtype=self._lines.dtype) if found else self._lines[:0].copy()

    def delete(self, index: Index, words: Words) -> NDArray[np.bool_]:
        """Forget flows, by where they stand and the word they had.

        Shape: which of them were deleted. One whose word has changed (it was seen again) stays.
        """
        deleted = np.zeros(len(index), np.bool_)
        index = np.ascontiguousarray(index, np.uint32)
        _flows.delete(self._lines, index, np.ascontiguousarray(words, np.uint64), deleted)
        return deleted

    def insert(self, flows: Lines) -> int:
        """Add flows that are not there; returns how many were added.

        Raises: ShuntError if some found no room. The others are in by then.
        """
        added, refused = _flows.insert(self._lines, np.ascontiguousarray(flows))
        if refused:
            raise ShuntError(
                "map flows is full",
                f"{refused} of {len(flows)} flows find no room; it is meant for {self.capacity}",
                "raise limits.flows in shunt.yaml",
            )
        return added

    def mend(self) -> int:
        """Free the lines that an agent was writing when it was killed; returns how many."""
        return _flows.mend(self._lines)
