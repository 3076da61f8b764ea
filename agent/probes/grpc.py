# SPDX-License-Identifier: Apache-2.0
"""Type grpc: Health/Check of grpc.health.v1, one unary call over HTTP/2.

HTTP/2 is the library h2's. The call's two messages have a field each, which is less than what a
protobuf runtime would bring.
"""

from __future__ import annotations

import asyncio
import ssl
from urllib.parse import urlsplit

import h2.config
import h2.connection
import h2.events
import h2.exceptions

from shunt.agent.probes import tls
from shunt.agent.probes.attempt import WELL, Done, Outcome, Target, TaskAttempt
from shunt.agent.probes.sockets import connected
from shunt.lb.checks import Grpc
from shunt.lb.model import Backend

METHOD = "/grpc.health.v1.Health/Check"
# HealthCheckResponse.ServingStatus, health.proto
STATUSES = {0: "UNKNOWN", 1: "SERVING", 2: "NOT_SERVING", 3: "SERVICE_UNKNOWN"}
# grpc/status.proto: the codes that a health service answers with
CODES = {"5": "NOT_FOUND: it does not know the service", "12": "UNIMPLEMENTED: no health service"}
READ_MAX = 65536
ANSWER_MAX = 1024


def call(_loop: asyncio.AbstractEventLoop, target: Target, done: Done) -> TaskAttempt:
    """A check of type grpc."""
    how = target.how
    assert isinstance(how, Grpc)
    return TaskAttempt(target, _ask(target, how), done)


def request(service: str) -> bytes:
    """A HealthCheckRequest with its length before it, as gRPC sends messages."""
    name = service.encode()
    length = (
        bytes([len(name)]) if len(name) < 128 else bytes([len(name) & 127 | 128, len(name) >> 7])
    )
    message = b"\x0a" + length + name if name else b""
    return b"\0" + len(message).to_bytes(4, "big") + message


def serving_status(answer: bytes) -> int | None:
    """The status in a HealthCheckResponse with its length before it; None if it is none."""
    if len(answer) < 5 or answer[0] or len(answer) != 5 + int.from_bytes(answer[1:5], "big"):
        return None
    message = answer[5:]
    if not message:
        return 0
    return message[1] if len(message) == 2 and message[0] == 0x08 else None


class _Answer:
    """What has come of the answer."""

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.data = b""
        self.ended = False
        self.broken = ""

    def take(self, event: h2.events.Event) -> int:
        """Take an event in; so many bytes of the flow control window are to be given back."""
        if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
            for name, value in event.headers or ():
                self.headers[_text(name)] = _text(value)
        elif isinstance(event, h2.events.DataReceived):
            self.data += event.data or b""
            if len(self.data) > ANSWER_MAX:
                self.broken = "the answer is too long for a health service's"
            return event.flow_controlled_length or 0
        elif isinstance(event, h2.events.StreamEnded):
            self.ended = True
        elif (
            isinstance(event, h2.events.StreamReset | h2.events.ConnectionTerminated)
            and not self.ended
        ):
            self.broken = "the server ended the call"
        return 0

    def reason(self) -> str:
        """Why this is not well; "" if it is."""
        if self.broken:
            return self.broken
        if self.headers.get(":status") != "200":
            return f"HTTP status {self.headers.get(':status')}, expected 200"
        code = self.headers.get("grpc-status", "")
        if code != "0":
            words = self.headers.get("grpc-message", "")
            return f"gRPC status {CODES.get(code, f'{code} {words}'.strip())}"
        status = serving_status(self.data)
        if status is None:
            return "the answer is no HealthCheckResponse"
        return "" if status == 1 else STATUSES.get(status, f"status {status}")


async def _ask(target: Target, how: Grpc) -> Outcome:
    where = target.where
    host = str(target.address)
    authority = how.authority or str(Backend(target.address, target.port))
    name = None
    if how.tls:
        name = how.tls.server_name or urlsplit(f"//{how.authority}").hostname or host
    try:
        reader, writer = await asyncio.open_connection(
            sock=await connected(target),
            ssl=tls.context(how.tls.verify, "h2") if how.tls else None,
            server_hostname=name,
        )
    except ssl.SSLError as error:
        return Outcome(f"{where}: {tls.problem(error)}")
    try:
        answer = await _exchange(reader, writer, how, authority)
    except h2.exceptions.H2Error as error:
        return Outcome(f"{where}: no HTTP/2: {error}")
    finally:
        writer.transport.abort()
    reason = answer.reason()
    return Outcome(f"{where}: {reason}") if reason else WELL


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, how: Grpc, authority: str
) -> _Answer:
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    connection.initiate_connection()
    stream = connection.get_next_available_stream_id()
    connection.send_headers(
        stream,
        [
            (":method", "POST"),
            (":scheme", "https" if how.tls else "http"),
            (":path", METHOD),
            (":authority", authority),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
            ("user-agent", "shunt-health"),
        ],
    )
    connection.send_data(stream, request(how.service), end_stream=True)
    answer = _Answer()
    while not answer.ended and not answer.broken:
        writer.write(connection.data_to_send())
        await writer.drain()
        received = await reader.read(READ_MAX)
        if not received:
            answer.broken = "the connection ended without an answer"
            break
        for event in connection.receive_data(received):
            if given_back := answer.take(event):
                connection.acknowledge_received_data(given_back, stream)
    return answer


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
