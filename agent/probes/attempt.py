# SPDX-License-Identifier: Apache-2.0
"""What one check is to the scheduler, whatever its type."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from shunt.lb.checks import How
from shunt.lb.model import IPAddress

# What these say of a check is about this host, and nothing about the backend: out of files,
# ports or memory, a local firewall, a protocol that is switched off.
OURS = frozenset(
    {
        *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN),
        *(errno.EADDRNOTAVAIL, errno.EADDRINUSE, errno.EPERM, errno.EAFNOSUPPORT),
    }
)


@dataclass(frozen=True, slots=True)
class Way:
    """To a VIP and one backend behind it: its packets' mark, and the address they are from."""

    mark: int
    source: IPAddress


@dataclass(frozen=True, slots=True)
class Target:
    """What to check, how often, and how long to wait for it. `jitter` is a share.

    With `vips` each of these is asked, and must be answered, instead of the address.
    """

    address: IPAddress
    port: int
    interval_s: float = 2.0
    timeout_s: float = 1.0
    jitter: float = 0.0
    how: How = None
    vips: tuple[IPAddress, ...] = ()
    way: Way | None = None  # then the address is a VIP

    @property
    def where(self) -> str:
        """Where it is asked, for people who know which backend it is."""
        return f"{self.address} port {self.port}" if self.way else f"port {self.port}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a check ended: well, if both say nothing. A trouble is this host's own."""

    reason: str = ""
    trouble: str = ""


WELL = Outcome()
Done = Callable[[Outcome], None]


class Attempt(Protocol):
    """A check under way; it calls its `Done` once, and not after `stop`."""

    def stop(self) -> None:
        """End it, and all that it holds."""


def of_error(code: int, target: Target) -> Outcome:
    """The outcome that an errno is; 0 is well."""
    if code in OURS:
        return Outcome(trouble=errno.errorcode[code])
    if code:
        return Outcome(f"{target.where}: {os.strerror(code).lower()}")
    return WELL


class TaskAttempt:
    """A check that is a coroutine: for protocols whose library is made for asyncio.

    The coroutine returns its outcome; an OSError that it raises is one too.
    """

    def __init__(self, target: Target, asking: Coroutine[Any, Any, Outcome], done: Done) -> None:
        self._target, self._done = target, done
        self._task = asyncio.ensure_future(asking)
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Outcome]) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self._done(task.result())
        elif isinstance(error, OSError) and error.errno:
            self._done(of_error(error.errno, self._target))
        else:
            words = str(error) or type(error).__name__
            self._done(Outcome(f"{self._target.where}: {words}"))

    def stop(self) -> None:
        self._task.remove_done_callback(self._ended)
        self._task.cancel()
