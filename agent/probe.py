# SPDX-License-Identifier: Apache-2.0
"""Health checks: a TCP connection to each target, again and again.

Callbacks on raw sockets rather than a task for each check: at 5,000 targets every two seconds
that is most of the cost. A connection that comes about is reset at once, so that neither side
keeps a TIME_WAIT.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
import zlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from shunt.lb.health import Result
from shunt.lb.model import IPAddress

Key = TypeVar("Key", bound=Hashable)

# What these say of a check is about this host, and nothing about the backend: out of files,
# ports or memory, a local firewall, a protocol that is switched off.
OURS = frozenset(
    {
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN),
        *(errno.EADDRNOTAVAIL, errno.EADDRINUSE, errno.EPERM, errno.EAFNOSUPPORT),
    }
)
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}


@dataclass(frozen=True, slots=True)
class Target:
    """What to connect to, how often, and how long to wait for it."""

    address: IPAddress
    port: int
    interval_s: float = 2.0
    timeout_s: float = 1.0

    def phase_s(self) -> float:
        """When in the interval its turn is: of the target alone, so that many spread evenly."""
        key = self.address.packed + self.port.to_bytes(2, "big")
        return zlib.crc32(key) / 2**32 * self.interval_s


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


class Prober(Generic[Key]):
    """Checks the targets it is given, on the running event loop.

    `report` is called with a target's key and each result. A check that this host could not make
    gives no result: it is counted in `counts.troubles`.
    """

    def __init__(self, report: Callable[[Key, Result], None]) -> None:
        self._report = report
        self._loop = asyncio.get_running_loop()
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
                self._series[key] = _Series(self._loop, key, target, self.counts, self._report)

    def __len__(self) -> int:
        return len(self._series)

    def close(self) -> None:
        self.set_targets({})


class _Series(Generic[Key]):
    """The checks of one target, one at a time."""

    __slots__ = (
        "_began", "_counts", "_due", "_key", "_loop", "_report", "_socket", "_timeout", "_turn",
        "target",
    )  # fmt: skip

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        key: Key,
        target: Target,
        counts: Counts,
        report: Callable[[Key, Result], None],
    ) -> None:
        self.target = target
        self._loop, self._key, self._counts, self._report = loop, key, counts, report
        self._socket: socket.socket | None = None
        self._timeout: asyncio.TimerHandle | None = None
        self._began = 0.0
        now = loop.time()
        self._due = now + (target.phase_s() - now) % target.interval_s
        self._turn = loop.call_at(self._due, self._begin)

    def stop(self) -> None:
        self._turn.cancel()
        self._end_connection()

    def _begin(self) -> None:
        now = self._loop.time()
        late = now - self._due
        self._counts.checks += 1
        self._counts.late_s_sum += late
        self._counts.late_s_max = max(self._counts.late_s_max, late)
        # From its turn, not from now: lateness does not add up, and the spread stays.
        missed = int(late / self.target.interval_s)
        self._counts.skipped += missed
        self._due += (missed + 1) * self.target.interval_s
        self._turn = self._loop.call_at(self._due, self._begin)
        self._end_connection()
        self._began = now
        try:
            code = self._connect()
        except OSError as error:
            code = error.errno or errno.EIO
        if code == errno.EINPROGRESS and self._socket is not None:
            self._loop.add_writer(self._socket, self._connected)
            wait_s = min(self.target.timeout_s, self.target.interval_s * 0.9)
            self._timeout = self._loop.call_later(wait_s, self._timed_out)
        else:
            self._finish(code)

    def _connect(self) -> int:
        family = _FAMILIES[self.target.address.version]
        self._socket = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        return self._socket.connect_ex((str(self.target.address), self.target.port))

    def _connected(self) -> None:
        if self._socket is not None:
            self._finish(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _timed_out(self) -> None:
        self._finish(errno.ETIMEDOUT)

    def _finish(self, code: int) -> None:
        now = self._loop.time()
        self._end_connection()
        if code in OURS:
            self._counts.troubles[errno.errorcode[code]] += 1
            return
        if code == 0:
            result = Result(ok=True, at_s=now, latency_ms=(now - self._began) * 1000)
        else:
            self._counts.failures += 1
            result = Result(ok=False, at_s=now, reason=self._reason(code))
        self._report(self._key, result)

    def _reason(self, code: int) -> str:
        where = f"port {self.target.port}"
        if code == errno.ETIMEDOUT:
            return f"{where}: no answer within {self.target.timeout_s:g} s"
        return f"{where}: {os.strerror(code).lower()}"

    def _end_connection(self) -> None:
        if self._timeout is not None:
            self._timeout.cancel()
            self._timeout = None
        if self._socket is not None:
            self._loop.remove_writer(self._socket)
            self._socket.close()
            self._socket = None
