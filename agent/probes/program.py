# SPDX-License-Identifier: Apache-2.0
"""Type exec: a program, run without a shell and without privileges.

It has a session of its own, no input, no output, an empty environment but PATH, and the user's
own groups alone. When it ends, or its time is over, whatever it left in its process group is
killed.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor

from shunt.agent.probes.attempt import WELL, Done, Outcome, Target
from shunt.lb.checks import Exec

PATH = "/usr/local/bin:/usr/bin:/bin"
NOT_KILLED = "exec: what it left cannot be ended (CAP_KILL)"
# Starting one waits for the new program to be in place; not on the event loop.
_STARTERS = ThreadPoolExecutor(4, "check-exec")
_DYING: set[subprocess.Popen[bytes]] = set()


class Program:
    """One run."""

    def __init__(self, loop: asyncio.AbstractEventLoop, target: Target, done: Done) -> None:
        how = target.how
        assert isinstance(how, Exec)
        self._loop, self._done = loop, done
        self._name = how.argv[0]
        self._child: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._stopped = False
        argv = how.command(str(target.address), target.port)
        starting = loop.run_in_executor(_STARTERS, start, argv, how.user)
        starting.add_done_callback(self._started)

    def _started(self, starting: asyncio.Future[subprocess.Popen[bytes]]) -> None:
        if starting.cancelled():
            return
        error = starting.exception()
        if error is not None:
            if not self._stopped:
                self._done(_not_started(self._name, error))
            return
        self._child = starting.result()
        self._pidfd = os.pidfd_open(self._child.pid)
        self._loop.add_reader(self._pidfd, self._exited)
        if self._stopped:
            self.stop()

    def _exited(self) -> None:
        child, self._child = self._child, None
        assert child is not None
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        killed = kill_group(child)
        code = child.wait()
        if not killed:
            outcome = Outcome(trouble=NOT_KILLED)
        elif code == 0:
            outcome = WELL
        elif code < 0:
            outcome = Outcome(f"{self._name}: ended by {signal.Signals(-code).name}")
        else:
            outcome = Outcome(f"{self._name}: exit code {code}")
        self._done(outcome)

    def stop(self) -> None:
        self._stopped = True
        child, self._child = self._child, None
        if child is None:
            return
        kill_group(child)
        # Not waited for: what hangs in the kernel (a file server that is away) dies late.
        self._loop.remove_reader(self._pidfd)
        self._loop.add_reader(self._pidfd, _reap, self._loop, child, self._pidfd)
        _DYING.add(child)


def kill_group(child: subprocess.Popen[bytes]) -> bool:
    """Kill a leader that was not yet reaped, and its group: the number is nobody else's yet.

    False if that is not allowed: they run as another user.
    """
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    except PermissionError:
        return False
    return True


def _reap(loop: asyncio.AbstractEventLoop, child: subprocess.Popen[bytes], pidfd: int) -> None:
    loop.remove_reader(pidfd)
    os.close(pidfd)
    child.wait()
    _DYING.discard(child)


def start(argv: list[str], user: str) -> subprocess.Popen[bytes]:
    """Start a program as `user`.

    Raises: OSError, and KeyError if there is no such user. Nothing runs then.
    """
    who = pwd.getpwnam(user)
    return subprocess.Popen(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env={"PATH": PATH},
        start_new_session=True,
        user=who.pw_uid,
        group=who.pw_gid,
        extra_groups=[],
        umask=0o077,
    )


def _not_started(name: str, error: BaseException) -> Outcome:
    # Of what goes wrong before the program is asked for (becoming the user) Python names "/".
    if isinstance(error, FileNotFoundError) and error.filename == name:
        return Outcome(f"{name}: there is no such program")
    if isinstance(error, PermissionError) and error.filename == name:
        return Outcome(f"{name}: the user may not run it")
    if isinstance(error, OSError) and error.errno:
        return Outcome(trouble=os.strerror(error.errno))
    return Outcome(trouble=f"exec: {type(error).__name__} {error}")
