# SPDX-License-Identifier: Apache-2.0
"""Type tcp: a connection. One that comes about is reset at once, so that neither side keeps a
TIME_WAIT.

Callbacks on raw sockets rather than a task for each check: at 5,000 targets every two seconds
that is most of the cost.
"""

from __future__ import annotations

import asyncio
import errno
import socket

from shunt.agent.probes.attempt import Done, Target, of_error
from shunt.agent.probes.sockets import open_socket


class Connection:
    """One connection."""

    __slots__ = ("_done", "_loop", "_socket", "_target")

    def __init__(self, loop: asyncio.AbstractEventLoop, target: Target, done: Done) -> None:
        self._loop, self._target, self._done = loop, target, done
        self._socket: socket.socket | None = None
        try:
            self._socket = open_socket(target, socket.SOCK_STREAM)
            code = self._socket.connect_ex((str(target.address), target.port))
        except OSError as error:
            code = error.errno or errno.EIO
        if code == errno.EINPROGRESS and self._socket is not None:
            loop.add_writer(self._socket, self._connected)
        else:
            self._finish(code)

    def _connected(self) -> None:
        if self._socket is not None:
            self._finish(self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))

    def _finish(self, code: int) -> None:
        self.stop()
        self._done(of_error(code, self._target))

    def stop(self) -> None:
        if self._socket is not None:
            self._loop.remove_writer(self._socket)
            self._socket.close()
            self._socket = None
