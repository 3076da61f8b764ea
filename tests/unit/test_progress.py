# SPDX-License-Identifier: Apache-2.0
"""What takes long says so on a terminal, and nowhere else."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import time
from shunt.cli import progress
progress.AFTER_S = {after}
with progress.progress("waiting for the kettle") as say, progress.progress("nested"):
    say("pouring")
    deadline = time.monotonic() + 30
    while {wait} and time.monotonic() < deadline:
        time.sleep(0.05)
print("tea")
"""
SHOWN = "say.__self__._status is None"


def on_a_terminal(after_s: float, wait: str) -> tuple[str, str]:
    """What it writes to standard output, and to the terminal that is its standard error."""
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", CODE.format(after=after_s, wait=wait)],
            env={**os.environ, "PYTHONPATH": f"{ROOT}/build/py", "TERM": "xterm"},
            stdout=subprocess.PIPE,
            stderr=theirs,
            text=True,
            timeout=60,
            check=True,
        )
        os.close(theirs)
        theirs = -1
        shown = b""
        try:
            while some := os.read(ours, 4096):
                shown += some
        except OSError:  # EIO: nobody has the other end any more
            pass
        return done.stdout, shown.decode()
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)


def test_it_is_shown_once_it_takes_long() -> None:
    out, terminal = on_a_terminal(0.0, SHOWN)
    assert out == "tea\n"
    assert "pouring ..." in terminal
    assert "nested" not in terminal


def test_what_is_quick_shows_nothing() -> None:
    assert on_a_terminal(60.0, "False") == ("tea\n", "")


@pytest.mark.parametrize("after_s", [0.0, 60.0])
def test_without_a_terminal_nothing_is_shown(after_s: float) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(after=after_s, wait="False")],
        env={**os.environ, "PYTHONPATH": f"{ROOT}/build/py"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("tea\n", "")
