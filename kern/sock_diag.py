# SPDX-License-Identifier: Apache-2.0
"""Sockets seen and closed from outside, by socket diagnostics.

Closing is SOCK_DESTROY (CONFIG_INET_DIAG_DESTROY).
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple, Self

from shunt.kern.netlink import NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR

NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, SOCK_DESTROY = 4, 20, 21  # linux/{netlink,sock_diag}.h
_HEADER = struct.Struct("=IHHII")  # nlmsghdr
# inet_diag_req_v2: family, protocol, extensions, pad, states; ports and addresses in network order,
# interface, cookie.
_REQUEST = struct.Struct("=BBBxI2s2s16s16sIQ")
_ERROR = struct.Struct("=i")
_ALL_STATES = 0xFFFFFFFF
# Who waits for others, by protocol: TCP_LISTEN, TCP_CLOSE of include/net/tcp_states.h.
_WAITING = {socket.IPPROTO_TCP: 1 << 10, socket.IPPROTO_UDP: 1 << 7}
# linux/inet_diag.h: an attribute with a program of (code, jump if so, jump if not) and numbers.
_REQ_BYTECODE, _SOURCE_AT_LEAST, _SOURCE_AT_MOST = 1, 2, 3
_ATTRIBUTE, _STEP = struct.Struct("=HH"), struct.Struct("=BBH")
_SOURCE_PORT = slice(_HEADER.size + 4, _HEADER.size + 6)  # in struct inet_diag_msg
# Answered together; their acknowledgements have room in a socket's buffer.
_TOGETHER = 64
_SO_COOKIE = 57  # asm-generic/socket.h


class Target(NamedTuple):
    """A socket, by all that the kernel looks for. Addresses: 16 bytes; of IPv4 the first four."""

    family: int
    proto: int
    source: bytes
    source_port: bytes
    destination: bytes
    destination_port: bytes
    ifindex: int
    cookie: int


class SockDiag:
    """In the network namespace of the thread that makes it."""

    def __init__(self) -> None:
        """Raises: OSError."""
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_NETLINK, kind, NETLINK_SOCK_DIAG)
        self._socket.settimeout(5)  # never reached unless an answer is lost

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def destroy(self, targets: Iterable[Target]) -> int:
        """Close those that are still there, and still the same (by the cookie); how many.

        Their processes get ECONNABORTED.

        Raises: OSError: EOPNOTSUPP if the kernel cannot, EPERM without CAP_NET_ADMIN.
        """
        closed = 0
        rest = iter(targets)
        while some := list(islice(rest, _TOGETHER)):
            self._socket.send(b"".join(map(_message, some)))
            for code in self._answers(len(some)):
                if code not in (0, errno.ENOENT):
                    raise OSError(code, f"SOCK_DESTROY: {errno.errorcode.get(code, code)}")
                closed += code == 0
        return closed

    def waiting(self, protocol: int, ports: range) -> set[int]:
        """Of these ports, those where sockets listen (TCP), or are not connected (UDP).

        Raises: OSError: ENOENT if the kernel has no diagnostics of the protocol.
        """
        found: set[int] = set()
        for family in (socket.AF_INET, socket.AF_INET6) if ports else ():
            self._socket.send(_dump(family, protocol, ports))
            found.update(self._dumped())
        return found

    def _dumped(self) -> Iterator[int]:
        while True:
            data = self._socket.recv(1 << 16)
            while data:
                length, kind, *_ = _HEADER.unpack_from(data)
                if kind == NLMSG_DONE:
                    return
                if kind == NLMSG_ERROR:
                    code = -_ERROR.unpack_from(data, _HEADER.size)[0]
                    raise OSError(code, f"SOCK_DIAG: {errno.errorcode.get(code, code)}")
                yield int.from_bytes(data[_SOURCE_PORT], "big")
                data = data[(length + 3) & ~3 :]

    def _answers(self, number: int) -> Iterator[int]:
        """As many errors; 0 is none."""
        while number:
            data = self._socket.recv(1 << 16)
            while data:
                length, kind, *_ = _HEADER.unpack_from(data)
                if kind == NLMSG_ERROR:
                    number -= 1
                    yield -_ERROR.unpack_from(data, _HEADER.size)[0]
                data = data[(length + 3) & ~3 :]


def _message(one: Target) -> bytes:
    body = _REQUEST.pack(
        *(one.family, one.proto, 0, _ALL_STATES, one.source_port, one.destination_port),
        *(one.source, one.destination, one.ifindex, one.cookie),
    )
    flags = NLM_F_REQUEST | NLM_F_ACK
    return _HEADER.pack(_HEADER.size + len(body), SOCK_DESTROY, flags, 0, 0) + body


def _dump(family: int, protocol: int, ports: range) -> bytes:
    condition = b"".join(
        (
            *(_STEP.pack(_SOURCE_AT_LEAST, 8, 20), _STEP.pack(0, 0, ports[0])),
            *(_STEP.pack(_SOURCE_AT_MOST, 8, 12), _STEP.pack(0, 0, ports[-1])),
        )
    )
    body = _REQUEST.pack(
        *(family, protocol, 0, _WAITING[protocol], bytes(2), bytes(2)),
        *(bytes(16), bytes(16), 0, 0),
    )
    body += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(condition), _REQ_BYTECODE) + condition
    flags = NLM_F_REQUEST | NLM_F_DUMP
    return _HEADER.pack(_HEADER.size + len(body), SOCK_DIAG_BY_FAMILY, flags, 0, 0) + body


def refusal() -> str:
    """Why the kernel does not close sockets so; "" if it does. Tried on one made for it."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made, SockDiag() as diag:
            made.bind(("", 0))
            cookie = made.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)
            own = Target(
                family=socket.AF_INET,
                proto=socket.IPPROTO_UDP,
                source=bytes(16),
                source_port=made.getsockname()[1].to_bytes(2, "big"),
                destination=bytes(16),
                destination_port=bytes(2),
                ifindex=0,
                cookie=int.from_bytes(cookie, "little"),
            )
            return "" if diag.destroy([own]) else "there are no diagnostics of UDP (udp_diag.ko)"
    except OSError as e:
        return f"it refuses: {e.strerror or e}"
