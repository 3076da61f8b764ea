# SPDX-License-Identifier: Apache-2.0
"""Is a backend up? Decided from results of health checks; nothing here waits or connects.

Up and down follow `rise` and `fall`. A backend about which nothing is known counts as up, until
`fall` checks in a row have failed: an agent that starts must not empty every service first. One
that restarts passes in what it found in the maps.

*Gone* is more than down. A backend that was removed from the configuration may live on and end
its flows in peace, so a few failed checks say little; failing for a whole idle window says that
no flow of it can matter any more, and that its remembered flows may be deleted.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Generic, TypeVar

# Between two results no more than this counts as failing: while checks could not be made,
# nobody knows how the backend was.
GAP_S = 30.0

Key = TypeVar("Key", bound=Hashable)


class Turn(StrEnum):
    """What became of a backend."""

    UP = "up"
    DOWN = "down"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Rules:
    """How many checks in a row turn a backend, and how long a removed one fails until gone."""

    rise: int = 2
    fall: int = 3
    window_s: float = 8000.0


@dataclass(frozen=True, slots=True)
class Result:
    """Of one check: a latency if it succeeded, a reason if not."""

    ok: bool
    at_s: float
    latency_ms: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class State:
    """What is known of one backend. Times are of the clock that the results' times are of."""

    up: bool = True
    since_s: float = 0.0  # of `up`
    streak: int = 0  # results in a row that speak against `up`
    failing_s: float = 0.0  # time over which nothing but failures came
    removed: bool = False
    gone: bool = False
    checks: int = 0
    failures: int = 0
    last: Result | None = None


@dataclass(frozen=True, slots=True)
class Transition(Generic[Key]):
    """A backend turned; `reason` is of the failure that did it."""

    key: Key
    turn: Turn
    reason: str = ""


def step(state: State, result: Result, rules: Rules) -> tuple[State, Turn | None]:
    """The state after one more result, and what turned with it."""
    against = state.streak + 1 if result.ok != state.up else 0
    failing_s = 0.0
    if not result.ok and state.last is not None and not state.last.ok:
        failing_s = state.failing_s + min(result.at_s - state.last.at_s, GAP_S)
    after = replace(
        state,
        streak=against,
        failing_s=failing_s,
        gone=state.gone and not result.ok,
        checks=state.checks + 1,
        failures=state.failures + (not result.ok),
        last=result,
    )
    turn: Turn | None = None
    if against >= (rules.rise if result.ok else rules.fall):
        after = replace(after, up=result.ok, since_s=result.at_s, streak=0)
        turn = Turn.UP if result.ok else Turn.DOWN
    if after.removed and not after.up and not after.gone and failing_s >= rules.window_s:
        return replace(after, gone=True), Turn.GONE
    return after, turn


class Health(Generic[Key]):
    """The states of all backends that are checked, by whatever key the caller has for one."""

    def __init__(self) -> None:
        self._states: dict[Key, State] = {}
        self._rules: dict[Key, Rules] = {}
        self.down: set[Key] = set()  # those that are not up, removed ones too

    def watch(self, key: Key, rules: Rules, now_s: float, up: bool = True) -> None:
        """Begin with a backend, or change its rules; `up` counts only for one that is new.

        One that had been removed is wanted again: what is known of it stays.
        """
        known = self._states.get(key)
        self._rules[key] = rules
        if known is None and not up:
            self.down.add(key)
        self._states[key] = (
            State(up=up, since_s=now_s)
            if known is None
            else replace(known, removed=False, gone=False)
        )

    def remove(self, key: Key) -> None:
        """It left the configuration, and is watched on until it is gone or forgotten."""
        if key in self._states:
            self._states[key] = replace(self._states[key], removed=True)

    def forget(self, key: Key) -> None:
        """Nobody asks about it any more."""
        self._states.pop(key, None)
        self._rules.pop(key, None)
        self.down.discard(key)

    def result(self, key: Key, result: Result) -> list[Transition[Key]]:
        """Take a result in; what turned. One about a backend that was forgotten turns nothing."""
        state = self._states.get(key)
        if state is None:
            return []
        self._states[key], turn = step(state, result, self._rules[key])
        if turn is Turn.UP:
            self.down.discard(key)
        elif turn is not None:
            self.down.add(key)
        return [] if turn is None else [Transition(key, turn, result.reason)]

    def is_up(self, key: Key) -> bool:
        """True also for a backend that nobody watches: without checks all are up."""
        state = self._states.get(key)
        return state is None or state.up

    def state(self, key: Key) -> State | None:
        return self._states.get(key)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._states)

    def __len__(self) -> int:
        return len(self._states)
