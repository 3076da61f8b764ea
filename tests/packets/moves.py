# SPDX-License-Identifier: Apache-2.0
"""What befalls a service in a random history: its backends come, go, fail and weigh otherwise, the
agent is killed and starts again, the scan runs; and at times nothing changes for a while."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.packets.histories import Lab

MOST = 60  # backends
WEIGHTS = (1, 1, 2, 3, 10, 50)
SPELLS_S = (20, 70, 150)  # below, above, and far above the idle window
SCAN = 0.04  # how likely it is in any second


class Moves:
    """Draws one move after another."""

    def __init__(self, lab: Lab, rnd: random.Random, fresh: Iterator[IPv4Address]) -> None:
        self.lab, self.rnd, self.fresh = lab, rnd, fresh
        self.back_at: dict[IPv4Address, int] = {}
        self.quiet_s = 0
        self.done: Counter[str] = Counter()
        # How likely in any second; whether it could be done.
        self.moves: tuple[tuple[float, Callable[[], bool]], ...] = (
            (0.010, self._add),
            (0.007, self._drain),
            (0.006, self._fail),
            (0.003, self._end),
            (0.004, self._remove),
            (0.003, self._undrain),
            (0.004, self._return),
            (0.008, self._weigh),
            (0.005, self._remove_many),
            (0.006, self._switch_affinity),
            (0.004, self._restart),
        )

    def change(self) -> None:
        """Perhaps the backends change, the agent restarts, or the scan runs."""
        before = self._log2()
        self._recover()
        x = self.rnd.random()
        if self.quiet_s:
            self.quiet_s -= 1
            if x < max(0.2, self.lab.scans):
                self.lab.scan()
        elif x < self.lab.scans:
            self.lab.scan()
        else:
            self._move(self.rnd.random())
        after = self._log2()
        self.done["grown"] += after > before
        self.done["shrunk"] += after < before

    def _log2(self) -> int:
        (place,) = self.lab.tables.placed.values()
        return place.log2

    def _recover(self) -> None:
        for address in [a for a, t in self.back_at.items() if self.lab.now_s >= t]:
            del self.back_at[address]
            self.lab.failing.discard(address)
            self.lab.reconcile()

    def _move(self, x: float) -> None:
        lab, rnd = self.lab, self.rnd
        for chance, move in self.moves:
            if x < chance:
                if move():
                    break
                return
            x -= chance
        else:
            return
        if rnd.random() < 0.2:  # the agent is killed half-way, and starts again
            planned = lab.reconcile(stop_after=rnd.randrange(4))
            lab.restart()
            if planned and rnd.random() < 0.5:
                return  # and has not caught up before the next packet
        lab.reconcile()

    def _taking(self) -> list[IPv4Address]:
        """Who takes new flows, if one of them can be spared."""
        taking = sorted(self.lab.configured - self.lab.drained - self.lab.failing)
        return taking if len(taking) > 2 else []

    def _add(self) -> bool:
        if len(self.lab.configured) >= MOST:
            return False
        self.lab.configured |= {next(self.fresh) for _ in range(self.rnd.choice([1, 1, 3, 20]))}
        return True

    def _drain(self) -> bool:
        if taking := self._taking():
            self.lab.drained.add(self.rnd.choice(taking))
        return bool(taking)

    def _undrain(self) -> bool:
        if drained := sorted(self.lab.drained):
            self.lab.drained.discard(self.rnd.choice(drained))
        return bool(drained)

    def _fail(self) -> bool:
        if taking := self._taking():
            address = self.rnd.choice(taking)
            self.lab.failing.add(address)
            self.back_at[address] = self.lab.now_s + self.rnd.randint(3, 20)
        return bool(taking)

    def _end(self) -> bool:
        """A process ended: there is nothing to lose."""
        if taking := self._taking():
            self._take_out(self.rnd.choice(sorted(self.lab.configured)), self.lab.gone)
        return bool(taking)

    def _remove(self) -> bool:
        """Out of the configuration, alive."""
        if taking := self._taking():
            self._take_out(self.rnd.choice(taking), self.lab.removed)
        return bool(taking)

    def _take_out(self, address: IPv4Address, whereto: set[IPv4Address]) -> None:
        self.lab.configured.discard(address)
        whereto.add(address)

    def _return(self) -> bool:
        """Into the configuration again."""
        if alive := sorted(self.lab.removed - self.lab.gone):
            address = self.rnd.choice(alive)
            self.lab.removed.discard(address)
            self.lab.configured.add(address)
        return bool(alive)

    def _weigh(self) -> bool:
        """Another weight, configured or the operator's."""
        lab, rnd = self.lab, self.rnd
        address, weight = rnd.choice(sorted(lab.configured)), rnd.choice(WEIGHTS)
        weights = rnd.choice([lab.weights, lab.overrides])
        self.done["weighed"] += weights.get(address, 1) != weight
        weights[address] = weight
        return True

    def _remove_many(self) -> bool:
        """Most backends may go at once; then, mostly, nothing happens until the region shrinks."""
        lab, rnd = self.lab, self.rnd
        well = sorted(lab.configured - lab.failing)
        if len(well) <= 6:
            return False
        for address in rnd.sample(well, rnd.randint(3, len(well) - 2)):
            self._take_out(address, lab.gone if rnd.random() < 0.6 else lab.removed)
        if rnd.random() < 0.7:
            self.quiet_s = rnd.choice(SPELLS_S)
        return True

    def _switch_affinity(self) -> bool:
        if self.lab.affinity_s:
            self.lab.affine = not self.lab.affine
        return bool(self.lab.affinity_s)

    def _restart(self) -> bool:
        self.lab.restart()
        return True
