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
        self._begun: dict[Key, tuple[float, float]] = {}

    def begin(self, key: Key, now_s: float, duration_s: float) -> None:
        """It came up; it has all of its weight `duration_s` from now."""
        if duration_s > 0:
            self._begun[key] = now_s, duration_s

    def forget(self, key: Key) -> None:
        """It has all of its weight, or went down."""
        self._begun.pop(key, None)

    def tenths(self, key: Key, now_s: float) -> int:
        """1 to STEPS of its weight."""
        if key not in self._begun:
            return STEPS
        began_s, duration_s = self._begun[key]
        # Timers are a little early at times: a thousandth of a step does not matter.
        return min(STEPS, 1 + int((now_s - began_s) / duration_s * STEPS + 0.001))

    def step_s(self, key: Key) -> float:
        """How long a step takes; 0 for one that is not starting."""
        return self._begun[key][1] / STEPS if key in self._begun else 0.0

    def __contains__(self, key: Key) -> bool:
        return key in self._begun
