# SPDX-License-Identifier: Apache-2.0
"""Waiting for the programs that run."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from shunt.kern import rcu
from shunt.kern.objects import Object
from shunt.kern.testrun import run_xdp

LONG_RUN = Path(__file__).resolve().parent / "long_run.bpf.o"


def runs_on_after(wait: Callable[[], None]) -> bool:
    """Whether a program that runs as `wait` is called still does when it returns.

    It runs on a processor of its own, from which nobody can take it.
    """
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    here, there, *_ = sorted(os.sched_getaffinity(0))
    with Object(LONG_RUN) as obj:
        obj.load()
        running = obj.variable(".bss", "running")
        obj.variable(".bss", "turns")[...] = 8000

        def run() -> None:
            os.sched_setaffinity(0, {there})  # of this thread alone
            run_xdp(obj.programs["shunt_long_run"].fd, bytes(64))

        thread = threading.Thread(target=run)
        os.sched_setaffinity(0, {here})
        try:
            thread.start()
            while not running and thread.is_alive():
                time.sleep(0.0001)
            wait()
            goes_on = bool(running)
        finally:
            thread.join()
            os.sched_setaffinity(0, allowed)
    return goes_on


def test_programs_that_ran_have_ended_after_a_wait() -> None:
    assert not runs_on_after(rcu.synchronize)


def test_that_one_runs_on_is_seen() -> None:
    """What the test above rests on: the program runs for longer than it takes to look."""
    assert any(runs_on_after(lambda: None) for _ in range(10))
