# SPDX-License-Identifier: Apache-2.0
"""What follows from health for a service as a whole: panic, and slow start. Pure.

Both are inputs of a node, as health is: nodes that see the same see the same tables.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

STEPS = 10

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Panic:
    """So few of a service's backends are up that all are treated as up."""

    up: int
    backends: int


def panic(ups: Sequence[bool], threshold: float) -> Panic | None:
    """Whether a service is in panic: fewer than `threshold` of its backends are up.

    Who sends everything to the few that are left makes them fail too; and with none left, every
    connection would be reset, though it may be the checks that are wrong.
    """
    if not ups or sum(ups) >= threshold * len(ups):
        return None
    return Panic(sum(ups), len(ups))


class SlowStarts(Generic[Key]):
    """Backends that came up lately, and how far each is: a share of its weight, in tenths."""

    def __init__(self) -> None:
        self.begun: dict[Key, float] = {}  # when each began
        self._duration: dict[Key, float] = {}

    def begin(self, key: Key, now_s: float, duration_s: float) -> None:
        """It came up; it has all of its weight `duration_s` from then."""
        if duration_s > 0:
            self.begun[key], self._duration[key] = now_s, duration_s

    def forget(self, key: Key) -> None:
        """It has all of its weight, or went down."""
        self.begun.pop(key, None)
        self._duration.pop(key, None)

    def tenths(self, key: Key, now_s: float) -> int:
        """1 to STEPS of its weight."""
        if key not in self.begun:
            return STEPS
        # Timers are a little early at times: a thousandth of a step does not matter.
        steps = (now_s - self.begun[key]) / self._duration[key] * STEPS
        return min(STEPS, 1 + int(steps + 0.001))

    def next_s(self, key: Key, now_s: float) -> float:
        """How long until the next step; for one that is starting."""
        next_at_s = self.begun[key] + self.tenths(key, now_s) * self._duration[key] / STEPS
        return max(0.0, next_at_s - now_s)

    def __contains__(self, key: Key) -> bool:
        return key in self.begun
