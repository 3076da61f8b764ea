# SPDX-License-Identifier: Apache-2.0
"""How late health checks begin, and by whose doing: of who checks, or of who had the processor."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from shunt.agent.probes.schedule import Prober


class Punctuality:
    """Of a prober's checks, from now on. Its `trouble` is taken: it is asked as a check begins.

    The turns are gone through as a queue, twice. `alone` is when a check had begun if this thread
    had had a processor whenever it wanted one: after its turn, and after the work until then.
    `explained` is the same with the time that the thread waited for a processor. What a check was
    later than that, it was neither for work nor for want of a processor: something slept.
    """

    def __init__(self, prober: Prober[str], schedstat: int) -> None:
        self.counts, self._schedstat = prober.counts, schedstat
        self._then, prober.trouble = prober.trouble, self._asked
        self.own_s = self.others_s = 0.0  # at the worst
        self._alone = self._explained = time.monotonic()
        self._worked_s, self._waited_s = self._used()
        self._checks, self._late_s_sum = self.counts.checks, self.counts.late_s_sum

    def fine(self, at_most_s: float) -> bool:
        """Whether none began later than that by own doing, and no turn was left out by it."""
        return self.own_s < at_most_s and (not self.counts.skipped or self.others_s >= at_most_s)

    def __repr__(self) -> str:
        skipped = self.counts.skipped
        return f"late {self.own_s:.3f} s, {self.others_s:.3f} s by others; {skipped=}"

    def _used(self) -> tuple[float, float]:
        """What this thread has had of processors, and has waited for one."""
        waited_ns = int(os.pread(self._schedstat, 100, 0).split()[1])
        return time.thread_time(), waited_ns / 1e9

    def _asked(self, key: str) -> str:
        counts = self.counts
        if counts.checks > self._checks:  # it has not failed: it begins
            self._begins(time.monotonic(), counts.late_s_sum - self._late_s_sum)
            self._checks, self._late_s_sum = counts.checks, counts.late_s_sum
        return self._then(key)

    def _begins(self, now: float, late_s: float) -> None:
        due, (worked_s, waited_s) = now - late_s, self._used()
        work_s, wait_s = worked_s - self._worked_s, waited_s - self._waited_s
        self._worked_s, self._waited_s = worked_s, waited_s
        self._alone = max(due, self._alone + work_s)
        self._explained = max(due, self._explained + work_s + wait_s)
        slept_s = max(0.0, now - self._explained)
        self.own_s = max(self.own_s, self._alone - due + slept_s)
        self.others_s = max(self.others_s, self._explained - self._alone)


@contextmanager
def judged(prober: Prober[str]) -> Iterator[Punctuality]:
    """Of a prober that runs in this thread, and has no targets yet."""
    schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
    try:
        yield Punctuality(prober, schedstat)
    finally:
        os.close(schedstat)
