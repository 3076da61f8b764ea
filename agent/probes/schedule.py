# SPDX-License-Identifier: Apache-2.0
"""When each target is checked: again and again, spread over the interval, one check at a time."""

from __future__ import annotations

import asyncio
import random
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from shunt.agent.probes import datagram, grpc, http
from shunt.agent.probes.attempt import Attempt, Outcome, Target
from shunt.agent.probes.program import Program
from shunt.agent.probes.several import Begin, Several
from shunt.agent.probes.tcp import Connection
from shunt.lb.checks import Dns, Exec, Grpc, Http, Udp
from shunt.lb.health import Result

Key = TypeVar("Key", bound=Hashable)
# The targets that a target with VIPs stands for now; or what on this host is in the way.
Ways = Callable[[Key, Target], Sequence[Target] | str]

TYPES: Mapping[type, Begin] = {
    type(None): Connection,
    Http: http.request,
    Grpc: grpc.call,
    Dns: datagram.query,
    Udp: datagram.udp,
    Exec: Program,
}
# A check that ends at the turn of the next would have no end.
SHARE = 0.9
# A timeout that comes so late says that this process was held up.
HELD_UP_S = 0.02
# So often it is put off then: each time the event loop passes once, and an attempt takes a step
# (connect, TLS, request, answer). A silent target fails after them, however busy this host is.
PUT_OFF_AT_MOST = 6


def phase_s(target: Target) -> float:
    """When in the interval its turn is: of the target alone, so that many spread evenly."""
    key = target.address.packed + target.port.to_bytes(2, "big")
    return zlib.crc32(key) / 2**32 * target.interval_s


@dataclass(slots=True)
class Counts:
    """Of all checks since the start. Lateness is the event loop's: how much after its turn a
    check began."""

    checks: int = 0
    failures: int = 0
    troubles: Counter[str] = field(default_factory=Counter)  # ours, by errno's name
    skipped: int = 0  # turns that went by while the loop was held up
    late_s_sum: float = 0.0
    late_s_max: float = 0.0

    @property
    def late_s_mean(self) -> float:
        return self.late_s_sum / self.checks if self.checks else 0.0


def nothing(_key: object) -> str:
    """No trouble."""
    return ""


def no_way(_key: object, _target: Target) -> str:
    """Where there are no VIPs."""
    return "no-vip"


class Prober(Generic[Key]):
    """Checks the targets it is given, on the running event loop.

    `report` is called with a target's key and each result. A check that this host could not make
    gives no result: it is counted in `counts.troubles`. So does one for which `trouble` names
    something, asked before a check and after one that failed: it says what on this host stands
    between it and the target. `ways` is asked for targets with VIPs.
    """

    def __init__(
        self,
        report: Callable[[Key, Result], None],
        trouble: Callable[[Key], str] = nothing,
        ways: Ways[Key] = no_way,
    ) -> None:
        self.report, self.trouble, self.ways = report, trouble, ways
        self.loop = asyncio.get_running_loop()
        self._series: dict[Key, _Series[Key]] = {}
        self.counts = Counts()

    def set_targets(self, targets: Mapping[Key, Target]) -> None:
        """Check these from now on and no others; whose target stays the same keeps its turn."""
        self.change(targets, [key for key in self._series if key not in targets])

    def change(self, targets: Mapping[Key, Target], gone: Iterable[Key]) -> None:
        """Check these too, or otherwise than before, and those no longer."""
        for key in gone:
            if key in self._series:
                self._series.pop(key).stop()
        for key, target in targets.items():
            known = self._series.get(key)
            if known is not None and known.target != target:
                known.stop()
            if known is None or known.target != target:
                self._series[key] = _Series(self, key, target)

    def __len__(self) -> int:
        return len(self._series)

    def close(self) -> None:
        self.set_targets({})


class _Series(Generic[Key]):
    """The checks of one target, one at a time."""

    __slots__ = (
        "_asked", "_attempt", "_base", "_began", "_deadline", "_due", "_key", "_number",
        "_prober", "_put_off", "_timeout", "_turn", "target",
    )  # fmt: skip

    def __init__(self, prober: Prober[Key], key: Key, target: Target) -> None:
        self.target = target
        self._prober, self._key = prober, key
        self._attempt: Attempt | None = None
        self._asked: Sequence[Target] = ()
        self._timeout: asyncio.TimerHandle | None = None
        self._began = 0.0
        self._put_off = 0
        self._number = 0  # of the attempt: what an earlier one says comes too late
        now = prober.loop.time()
        self._base = now + (phase_s(target) - now) % target.interval_s
        self._plan_turn()

    def stop(self) -> None:
        self._turn.cancel()
        self._end_attempt()

    def _plan_turn(self) -> None:
        jitter_s = self.target.jitter * self.target.interval_s
        self._due = self._base + (random.uniform(0, jitter_s) if jitter_s else 0.0)
        self._turn = self._prober.loop.call_at(self._due, self._begin)

    def _begin(self) -> None:
        prober, target = self._prober, self.target
        counts, now = prober.counts, prober.loop.time()
        late = now - self._due
        # From its turn, not from now: lateness does not add up, and the spread stays.
        missed = int(max(0.0, now - self._base) / target.interval_s)
        counts.skipped += missed
        self._base += (missed + 1) * target.interval_s
        self._plan_turn()
        if self._timeout is not None:
            # Its time was put off past this turn. A loop so busy would end each attempt before
            # its last step, and the target would never have a result.
            counts.skipped += 1
            return
        counts.checks += 1
        counts.late_s_sum += late
        counts.late_s_max = max(counts.late_s_max, late)
        trouble = prober.trouble(self._key)
        targets: Sequence[Target] | str = (target,)
        if target.vips and not trouble:
            targets = prober.ways(self._key, target)
        if trouble or isinstance(targets, str):
            counts.troubles[trouble or str(targets)] += 1
            return
        self._began = now
        self._put_off = 0
        number = self._number
        self._wait(min(target.timeout_s, target.interval_s * (1 - target.jitter) * SHARE))
        begin = TYPES[type(target.how)]

        def done(outcome: Outcome) -> None:
            self._ended(number, outcome)

        self._asked = targets
        attempt: Attempt = (
            begin(prober.loop, targets[0], done)
            if len(targets) == 1
            else Several(prober.loop, targets, done, begin)
        )
        if number == self._number:
            self._attempt = attempt

    def _wait(self, wait_s: float) -> None:
        loop = self._prober.loop
        self._deadline = loop.time() + wait_s
        self._timeout = loop.call_at(self._deadline, self._timed_out)

    def _timed_out(self) -> None:
        late = self._prober.loop.time() - self._deadline
        if late > HELD_UP_S and self._put_off < PUT_OFF_AT_MOST:
            # An answer may be there, unread: the loop's delay is not the backend's.
            self._put_off += 1
            self._wait(min(late, self.target.timeout_s))
        elif isinstance(self.target.how, Exec):
            name = self.target.how.argv[0]
            self._finish(Outcome(f"{name}: no end within {self.target.timeout_s:g} s"))
        else:
            attempt = self._attempt
            waiting = attempt.waiting if isinstance(attempt, Several) else self._asked
            where = ", ".join(target.where for target in waiting)
            self._finish(Outcome(f"{where}: no answer within {self.target.timeout_s:g} s"))

    def _ended(self, number: int, outcome: Outcome) -> None:
        if number == self._number:
            self._finish(outcome)

    def _finish(self, outcome: Outcome) -> None:
        prober, now = self._prober, self._prober.loop.time()
        self._end_attempt()
        trouble = outcome.trouble or (outcome.reason and prober.trouble(self._key))
        if trouble:
            prober.counts.troubles[trouble] += 1
            return
        if outcome.reason:
            prober.counts.failures += 1
            result = Result(ok=False, at_s=now, reason=outcome.reason)
        else:
            result = Result(ok=True, at_s=now, latency_ms=(now - self._began) * 1000)
        prober.report(self._key, result)

    def _end_attempt(self) -> None:
        self._number += 1
        if self._timeout is not None:
            self._timeout.cancel()
            self._timeout = None
        if self._attempt is not None:
            self._attempt.stop()
            self._attempt = None
