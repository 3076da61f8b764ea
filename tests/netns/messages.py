# SPDX-License-Identifier: Apache-2.0
"""sendmmsg() and recvmmsg(), which Python has no names for."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import Iterator, Sequence

SIZE = 1000
Peer = tuple[str, int]
Buffer = ctypes.Array[ctypes.c_char]


class Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


class Header(ctypes.Structure):
    """struct msghdr"""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_len", ctypes.c_uint32),
        ("vectors", ctypes.POINTER(Vector)),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_len", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Message(ctypes.Structure):
    """struct mmsghdr"""

    _fields_ = (("header", Header), ("len", ctypes.c_uint))


_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, sock: socket.socket, headers: ctypes.Array[_Message], *more: int) -> int:
    done = int(getattr(_libc, name)(sock.fileno(), headers, len(headers), *more))
    if done < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return done


def packed(peer: Peer) -> bytes:
    host, port = peer
    if ":" in host:
        address = socket.inet_pton(socket.AF_INET6, host)
        return struct.pack("=H", socket.AF_INET6) + struct.pack("!HI16sI", port, 0, address, 0)
    return struct.pack("=H", socket.AF_INET) + struct.pack("!H4s8x", port, socket.inet_aton(host))


def unpacked(raw: bytes) -> Peer:
    family, port = struct.unpack("=H", raw[:2])[0], struct.unpack("!H", raw[2:4])[0]
    if family == socket.AF_INET6:
        return socket.inet_ntop(family, raw[8:24]), port
    return socket.inet_ntop(family, raw[4:8]), port


@contextlib.contextmanager
def message(data: bytes, name: bytes) -> Iterator[tuple[Header, Buffer, Buffer]]:
    """A header, its data and its address, as long as the context lasts."""
    room = ctypes.create_string_buffer(data, len(data))
    peer = ctypes.create_string_buffer(name, len(name))
    vector = Vector(ctypes.addressof(room), len(data))
    header = Header()
    header.name, header.name_len = ctypes.addressof(peer), len(name)
    header.vectors, header.vector_count = ctypes.pointer(vector), 1
    yield header, room, peer


def send_many(sock: socket.socket, messages: Sequence[tuple[bytes, Peer | None]]) -> int:
    """Send them all by one call; how many were sent."""
    headers = (_Message * len(messages))()
    kept = []
    for message, (data, peer) in zip(headers, messages, strict=True):
        header = message.header
        vector = Vector(ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p), len(data))
        name = packed(peer) if peer else b""
        kept.append((data, name, vector))
        header.vectors, header.vector_count = ctypes.pointer(vector), 1
        if name:
            header.name = ctypes.cast(ctypes.c_char_p(name), ctypes.c_void_p)
            header.name_len = len(name)
    return _call("sendmmsg", sock, headers, 0)


def receive_many(sock: socket.socket, count: int) -> list[tuple[bytes, Peer]]:
    """Receive so many, as few calls as may be; waits for all of them."""
    found: list[tuple[bytes, Peer]] = []
    while len(found) < count:
        headers = (_Message * (count - len(found)))()
        places = []
        for message in headers:
            header = message.header
            data, name = ctypes.create_string_buffer(SIZE), ctypes.create_string_buffer(28)
            vector = Vector(ctypes.addressof(data), SIZE)
            places.append((data, name, vector))
            header.vectors, header.vector_count = ctypes.pointer(vector), 1
            header.name, header.name_len = ctypes.addressof(name), 28
        sock.settimeout(5)
        first, peer = sock.recvfrom(1, socket.MSG_PEEK)  # waits; recvmmsg would not
        assert (len(first), bool(peer)) == (1, True)
        done = _call("recvmmsg", sock, headers, socket.MSG_DONTWAIT, 0)
        found += [(d.raw[: h.len], unpacked(n.raw)) for h, (d, n, _) in
                  zip(headers[:done], places[:done], strict=True)]  # fmt: skip
    return found
