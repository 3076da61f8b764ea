# SPDX-License-Identifier: Apache-2.0
"""Health checks by programs of the user's."""

import asyncio
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shunt.agent.probes.attempt import Target
from shunt.lb.checks import Exec
from tests.netns.test_probe import probing
from tests.netns.test_probe_types import LOOPBACK, READY_S, ask


def shell(text: str, user: str = "nobody") -> Exec:
    return Exec(("/bin/sh", "-c", text), user)


def running(argument: str) -> bool:
    """Whether a process has this argument."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if argument.encode() in words:
                return True
    return False


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (Exec(("/bin/true",)), ""),
        (Exec(("/bin/false",)), "/bin/false: exit code 1"),
        (Exec(("/no/such",)), "/no/such: there is no such program"),
        (Exec(("/etc/passwd",)), "/etc/passwd: the user may not run it"),
        (Exec(("/usr/bin/test", "{address}:{port}", "=", "127.0.0.1:80")), ""),
        # No shell reads the arguments.
        (Exec(("/usr/bin/test", "$(id)", "=", "127.0.0.1")), "/usr/bin/test: exit code 1"),
        (shell('test "$(id -u) $(id -G)" = "65534 65534"'), ""),
        (shell("test ! -r /etc/shadow && test ! -w /"), ""),
        (shell('test "$(id -un)" = www-data', "www-data"), ""),
        (shell('test "$(grep CapEff /proc/self/status)" = "CapEff:\t0000000000000000"'), ""),
        (shell('test "$PWD" = / && ! read line'), ""),
        (shell('test "$(readlink /proc/$$/fd/1)" = /dev/null'), ""),
        (shell('test -z "$HOME$USER$LANG"'), ""),
        (shell("kill -9 $$"), "/bin/sh: ended by SIGKILL"),
    ],
)
def test_exec(how: Exec, reason: str) -> None:
    assert ask(how, 80).reason == reason


def test_a_program_over_its_time_is_killed_with_its_children() -> None:
    argument = f"9{os.getpid()}"
    result = ask(shell(f"sleep {argument} & sleep {argument}"), 80, 1.0, unanswered=True)
    assert result.reason == "/bin/sh: no end within 1 s"
    until(lambda: not running(argument))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + READY_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_a_program_leaves_behind_is_killed() -> None:
    seen, left = f"7{os.getpid()}", f"8{os.getpid()}"
    with subprocess.Popen(["sleep", seen]) as other:
        until(lambda: running(seen))  # so it would be seen
        other.kill()
    assert ask(shell(f"sleep {left} & exit 0"), 80).ok
    until(lambda: not running(left))


def test_a_user_that_has_gone_is_our_trouble() -> None:
    async def scenario() -> None:
        target = Target(LOOPBACK, 80, 0.1, 0.09, 0.0, Exec(("/bin/true",), "no-such"))
        async with probing({"a": target}) as (prober, results):
            await results.until(lambda: bool(prober.counts.troubles))
            assert not results["a"]
            assert prober.counts.failures == 0

    asyncio.run(scenario())
