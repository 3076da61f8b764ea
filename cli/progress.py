# SPDX-License-Identifier: Apache-2.0
"""What takes longer than a second says so, on a terminal; elsewhere nothing is printed."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

AFTER_S = 1.0
_running = threading.Lock()


@contextlib.contextmanager
def progress(doing: str) -> Iterator[Callable[[str], None]]:
    """Show `doing` on standard error once it has taken a second; what it gives changes the words.

    Within another one nothing is shown: rich has one live display at a time.
    """
    if not sys.stderr.isatty() or not _running.acquire(blocking=False):
        yield lambda _: None
        return
    shown = _Shown(doing)
    timer = threading.Timer(AFTER_S, shown.begin)
    timer.daemon = True
    timer.start()
    try:
        yield shown.say
    finally:
        timer.cancel()
        shown.end()
        _running.release()


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """For who draws on the terminal itself: nothing else shows what it waits for."""
    with _running:
        yield


class _Shown:
    def __init__(self, words: str) -> None:
        self._words, self._ended = words, False
        self._status: Any = None
        self._lock = threading.Lock()

    def begin(self) -> None:
        from rich.console import Console

        with self._lock:
            if not self._ended:
                self._status = Console(stderr=True).status(f"{self._words} ...")
                self._status.start()

    def say(self, words: str) -> None:
        with self._lock:
            self._words = words
            if self._status is not None:
                self._status.update(f"{words} ...")

    def end(self) -> None:
        with self._lock:
            self._ended = True
            if self._status is not None:
                self._status.stop()
