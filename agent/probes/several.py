# SPDX-License-Identifier: Apache-2.0
"""A check that is several at once: well if all are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial

from shunt.agent.probes.attempt import WELL, Attempt, Done, Outcome, Target

Begin = Callable[[asyncio.AbstractEventLoop, Target, Done], Attempt]


class Several:
    """Attempts at these targets; the first that is not well says how it ends."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        targets: Sequence[Target],
        done: Done,
        begin: Begin,
    ) -> None:
        self._done = done
        self._attempts: dict[Target, Attempt] = {}
        self.waiting = dict.fromkeys(targets)  # in their order: those without an answer yet
        for target in targets:
            if not self.waiting:
                break
            attempt = begin(loop, target, partial(self._ended, target))
            if target in self.waiting:
                self._attempts[target] = attempt
            else:
                attempt.stop()

    def _ended(self, target: Target, outcome: Outcome) -> None:
        if target not in self.waiting:
            return
        if outcome != WELL:
            self.stop()
            self._done(outcome)
            return
        del self.waiting[target]
        self._attempts.pop(target, None)
        if not self.waiting:
            self._done(WELL)

    def stop(self) -> None:
        self.waiting.clear()
        while self._attempts:
            self._attempts.popitem()[1].stop()
