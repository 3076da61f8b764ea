# SPDX-License-Identifier: Apache-2.0
"""Redirected streams whose messages are caught half-way. stream_forms.py draws the node."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.netns.absent_page import absent_page
from tests.netns.stream_forms import Guarded, guarded, pair, read_all


@pytest.fixture(scope="module")
def ours() -> Iterator[Guarded]:
    with guarded("streams-races") as form:
        yield form


def started(call: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread


def until_it_waits_for_a_lock(thread: threading.Thread) -> None:
    """The kernel has a task that does uninterruptible, and one that waits for anything else not."""
    stat = Path(f"/proc/self/task/{thread.native_id}/stat")
    deadline = time.monotonic() + 10
    while stat.read_text().rpartition(") ")[2].split()[0] != "D":
        assert time.monotonic() < deadline, "it does not"
        time.sleep(0.001)


def test_an_end_does_not_leave_the_map_while_a_message_is_under_way_to_it(ours: Guarded) -> None:
    """The sender has its verdict, and waits for the reader's socket, which the reader has locked.

    Meanwhile the connection becomes TCP's, and the reader's end has nothing left to read.
    """
    with pair(ours) as (client, server), absent_page() as page, ours.counted() as events:
        client.sendall(b"first ")
        reader = started(lambda: server.recv_into(page.memory, 100))
        assert page.somebody_waits()
        sender = started(lambda: client.send(b"second "))
        until_it_waits_for_a_lock(sender)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 2)
        client.sendall(b"by TCP")
        page.let_go()
        reader.join()
        sender.join()
        assert page.memory[:6] == b"first "
        assert read_all(server, 13) == b"second by TCP"
    assert (events["REDIRECTED"], events["TO_TCP_OPTION"]) == (2, 1)
