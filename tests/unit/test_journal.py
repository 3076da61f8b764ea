# SPDX-License-Identifier: Apache-2.0
"""Records on their way to journald and systemd, received on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from shunt.agent import events, service_manager
from shunt.agent.events import Event, about
from shunt.agent.journal import JournalHandler, encode, prefixed, priority
from shunt.lb.compile import Endpoint
from shunt.lb.health import Turn


def decode(data: bytes) -> dict[str, str]:
    """What journald reads out of a datagram."""
    found = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(rest[:8], "little")
            value, rest = rest[8 : 8 + size], rest[8 + size + 1 :]
        found[name.decode()], data = value.decode(), rest
    return found


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "socket"))
        sock.settimeout(5)
        yield sock


@pytest.fixture
def log(receiver: socket.socket) -> Iterator[logging.Logger]:
    handler = JournalHandler(Path(receiver.getsockname()))
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("shunt")
    before = logger.propagate, logger.level
    logger.addHandler(handler)
    logger.propagate, logger.level = False, logging.DEBUG
    yield logger
    logger.removeHandler(handler)
    logger.propagate, logger.level = before
    handler.close()


def test_a_record_carries_priority_place_and_fields(
    log: logging.Logger, receiver: socket.socket
) -> None:
    log.warning("generation %d", 3, extra=about(Event.REFUSED, generation=3))
    found = decode(receiver.recv(4096))
    assert found["MESSAGE"] == "generation 3"
    assert (found["PRIORITY"], found["SYSLOG_IDENTIFIER"]) == ("4", "shuntd")
    assert (found["MESSAGE_ID"], found["SHUNT_GENERATION"]) == (Event.REFUSED, "3")
    assert found["CODE_FUNC"] == "test_a_record_carries_priority_place_and_fields"


def test_a_backend_that_turns(log: logging.Logger, receiver: socket.socket) -> None:
    assert log.name == events.log.name
    endpoint = Endpoint(ip_address("10.0.0.1"), 80)
    events.turned("shop/web", endpoint, Turn.DOWN, "refused")
    found = decode(receiver.recv(4096))
    assert found["MESSAGE"].startswith("backend 10.0.0.1:80 of service shop/web is ")
    assert found["MESSAGE_ID"] == Event.BACKEND_DOWN
    assert (found["SHUNT_SERVICE"], found["SHUNT_BACKEND"]) == ("shop/web", "10.0.0.1:80")
    assert (found["SHUNT_REASON"], found["PRIORITY"]) == ("refused", "4")


def test_lines_in_a_message_forge_no_fields(log: logging.Logger, receiver: socket.socket) -> None:
    log.error("%s", "wrong\nPRIORITY=0\nMESSAGE_ID=x")
    found = decode(receiver.recv(4096))
    assert found["MESSAGE"] == "wrong\nPRIORITY=0\nMESSAGE_ID=x"
    assert (found["PRIORITY"], "MESSAGE_ID" in found) == ("3", False)
    # What a reader of lines alone would take for fields.
    assert b"\nPRIORITY=0\n" in encode({"MESSAGE": "wrong\nPRIORITY=0\n"})


def test_a_message_larger_than_a_datagram_goes_as_a_file(
    log: logging.Logger, receiver: socket.socket
) -> None:
    log.info("%s", "x" * (1 << 20))
    data, fds, _flags, _from = socket.recv_fds(receiver, 10, 1)
    assert (data, len(fds)) == (b"", 1)
    with os.fdopen(fds[0], "rb") as file:
        file.seek(0)
        assert decode(file.read())["MESSAGE"] == "x" * (1 << 20)


def test_without_a_journal_the_lines_go_to_standard_error(
    log: logging.Logger, receiver: socket.socket, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(receiver.getsockname()).unlink()
    log.error("one\ntwo")
    assert capsys.readouterr().err == "<3>one\n<3>two\n"
    assert prefixed("", logging.DEBUG) == "<7>\n"


def test_priorities_are_those_of_syslog() -> None:
    levels = (logging.CRITICAL, logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)
    assert [priority(level) for level in levels] == [2, 3, 4, 6, 7]


def test_message_ids_are_ids_and_differ() -> None:
    assert len(set(Event)) == len(Event.__members__)
    assert all(re.fullmatch("[0-9a-f]{32}", event) for event in Event)


def test_the_documents_name_every_event() -> None:
    text = (Path(__file__).parents[2] / "docs/operations.md").read_text()
    assert [event.name for event in Event if f"`{event}`" not in text] == []


def test_on_a_terminal_or_in_a_file_lines_stay_human(tmp_path: Path) -> None:
    """The environment of a service reaches also what writes elsewhere: the stream decides."""
    code = (
        "import logging; from shunt.agent.journal import log_to; log_to(logging.INFO);"
        "logging.getLogger('shunt').info('in force')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "JOURNAL_STREAM": "8:12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \S+ INFO in force\n", done.stderr)


def test_systemd_is_told(receiver: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    service_manager.notify("READY=1")  # nobody asked
    monkeypatch.setenv("NOTIFY_SOCKET", receiver.getsockname())
    service_manager.notify("READY=1", "STATUS=generation 1")
    assert receiver.recv(100) == b"READY=1\nSTATUS=generation 1"


@pytest.mark.parametrize(
    ("usec", "pid", "interval_s"),
    [("30000000", "", 10.0), ("", "", None), ("0", "", None), ("x", "", None), ("30", "1", None)],
)
def test_how_often_a_sign_of_life_is_due(
    usec: str, pid: str, interval_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", pid or str(os.getpid()))
    assert service_manager.watchdog_s() == interval_s


def test_signs_of_life_come_as_long_as_the_loop_runs(
    receiver: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", receiver.getsockname())
    monkeypatch.setenv("WATCHDOG_USEC", "3000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))

    async def three() -> list[bytes]:
        receiver.setblocking(False)
        task = asyncio.create_task(service_manager.keep_alive())
        loop = asyncio.get_running_loop()
        found = [await asyncio.wait_for(loop.sock_recv(receiver, 100), 5) for _ in range(3)]
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        return found

    assert asyncio.run(three()) == [b"WATCHDOG=1"] * 3
