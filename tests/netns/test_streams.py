# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with redirected streams in the plain form, and not with the guarded one.

Each failure is shown with the form that is found everywhere (plain_streams.bpf.c), so that it is
known that its test can fail, and then looked for in Shunt's. stream_forms.py draws both. Options of
sockets are in test_streams_options.py.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest

from shunt.kern import cgroup, libbpf
from shunt.sockops.streams import BUDGET_BYTES, BUDGET_MESSAGES
from tests.conftest import GUEST
from tests.netns.stream_forms import (
    Form,
    Guarded,
    Plain,
    fill,
    guarded,
    listening,
    made,
    pair,
    read_all,
)

SOL, TCP = socket.SOL_SOCKET, socket.IPPROTO_TCP
SMALL_BUFFERS = ((SOL, socket.SO_SNDBUF, 65536), (SOL, socket.SO_RCVBUF, 65536))
MEGABYTE = 1 << 20
SO_SNDBUFFORCE, SO_RCVBUFFORCE = 32, 33  # asm-generic/socket.h; Python does not have them


@pytest.fixture(scope="module")
def ours() -> Iterator[Guarded]:
    with guarded("streams") as form:
        yield form


# Memory --------------------------------------------------------------------------------------


def behind_a_slow_reader(form: Form) -> int:
    """Bytes that are taken while nobody reads, of 64 MB."""
    with pair(form, *SMALL_BUFFERS, server_options=SMALL_BUFFERS) as (client, _server):
        return 4096 * fill(client, bytes(4096), 64 * MEGABYTE // 4096)


def test_plain_takes_whatever_a_slow_reader_does_not_read(bare: Plain) -> None:
    assert behind_a_slow_reader(bare) == 64 * MEGABYTE


def test_guarded_memory_behind_a_slow_reader_is_bounded(ours: Guarded) -> None:
    with ours.counted() as events:
        taken = behind_a_slow_reader(ours)
    assert taken < BUDGET_BYTES + MEGABYTE
    assert events["REDIRECTED"] == BUDGET_BYTES // 4096
    assert events["TO_TCP_BUDGET"] == 1


def both_write_and_neither_reads(form: Form) -> int:
    """Bytes taken, of 32 MB, when each message is answered by one that nobody reads either."""
    with pair(form, *SMALL_BUFFERS, server_options=SMALL_BUFFERS) as (client, server):
        taken = 0
        for _ in range(32 * MEGABYTE // 8192):
            here, there = fill(client, bytes(4096), 1), fill(server, bytes(4096), 1)
            taken += 4096 * (here + there)
        return taken


def test_plain_takes_whatever_both_write(bare: Plain) -> None:
    assert both_write_and_neither_reads(bare) == 32 * MEGABYTE


def test_guarded_messages_do_not_count_as_a_sign_that_others_were_read(ours: Guarded) -> None:
    assert both_write_and_neither_reads(ours) < 2 * BUDGET_BYTES + 2 * MEGABYTE


def poor_group() -> tuple[Path, Path]:
    """A new control group whose sockets may have 4 MB together, and the one of this process.

    With version 2 that is all of the group's memory, so no process is to stay in it.
    """
    unified = cgroup.root()
    v2 = "memory" in (unified / "cgroup.controllers").read_text().split()
    lines = [x.split(":", 2) for x in Path("/proc/self/cgroup").read_text().splitlines()]
    if v2:
        home = unified / next(path for number, _, path in lines if number == "0").lstrip("/")
        (unified / "cgroup.subtree_control").write_text("+memory")
        root, limit = unified, "memory.max"
    else:
        root, limit = Path("/sys/fs/cgroup/memory"), "memory.kmem.tcp.limit_in_bytes"
        home = root / next(path for _, kind, path in lines if kind == "memory").lstrip("/")
    group = root / f"shunt-streams-{os.getpid()}"
    group.mkdir()
    (group / limit).write_text(str(4 * MEGABYTE))
    return group, home


@contextlib.contextmanager
def little_memory() -> Iterator[Callable[[], AbstractContextManager[None]]]:
    """Sockets that this process makes within what is yielded may have 4 MB together."""
    group, home = poor_group()

    @contextlib.contextmanager
    def within() -> Iterator[None]:
        (group / "cgroup.procs").write_text(str(os.getpid()))
        try:
            yield
        finally:
            (home / "cgroup.procs").write_text(str(os.getpid()))

    try:
        yield within
    finally:
        group.rmdir()


@contextlib.contextmanager
def little_memory_of_the_host(pages: str) -> Iterator[None]:
    """For TCP: where there is no pressure, where it begins, and what there is."""
    setting = Path("/proc/sys/net/ipv4/tcp_mem")
    before = setting.read_text()
    setting.write_text(pages)
    try:
        yield
    finally:
        setting.write_text(before)


def blocking_until_it_fails(form: Form) -> str:
    """The error of a blocking send to somebody who does not read."""
    with little_memory() as within, contextlib.ExitStack() as stack:
        with within():
            ends = stack.enter_context(pair(form, *SMALL_BUFFERS, server_options=SMALL_BUFFERS))
        client, _server = ends
        client.settimeout(None)
        two_s = struct.pack("ll", 2, 0)
        client.setsockopt(SOL, socket.SO_SNDTIMEO, two_s)  # else it blocks for ever, as it should
        try:
            while True:
                client.sendall(bytes(4096))
        except OSError as e:
            return errno.errorcode[e.errno or 0]


def test_plain_fails_with_enomem(bare: Plain) -> None:
    assert blocking_until_it_fails(bare) == "ENOMEM"


def test_guarded_blocks(ours: Guarded) -> None:
    assert blocking_until_it_fails(ours) == "EAGAIN"  # the send's own timeout


if GUEST:  # the setting is the whole kernel's; tests/kernels/run.py has it run in guests

    def test_guarded_leaves_it_to_tcp_when_memory_is_short(ours: Guarded) -> None:
        # What is used is seen in steps of a megabyte for each processor.
        large = ((SOL, SO_SNDBUFFORCE, 8 * MEGABYTE), (SOL, SO_RCVBUFFORCE, 8 * MEGABYTE))
        with (
            pair(ours) as (client, server),
            pair(ours, *large, server_options=large) as (bulk, _),
            ours.counted() as events,
        ):
            client.sendall(b"redirected")
            assert server.recv(100) == b"redirected"
            with little_memory_of_the_host("8 16 100000"):
                fill(bulk, bytes(30000), 200)
                client.sendall(b"by TCP")
                assert server.recv(100) == b"by TCP"
        assert events["TO_TCP_PRESSURE"] >= 1


def unreclaimable_kb() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("SUnreclaim:")).split()[1])


def kb_of_single_bytes(form: Form) -> tuple[int, int]:
    """How many unread messages of a byte are taken, of 100,000, and how much of the kernel's memory
    they take."""
    with pair(form) as (client, server):
        before = unreclaimable_kb()
        count = fill(client, b"x", 100_000)
        taken = unreclaimable_kb() - before
        assert len(read_all(server, count)) == count
        return count, taken


def test_plain_single_bytes_take_much_of_the_kernels_memory(bare: Plain) -> None:
    count, taken_kb = kb_of_single_bytes(bare)
    assert count == 100_000
    assert taken_kb > 50_000  # 500 bytes and more for each


def test_guarded_single_bytes_are_gathered_by_tcp(ours: Guarded) -> None:
    """Or not taken, where TCP had to send them one by one: it has a bound."""
    with ours.counted() as events:
        found = [kb_of_single_bytes(ours) for _ in range(3)]
    # All of the machine's, and others use it too.
    assert min(taken_kb for _, taken_kb in found) < 20_000
    assert min(count for count, _ in found) > 10 * BUDGET_MESSAGES
    assert events["REDIRECTED"] == 3 * BUDGET_MESSAGES


# Order ---------------------------------------------------------------------------------------


def early_bytes(form: Form) -> bytes:
    """With deferred accept the server's socket is made by the first data."""
    defer = (TCP, socket.TCP_DEFER_ACCEPT, 10)
    with form.listen(defer) as listener, form.dial(listener) as client:
        client.sendall(b"first")
        time.sleep(0.2)
        client.sendall(b"second")
        server = listener.accept()[0]
        with server:
            server.settimeout(5)
            got = read_all(server, len("firstsecond"))
            server.sendall(b"answer")
            assert read_all(client, 6) == b"answer"
            return got


def fast_open(form: Form) -> bytes:
    """Data with the SYN."""
    with form.listen((TCP, socket.TCP_FASTOPEN, 16)) as listener:
        port = listener.getsockname()[1]
        address = form.vip if isinstance(form, Guarded) else "127.0.0.1"
        with form.undialled() as client:
            client.sendto(b"first", socket.MSG_FASTOPEN, (address, port))
            server = listener.accept()[0]
            with server:
                server.settimeout(5)
                time.sleep(0.2)
                client.sendall(b"second")
                got = read_all(server, len("firstsecond"))
                server.sendall(b"answer")
                assert read_all(client, 6) == b"answer"
                return got


@pytest.mark.parametrize("early", [early_bytes, fast_open], ids=lambda f: f.__name__)
def test_plain_bytes_overtake_each_other(bare: Plain, early: object) -> None:
    assert callable(early)
    assert early(bare) == b"secondfirst"


@pytest.mark.parametrize("early", [early_bytes, fast_open], ids=lambda f: f.__name__)
def test_guarded_bytes_keep_their_order(ours: Guarded, early: object) -> None:
    assert callable(early)
    with ours.counted() as events:
        assert early(ours) == b"firstsecond"
    assert "REDIRECTED" not in events, "whoever begins by TCP stays with it"


def test_guarded_switches_to_tcp_in_order(ours: Guarded) -> None:
    """Redirected bytes are read first, also when those by TCP have come long ago."""
    data = os.urandom(2 * BUDGET_BYTES)
    parts = [data[i : i + 4096] for i in range(0, len(data), 4096)]
    with pair(ours) as (client, server):
        for part in parts:
            client.sendall(part)
        time.sleep(0.2)
        assert server.recv(100) == data[:100]
        assert read_all(server, len(data) - 100) == data[100:]


# Whose bytes they are ------------------------------------------------------------------------


def test_plain_loses_unread_bytes_with_an_entry(bare: Plain) -> None:
    with pair(bare) as (client, server):
        client.sendall(b"lost")
        assert bare.ends.delete(bare.key(server))
        server.settimeout(0.3)
        with pytest.raises(TimeoutError):
            server.recv(10)


def test_plain_loses_unread_bytes_when_an_entry_is_replaced(bare: Plain) -> None:
    space = bare.client_space
    with (
        pair(bare) as (client, server),
        listening(space, "127.0.0.1", 0, ()) as listener,
        made(space, socket.AF_INET, ()) as other,
    ):
        other.connect(listener.getsockname())
        client.sendall(b"lost")
        value = np.frombuffer(struct.pack("Q", other.fileno()), bare.ends.spec.value)
        bare.ends.update(bare.key(server), value, libbpf.BPF_ANY)
        server.settimeout(0.3)
        with pytest.raises(TimeoutError):
            server.recv(10)


def test_guarded_entries_are_not_deleted_with_unread_bytes(ours: Guarded) -> None:
    """Both ends are on TCP for ever, and may leave the map; but one has not read all."""
    with pair(ours) as (client, server), ours.counted() as events:
        client.sendall(b"kept")
        for _ in range(BUDGET_MESSAGES + 8):
            server.sendall(b"x" * 100)
        read_all(client, 100 * (BUDGET_MESSAGES + 8))
        time.sleep(0.3)
        assert read_all(server, 4) == b"kept"
        for _ in range(8):  # packets, so that it is looked at again
            client.sendall(b"more")
            server.sendall(b"more")
            assert (read_all(server, 4), read_all(client, 4)) == (b"more", b"more")
    assert events["TO_TCP_BUDGET"] == 1
    assert events["GONE"] == 2, "then they leave it"


def test_plain_mixes_namespaces_with_equal_addresses(bare: Plain) -> None:
    """The other's connection takes the client's place in the map, and then gets its bytes."""
    defer = (TCP, socket.TCP_DEFER_ACCEPT, 10)  # so that its server is not in the map yet
    with (
        bare.listen(port=7777) as one,
        bare.listen(defer, port=7777, space=bare.other) as two,
        bare.dial(one, port=5555),
    ):
        server = one.accept()[0]
        with server, bare.dial(two, port=5555, space=bare.other) as stranger:
            server.sendall(b"secret")
            assert stranger.recv(10) == b"secret"


# What gains nothing ----------------------------------------------------------------------------


def test_guarded_bulk_is_tcps(ours: Guarded) -> None:
    with ours.counted() as events, pair(ours) as (client, server):
        for _ in range(1000):
            client.sendall(bytes(4096))
            read_all(server, 4096)
    assert events["REDIRECTED"] == BUDGET_BYTES // 4096
    assert events["GONE"] == 2


def test_plain_redirects_one_direction_alone(bare: Plain) -> None:
    with pair(bare) as (client, server):
        assert bare.ends.delete(bare.key(server))
        before = segments(server)
        client.sendall(b"by TCP")
        assert server.recv(10) == b"by TCP"
        assert segments(server) > before
        before = segments(client)
        server.sendall(b"plain socket now: by TCP")
        assert client.recv(100)
        assert segments(client) > before


def segments(sock: socket.socket) -> int:
    """Segments with data that came in: tcpi_data_segs_in of struct tcp_info."""
    return int(struct.unpack_from("I", sock.getsockopt(TCP, socket.TCP_INFO, 200), 152)[0])


def test_guarded_redirects_both_directions_or_none(ours: Guarded) -> None:
    with pair(ours) as (client, server):
        for _ in range(10):
            client.sendall(b"question")
            assert server.recv(100) == b"question"
            server.sendall(b"answer")
            assert client.recv(100) == b"answer"
        assert (segments(client), segments(server)) == (0, 0)
        fill(client, bytes(4096), 40)
        client.settimeout(5)
        read_all(server, 40 * 4096)
        seen = segments(client)
        server.sendall(b"answer")
        assert client.recv(100) == b"answer"
        assert segments(client) == seen + 1
