# SPDX-License-Identifier: Apache-2.0
"""Where log records go: to journald with fields, to a terminal as lines for people.

Source: "Native Journal Protocol" of systemd (datagrams of KEY=VALUE), sd-daemon(3) for the
priorities in front of lines, systemd.journal-fields(7).
"""

from __future__ import annotations

import array
import contextlib
import errno
import fcntl
import logging
import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from shunt.agent.events import ATTRIBUTE

SOCKET = Path("/run/systemd/journal/socket")


def priority(level: int) -> int:
    """A level of `logging` as syslog(3) counts."""
    for least, number in (
        (logging.CRITICAL, 2),
        (logging.ERROR, 3),
        (logging.WARNING, 4),
        (logging.INFO, 6),
    ):
        if level >= least:
            return number
    return 7


def encode(fields: Mapping[str, str]) -> bytes:
    """One datagram. A value of several lines goes with its length in front (64 bits, little)."""
    out = bytearray()
    for name, value in fields.items():
        raw = value.encode(errors="surrogateescape")
        if b"\n" in raw:
            out += name.encode() + b"\n" + len(raw).to_bytes(8, "little") + raw + b"\n"
        else:
            out += name.encode() + b"=" + raw + b"\n"
    return bytes(out)


class JournalHandler(logging.Handler):
    """Sends records to journald. While it does not take them, lines go to standard error."""

    def __init__(self, path: Path = SOCKET) -> None:
        super().__init__()
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        # The event loop must not wait for a journal that is full.
        self._socket.setblocking(False)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            message = self.format(record)
            fields = {
                "MESSAGE": message,
                "PRIORITY": str(priority(record.levelno)),
                "SYSLOG_IDENTIFIER": "shuntd",
                "CODE_FILE": record.pathname,
                "CODE_LINE": str(record.lineno),
                "CODE_FUNC": record.funcName or "",
                **getattr(record, ATTRIBUTE, {}),
            }
            try:
                self._send(encode(fields))
            except OSError:
                sys.stderr.write(prefixed(message, record.levelno))
        except Exception:  # noqa: BLE001 - a log call must never raise (logging.Handler)
            self.handleError(record)

    def _send(self, data: bytes) -> None:
        try:
            self._socket.sendto(data, os.fspath(self.path))
        except OSError as e:
            if e.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            self._send_file(data)

    def _send_file(self, data: bytes) -> None:
        """What is too large for a datagram goes as a sealed file."""
        fd = os.memfd_create("shunt-journal", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        try:
            with open(fd, "wb", closefd=False) as file:
                file.write(data)
            seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
            self._socket.sendmsg([], rights, 0, os.fspath(self.path))
        finally:
            os.close(fd)

    def close(self) -> None:
        self._socket.close()
        super().close()


def prefixed(message: str, level: int) -> str:
    """A message as lines of standard error that systemd reads a priority from."""
    mark = f"<{priority(level)}>"
    return "".join(f"{mark}{line}\n" for line in message.splitlines() or [""])


def to_journal() -> bool:
    """Whether standard error is the journal's (systemd.exec(5), $JOURNAL_STREAM)."""
    with contextlib.suppress(OSError, ValueError):
        device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
        found = os.fstat(sys.stderr.fileno())
        return (found.st_dev, found.st_ino) == (int(device), int(inode)) and SOCKET.is_socket()
    return False


def log_to(level: int) -> None:
    """Set up logging of this process: the journal under systemd, else standard error."""
    handler: logging.Handler
    if to_journal():
        handler = JournalHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    logging.getLogger("asyncio").setLevel(logging.WARNING)
