# SPDX-License-Identifier: Apache-2.0
"""The client's side of the traffic: `python -m shunt.lab.generator`, in the client's namespace.

Reads a Plan (one line) from standard input and sends until that is closed; reports on standard
output. `traffic.Traffic` starts it and keeps the accounts.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import random
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator

import aiohttp
import msgspec

from shunt.lab.reports import (
    Answered,
    Answers,
    Failure,
    Kind,
    Opened,
    Plan,
    Reason,
    Report,
    Resent,
    Target,
)

REPORT_INTERVAL_S = 0.2
REASONS = {
    errno.ECONNREFUSED: Reason.REFUSED,
    errno.ECONNRESET: Reason.RESET,
    errno.EPIPE: Reason.RESET,
    errno.ETIMEDOUT: Reason.STALLED,
}


class LostError(Exception):
    """One request or flow is lost; the reason is for the account."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Generator:
    """Sends what the plan says. Every method that sends is a task, and ends by itself in time."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.answers: Counter[tuple[str, Kind, str]] = Counter()
        self.reports: list[Report] = []
        self.flow_numbers = itertools.count(1)
        self.flows: dict[int, float] = {}  # open ones: when what was answered last was sent
        self.encoder = msgspec.json.Encoder()
        self.ending = asyncio.Event()

    async def run(self) -> None:
        connector = aiohttp.TCPConnector(force_close=True, limit=0)
        timeout = aiohttp.ClientTimeout(total=self.plan.request_timeout_s)
        reporting = asyncio.create_task(self._report())
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            asyncio.TaskGroup() as tasks,
        ):
            for target in self.plan.targets:
                tasks.create_task(self._requests(Kind.HTTP, target, session))
                tasks.create_task(self._requests(Kind.UDP, target, session))
                for _ in range(target.tcp_flows):
                    tasks.create_task(self._tcp_flow(target))
                for _ in range(target.udp_flows):
                    tasks.create_task(self._udp_flow(target))
            await closed(sys.stdin)
            self.ending.set()
        reporting.cancel()
        self._flush()

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(REPORT_INTERVAL_S)
            self._flush()

    def _flush(self) -> None:
        answers = [Answers(*key, count) for key, count in self.answers.items()]
        reports: list[Report] = [*self.reports, *answers]
        if self.flows:
            reports.append(Answered(min(self.flows.values())))
        self.reports, self.answers = [], Counter()
        sys.stdout.buffer.write(self.encoder.encode_lines(reports))
        sys.stdout.buffer.flush()

    @contextlib.asynccontextmanager
    async def _account(self, target: Target, kind: Kind) -> AsyncIterator[Account]:
        """Whatever is raised inside was lost since `account.started_s`, and is reported."""
        account = Account(self, target, kind)
        try:
            yield account
        except LostError as lost:
            account.lost(lost.reason, lost.detail)
        except TimeoutError:
            account.lost(Reason.STALLED)
        except aiohttp.ServerDisconnectedError:
            account.lost(Reason.CLOSED)
        except OSError as error:
            account.lost(REASONS.get(error.errno or 0, Reason.ERROR), str(error))
        except aiohttp.ClientError as error:
            account.lost(Reason.ERROR, repr(error))

    async def _requests(self, kind: Kind, target: Target, session: aiohttp.ClientSession) -> None:
        rate = target.http_rate if kind is Kind.HTTP else target.udp_rate
        async with asyncio.TaskGroup() as tasks:
            while rate and await self._pause(1 / rate):
                if kind is Kind.HTTP:
                    tasks.create_task(self._http_request(target, session))
                else:
                    tasks.create_task(self._udp_request(target))

    async def _http_request(self, target: Target, session: aiohttp.ClientSession) -> None:
        host = f"[{target.address}]" if ":" in target.address else target.address
        async with self._account(target, Kind.HTTP) as account:
            async with session.get(f"http://{host}:{target.http_port}/") as response:
                body = await response.text()
            if response.status != 200 or len(body.split()) != 2:
                raise LostError(Reason.GARBLED, f"{response.status} {body[:80]!r}")
            account.answered(body.split()[0])

    async def _udp_request(self, target: Target) -> None:
        async with self._account(target, Kind.UDP) as account:
            with udp_socket(target) as sock:
                backend, _ = await self._exchange(sock, target, account, 1)
                account.answered(backend)

    async def _tcp_flow(self, target: Target) -> None:
        """One connection kept for as long as it lives, then the next."""
        while await self._pause(target.message_interval_s):
            async with self._account(target, Kind.TCP_FLOW) as account:
                await self._one_connection(target, account)

    async def _one_connection(self, target: Target, account: Account) -> None:
        async with asyncio.timeout(self.plan.stall_timeout_s):
            reader, writer = await asyncio.open_connection(target.address, target.echo_port)
        try:
            for number in itertools.count(1):
                account.sending()
                writer.write(b"%d\n" % number)
                async with asyncio.timeout(self.plan.stall_timeout_s):
                    line = await reader.readline()
                if not line:
                    raise LostError(Reason.CLOSED)
                account.flow_answered(line, number, writer.get_extra_info("sockname"))
                if not await self._pause(target.message_interval_s):
                    return
        finally:
            writer.transport.abort()

    async def _udp_flow(self, target: Target) -> None:
        """One socket, and so one five-tuple, for as long as it is answered."""
        while await self._pause(target.message_interval_s):
            async with self._account(target, Kind.UDP_FLOW) as account:
                with udp_socket(target) as sock:
                    for number in itertools.count(1):
                        _, line = await self._exchange(sock, target, account, number)
                        account.flow_answered(line, number, sock.getsockname())
                        if not await self._pause(target.message_interval_s):
                            return

    async def _exchange(
        self, sock: socket.socket, target: Target, account: Account, number: int
    ) -> tuple[str, bytes]:
        """Send a datagram until it is answered: the backend's name, and the whole answer."""
        loop = asyncio.get_running_loop()
        account.sending()
        deadline = account.started_s + self.plan.stall_timeout_s
        while True:
            await loop.sock_sendall(sock, b"%d\n" % number)
            try:
                async with asyncio.timeout(self.plan.udp_retry_s):
                    while True:
                        line = await loop.sock_recv(sock, 2048)
                        words = line.split()
                        # An answer to an earlier copy of an earlier number is no news.
                        if len(words) == 3 and words[2] == b"%d" % number:
                            return words[0].decode(), line
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise
                self.reports.append(Resent(target.name, account.kind))

    async def _pause(self, mean_s: float) -> bool:
        """Wait for about as long; False if nothing new shall be sent."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(random.uniform(0.5, 1.5) * mean_s):
                await self.ending.wait()
        return not self.ending.is_set()


class Account:
    """What is known of one request or flow."""

    def __init__(self, generator: Generator, target: Target, kind: Kind) -> None:
        self.generator, self.target, self.kind = generator, target, kind
        self.started_s = time.monotonic()
        self.flow, self.backend = 0, ""

    def sending(self) -> None:
        self.started_s = time.monotonic()

    def answered(self, backend: str) -> None:
        self.generator.answers[self.target.name, self.kind, backend] += 1

    def flow_answered(self, line: bytes, number: int, local: tuple[str, int]) -> None:
        """Raises: LostError if this is not the answer, or not the backend there was."""
        words = line.decode(errors="replace").split()
        if len(words) != 3 or words[2] != str(number):
            raise LostError(Reason.GARBLED, repr(line[:80]))
        backend, peer = words[:2]
        if not self.flow:
            self.flow, self.backend = next(self.generator.flow_numbers), backend
            self.generator.reports.append(
                Opened(self.flow, self.target.name, self.kind, backend, peer, local[0], local[1])
            )
        elif backend != self.backend:
            raise LostError(Reason.MOVED, f"{self.backend}, then {backend}")
        self.generator.flows[self.flow] = self.started_s
        self.answered(backend)

    def lost(self, reason: Reason, detail: str = "") -> None:
        self.generator.flows.pop(self.flow, None)
        self.generator.reports.append(
            Failure(
                self.target.name,
                self.kind,
                reason,
                self.started_s,
                time.monotonic(),
                self.flow,
                detail,
            )
        )


def udp_socket(target: Target) -> socket.socket:
    family = socket.AF_INET6 if ":" in target.address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.connect((target.address, target.echo_port))
    return sock


async def closed(stream: object) -> None:
    """Until the other end closes our standard input."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), stream)
    await reader.read()


if __name__ == "__main__":
    asyncio.run(Generator(msgspec.json.decode(sys.stdin.buffer.readline(), type=Plan)).run())
