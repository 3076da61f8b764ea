# SPDX-License-Identifier: Apache-2.0
"""What random packets are sent through: a loaded program with everything that it may meet.

A target knows its hooks, frames to begin with, and what of a packet must be true:

- it leaves by one counted reason, and the verdict is of the reason's class;
- what is sent goes to a backend of the service that it was sent to, as that service's mode has it,
  or back to its sender; a reply to a client whose packet came before;
- what is passed on stays as it was, but for what a reason says.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from ctypes import c_int32
from typing import Any

import numpy as np

from shunt.kern.testrun import Runs
from tests.fuzz.headers import IPV4, IPV6, Headers, read

LONGEST = 1600
# The kernel runs no program of TC for less. By ethertype; of others, a byte.
WHOLE = {IPV4: 14 + 20, IPV6: 14 + 40}
Step = tuple[int, bytes]  # which hook, and a frame

# What became of a frame, as far as it can be told without the counters.
PASSED, CHANGED, SENT, DROPPED = "passed", "passed on changed", "sent", "dropped"


class Broken(AssertionError):
    """A packet was treated as none may be; the frame is in the message."""


class Target(ABC):
    """`programs` are file descriptors by hook, `counters` what the reasons are counted in."""

    hooks: tuple[str, ...]
    kinds: tuple[dict[int, str], ...]  # of verdicts, by hook
    at_tc: frozenset[int] = frozenset()  # hooks

    def __init__(self, programs: Sequence[int], counters: Any, reasons: Any) -> None:
        self.runs = [Runs(fd, LONGEST) for fd in programs]
        self.counters, self.reasons = counters, reasons
        self.before = self.counts()

    @abstractmethod
    def seeds(self) -> Iterable[Step]:
        """Whole frames of every kind that it tells apart."""

    @abstractmethod
    def astray(self, hook: int, what: str, frame: bytes, was: Headers, now: Headers) -> str:
        """Why what became of the frame (`now`, in `self.out`) may not leave; empty if it may."""

    @abstractmethod
    def miscounted(self, became: Counter[str], change: Any) -> str:
        """How the counters' change contradicts what became of some frames; empty if not."""

    @abstractmethod
    def back(self, hook: int, what: str) -> int:
        """At which hook it arrives, what its receiver says to what left by this one."""

    @abstractmethod
    def check_tables(self) -> None:
        """Raises: Broken if what it remembers contradicts itself."""

    @abstractmethod
    def advance(self, rnd: random.Random) -> None:
        """Time passes."""

    @abstractmethod
    def reset(self) -> None:
        """As it was before the first packet."""

    @abstractmethod
    def close(self) -> None:
        """Unload."""

    def counts(self) -> Any:
        """By reason."""
        return self.counters.totals()["packets"].astype(np.int64)

    def send(self, steps: Sequence[Step]) -> tuple[set[int], list[tuple[int, str, bytes]]]:
        """Packets, checked. Shape: (reasons they came to, (hook, what, frame) that left).

        Raises: Broken.
        """
        became, left = Counter[str](), []
        for hook, frame in steps:
            what = self._run(hook, frame)
            became[what] += 1
            if what in {SENT, CHANGED}:
                left.append((hook, what, self.out))
        now = self.counts()
        change, self.before = now - self.before, now
        if said := self.miscounted(became, change):
            raise Broken(f"{said}: {self.told(steps)}")
        return set(np.flatnonzero(change).tolist()), left

    def _run(self, hook: int, frame: bytes) -> str:
        runs = self.runs[hook]
        verdict = c_int32(runs.run(frame)).value
        self.out = runs.data
        what = self.kinds[hook].get(verdict, f"verdict {verdict}")
        if what == PASSED and not self.is_as_before(frame):
            what = CHANGED
        was = read(frame)
        if was and what != PASSED:
            self.note(hook, was)
        if what in {SENT, CHANGED}:
            now = read(self.out)
            if not was or not now:
                said = "what is no IP"
            elif not (said := self.astray(hook, what, frame, was, now)):
                return what
            raise Broken(f"{what}, {said}: {self.told([(hook, frame)])} became {self.out.hex()}")
        return what

    def note(self, hook: int, was: Headers) -> None:  # noqa: B027 - not every one has a use for it
        """A frame that was not passed on as it was."""

    def is_as_before(self, frame: bytes) -> bool:
        """Whether nothing was done to it."""
        return self.out == frame

    def told(self, steps: Sequence[Step]) -> str:
        """Packets in a message, as in a file of corpus/."""
        return ", ".join(f"{self.hooks[hook]} {frame.hex()}" for hook, frame in steps)

    def runnable(self, step: Step) -> Step:
        """As long as it has to be."""
        hook, frame = step
        whole = WHOLE.get(frame[12:14], 15) if hook in self.at_tc else 14
        return hook, frame.ljust(whole, b"\0")

    def count_of(self, change: Any, prefix: str) -> int:
        """How often the reasons of a class were counted."""
        return sum(
            int(change[r]) for n, r in self.reasons.__members__.items() if n.startswith(prefix)
        )
