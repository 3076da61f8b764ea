# SPDX-License-Identifier: Apache-2.0
"""Types udp and dns: a datagram, and the answer to it. An ICMP error is a failure at once."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable

import dns.exception
import dns.message
import dns.rcode
import dns.rdatatype

from shunt.agent.probes.attempt import WELL, Done, Outcome, Target, of_error
from shunt.agent.probes.sockets import open_socket
from shunt.lb.checks import Dns, Udp

DATAGRAM_MAX = 65535
# What an answer says; None if it is none to what was asked, and another may come.
Judge = Callable[[bytes], Outcome | None]


class Exchange:
    """One datagram sent, and the first that answers it."""

    __slots__ = ("_done", "_judge", "_loop", "_socket", "_target")

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        target: Target,
        done: Done,
        send: bytes,
        judge: Judge,
    ) -> None:
        self._loop, self._target, self._done, self._judge = loop, target, done, judge
        self._socket: socket.socket | None = None
        try:
            self._socket = open_socket(target, socket.SOCK_DGRAM)
            # Connected: the kernel passes on ICMP errors, and what others send never gets here.
            self._socket.connect((str(target.address), target.port))
            self._socket.send(send)
        except OSError as error:
            self._finish(of_error(error.errno or errno.EIO, target))
            return
        loop.add_reader(self._socket, self._readable)

    def _readable(self) -> None:
        if self._socket is None:
            return
        try:
            outcome = self._judge(self._socket.recv(DATAGRAM_MAX))
        except BlockingIOError:  # a datagram with a wrong checksum
            return
        except OSError as error:
            outcome = of_error(error.errno or errno.EIO, self._target)
        if outcome is not None:
            self._finish(outcome)

    def _finish(self, outcome: Outcome) -> None:
        self.stop()
        self._done(outcome)

    def stop(self) -> None:
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
            self._socket.close()
            self._socket = None


def udp(loop: asyncio.AbstractEventLoop, target: Target, done: Done) -> Exchange:
    """A check of type udp."""
    how = target.how
    assert isinstance(how, Udp)
    wanted = how.expect

    def judge(answer: bytes) -> Outcome:
        if wanted in answer:
            return WELL
        return Outcome(f"{target.where}: the answer {answer[:32]!r} lacks {wanted[:32]!r}")

    return Exchange(loop, target, done, how.send, judge)


def query(loop: asyncio.AbstractEventLoop, target: Target, done: Done) -> Exchange:
    """A check of type dns."""
    how = target.how
    assert isinstance(how, Dns)
    asked = dns.message.make_query(how.name, how.rdtype)

    def judge(raw: bytes) -> Outcome | None:
        try:
            answer = dns.message.from_wire(raw)
        except (dns.exception.DNSException, ValueError) as error:
            return Outcome(f"{target.where}: the answer is no DNS message: {error}")
        return judge_answer(how, answer) if asked.is_response(answer) else None

    return Exchange(loop, target, done, asked.to_wire(), judge)


def judge_answer(how: Dns, answer: dns.message.Message) -> Outcome:
    """Whether an answer to our query is the expected one."""
    rcode = dns.rcode.to_text(answer.rcode())
    if rcode != how.rcode:
        return Outcome(f"{how.name} {how.rdtype}: {rcode}, expected {how.rcode}")
    found = [
        record.to_text()
        for records in answer.answer
        for record in records
        if dns.rdatatype.to_text(records.rdtype) == how.rdtype
    ]
    if how.answer and how.answer not in found:
        shown = ", ".join(found[:3]) or "nothing"
        return Outcome(f"{how.name} {how.rdtype}: {shown}, expected {how.answer}")
    return WELL
