# SPDX-License-Identifier: Apache-2.0
"""Options and flags that redirected streams of the plain form do not heed: those that the guarded
one does heed, and, at the end, what neither can help; docs/operations.md says so.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from tests.netns.stream_forms import LEFT_VIP, Guarded, Plain, fill, guarded, pair, read_all

SOL = socket.SOL_SOCKET
LOWAT = (SOL, socket.SO_RCVLOWAT, 10)
# asm-generic/socket.h and linux/; Python does not have them.
ZEROCOPY, MSG_ZEROCOPY = 60, 0x4000000
TIMESTAMP, TIMESTAMPNS, TIMESTAMPING, PEEK_OFF = 29, 35, 37, 42
TX_TIMES = 1 << 1 | 1 << 4  # SOF_TIMESTAMPING_TX_SOFTWARE, and those are to be told
MSG_MORE, TCP_INQ, SIOCOUTQNSD = 0x8000, 36, 0x894B


@pytest.fixture(scope="module")
def ours() -> Iterator[Guarded]:
    with guarded("streams-options") as form:
        yield form


# Options -------------------------------------------------------------------------------------


def is_readable_below_its_mark(client: socket.socket, server: socket.socket) -> bool:
    client.sendall(b"five!")
    readable = bool(select.select([server], [], [], 0.3)[0])
    client.sendall(b"and five")
    assert select.select([server], [], [], 5)[0]
    assert read_all(server, 13) == b"five!and five"
    return readable


def test_plain_does_not_heed_rcvlowat(bare: Plain) -> None:
    with pair(bare) as (client, server):
        server.setsockopt(*LOWAT)
        assert is_readable_below_its_mark(client, server)


def test_guarded_rcvlowat_is_heeded(ours: Guarded) -> None:
    with pair(ours, server_options=(LOWAT,)) as (client, server):
        assert not is_readable_below_its_mark(client, server)
    with ours.counted() as events, pair(ours) as (client, server):
        client.sendall(b"before")
        assert server.recv(10) == b"before"
        server.setsockopt(*LOWAT)
        assert not is_readable_below_its_mark(client, server)
    assert (events["REDIRECTED"], events["TO_TCP_OPTION"]) == (1, 1)


def completes(client: socket.socket, server: socket.socket) -> bool:
    """Whether the kernel says that it is done with the buffer of a send without a copy."""
    client.send(bytes(20000), MSG_ZEROCOPY)
    read_all(server, 20000)
    poll = select.poll()
    poll.register(client, 0)
    return bool(poll.poll(1000))


def test_plain_zerocopy_never_completes(bare: Plain) -> None:
    with pair(bare, (SOL, ZEROCOPY, 1)) as (client, server):
        assert not completes(client, server)


def test_guarded_zerocopy_completes(ours: Guarded) -> None:
    with ours.counted() as events:
        with pair(ours, (SOL, ZEROCOPY, 1)) as (client, server):
            assert completes(client, server)
        with pair(ours, server_options=((SOL, ZEROCOPY, 1),)) as (client, server):
            assert completes(server, client)
    assert events["LEFT_OPTION"] == 2
    assert "REDIRECTED" not in events


def test_guarded_zerocopy_is_refused_of_a_socket_in_the_map(ours: Guarded) -> None:
    with pair(ours) as (client, _), ours.counted() as events:
        with pytest.raises(OSError, match="not supported"):
            client.setsockopt(SOL, ZEROCOPY, 1)
        client.setsockopt(SOL, ZEROCOPY, 0)
    assert events["REFUSED_ZEROCOPY"] == 1
    with pair(ours) as (client, server):
        assert fill(client, bytes(4096), 40) == 40  # TCP's for ever, and out of the map
        client.settimeout(5)
        read_all(server, 40 * 4096)
        client.setsockopt(SOL, ZEROCOPY, 1)
        assert completes(client, server)


def is_stamped(client: socket.socket, server: socket.socket) -> bool:
    """Whether a message comes with the time at which it came."""
    client.sendall(b"now")
    data, told, _, _ = server.recvmsg(10, 100)
    assert data == b"now"
    return bool(told)


@pytest.fixture
def stamping(ours: Guarded) -> Iterator[None]:
    """The kernel stamps packets a while after the first socket asked for it, and while one does."""
    with pair(left_alone(ours), server_options=((SOL, TIMESTAMP, 1),)) as ends:
        ours.node.until(lambda: is_stamped(*ends), "stamps packets")
        yield


@pytest.mark.usefixtures("stamping")
@pytest.mark.parametrize("option", [TIMESTAMP, TIMESTAMPNS])
def test_plain_tells_no_time(bare: Plain, option: int) -> None:
    with pair(bare, server_options=((SOL, option, 1),)) as ends:
        assert not is_stamped(*ends)


@pytest.mark.usefixtures("stamping")
@pytest.mark.parametrize("option", [TIMESTAMP, TIMESTAMPNS])
def test_guarded_times_are_told(ours: Guarded, option: int) -> None:
    with ours.counted() as events, pair(ours, server_options=((SOL, option, 1),)) as ends:
        assert is_stamped(*ends)
    assert events["LEFT_OPTION"] == 1
    with ours.counted() as events, pair(ours) as (client, server):
        assert not is_stamped(client, server)
        server.setsockopt(SOL, option, 1)
        assert is_stamped(client, server)
    assert (events["REDIRECTED"], events["TO_TCP_OPTION"]) == (1, 1)


def is_told_when_sent(client: socket.socket, server: socket.socket, wait_s: float = 10) -> bool:
    """Whether the error queue says when a message was sent."""
    client.sendall(b"now")
    assert server.recv(10) == b"now"
    poll = select.poll()
    poll.register(client, 0)
    return bool(poll.poll(wait_s * 1000))


def test_plain_does_not_tell_when_it_was_sent(bare: Plain) -> None:
    with pair(bare, (SOL, TIMESTAMPING, TX_TIMES)) as ends:
        assert not is_told_when_sent(*ends, wait_s=0.2)


def test_guarded_tells_when_it_was_sent(ours: Guarded) -> None:
    with pair(ours, (SOL, TIMESTAMPING, TX_TIMES)) as ends:
        assert is_told_when_sent(*ends)
    with ours.counted() as events, pair(ours) as (client, server):
        assert not is_told_when_sent(client, server, wait_s=0.2)
        client.setsockopt(SOL, TIMESTAMPING, TX_TIMES)
        assert is_told_when_sent(client, server)
    assert (events["REDIRECTED"], events["TO_TCP_OPTION"]) == (1, 1)


def peeked(client: socket.socket, server: socket.socket) -> list[bytes]:
    """What is looked at in two calls, each beginning where the one before ended."""
    client.sendall(b"onetwo")
    assert select.select([server], [], [], 5)[0]
    return [server.recv(3, socket.MSG_PEEK) for _ in range(2)]


def test_guarded_peeks_go_on(bare: Plain, ours: Guarded) -> None:
    with pair(bare) as (client, server):
        try:
            server.setsockopt(SOL, PEEK_OFF, 0)
        except OSError as e:
            assert e.errno == errno.EOPNOTSUPP  # noqa: PT017  TCP has it since 6.9
            return
        assert peeked(client, server) == [b"one", b"one"]
    with ours.counted() as events, pair(ours) as (client, server):
        server.setsockopt(SOL, PEEK_OFF, 0)
        assert peeked(client, server) == [b"one", b"two"]
    assert events["TO_TCP_OPTION"] == 1
    with pair(ours, server_options=((SOL, PEEK_OFF, 0),)) as ends:
        assert peeked(*ends) == [b"one", b"two"]


# What no form can help: docs/operations.md says so -----------------------------------------------


def left_alone(ours: Guarded) -> Guarded:
    """A service that is not redirected: the cure."""
    return Guarded(ours.node, LEFT_VIP)


def spliced(client: socket.socket, server: socket.socket) -> bytes:
    client.sendall(b"by splice")
    time.sleep(0.2)
    read, write = os.pipe()
    try:
        os.splice(server.fileno(), write, 100, flags=2)  # SPLICE_F_NONBLOCK
        return os.read(read, 100)
    except BlockingIOError:
        return b""
    finally:
        os.close(read)
        os.close(write)


def urgent(client: socket.socket, server: socket.socket) -> bytes:
    """Urgent data does not stand among the other bytes."""
    client.send(b"!", socket.MSG_OOB)
    client.send(b"ordinary")
    time.sleep(0.2)
    return server.recv(100)


def reset_of_unread(client: socket.socket, server: socket.socket) -> bytes:
    client.sendall(b"not read")
    time.sleep(0.2)
    server.close()
    try:
        return b"FIN" + client.recv(10)
    except ConnectionResetError:
        return b"RST"


def whole(client: socket.socket, server: socket.socket) -> bytes:
    """One recv() that wants all."""
    later = threading.Timer(0.2, client.sendall, [b"two"])
    later.start()
    client.sendall(b"one")
    server.settimeout(None)
    got = server.recv(6, socket.MSG_WAITALL)
    later.join()
    return got


def interrupted(client: socket.socket, server: socket.socket) -> bytes:
    """A signal while recv() waits."""
    server.settimeout(None)
    before = signal.signal(signal.SIGUSR1, lambda _number, _frame: None)
    try:
        main = threading.get_ident()
        threading.Timer(0.2, signal.pthread_kill, [main, signal.SIGUSR1]).start()
        threading.Timer(0.6, client.sendall, [b"went on"]).start()
        return server.recv(100)
    except BlockingIOError:
        return b"EAGAIN"
    finally:
        time.sleep(0.6)
        signal.signal(signal.SIGUSR1, before)


def discarded(client: socket.socket, server: socket.socket) -> bytes:
    """Bytes that are taken without being copied anywhere."""
    client.sendall(b"skipped, kept")
    assert select.select([server], [], [], 5)[0]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.recv(server.fileno(), None, 9, socket.MSG_TRUNC) != 9:
        return errno.errorcode[ctypes.get_errno()].encode()
    return server.recv(100)


def unsent(sock: socket.socket) -> bytes:
    """How many bytes TCP holds back."""
    return b"%d" % struct.unpack("i", fcntl.ioctl(sock, SIOCOUTQNSD, bytes(4)))[0]


def held_back(client: socket.socket, _server: socket.socket) -> bytes:
    """Bytes that wait for more, which they are to be sent with."""
    client.send(b"head", MSG_MORE)
    return unsent(client)


def corked(client: socket.socket, _server: socket.socket) -> bytes:
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, 1)
    client.send(b"head")
    return unsent(client)


def in_queue(client: socket.socket, server: socket.socket) -> bytes:
    """How much is left to read, told with what was read."""
    server.setsockopt(socket.IPPROTO_TCP, TCP_INQ, 1)
    client.sendall(b"read, left")
    assert select.select([server], [], [], 5)[0]
    return b"".join(data for _, _, data in server.recvmsg(6, 100)[1])


LIMITS = {
    "discard": (discarded, b"EFAULT", b"kept"),
    "more": (held_back, b"0", b"4"),
    "cork": (corked, b"0", b"4"),
    "inq": (in_queue, b"", struct.pack("i", 4)),
    "splice": (spliced, b"", b"by splice"),
    "urgent": (urgent, b"!ordinary", b"ordinary"),
    "reset": (reset_of_unread, b"FIN", b"RST"),
    "waitall": (whole, b"one", b"onetwo"),
    "signal": (interrupted, b"EAGAIN", b"went on"),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_limits_of_redirection_and_their_cure(bare: Plain, ours: Guarded, limit: str) -> None:
    act, redirected, by_tcp = LIMITS[limit]
    for form in (bare, ours):
        with pair(form) as ends:
            assert act(*ends) == redirected, form
    with pair(left_alone(ours)) as ends:
        assert act(*ends) == by_tcp
