# SPDX-License-Identifier: Apache-2.0
"""Real QUIC connections through a real shuntd, whose client gets other ports and addresses.

The topology is shunt_host's; both backends run a QUIC server that makes connection ids as
draft-ietf-quic-load-balancers wants them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic.configuration import QuicConfiguration

from shunt.lab.napi import attach_pass
from tests.netns.quic_server import ALPN
from tests.netns.shunt_host import BACKENDS, CLIENT, Host, a_host

VIP, ELSEWHERE = "203.0.113.20", "10.9.0.10"
IDS = ("0001", "0002")
PLAIN: dict[str, Any] = {
    "name": "quic",
    "vip": VIP,
    "ports": ["443/udp"],
    "mode": "nat",
    "backends": [f"{address}:8443" for address in BACKENDS],
}
BY_ID = PLAIN | {
    "quic": {"server_id_length": 2},
    "backends": [
        {"address": address, "port": 8443, "server_id": server}
        for address, server in zip(BACKENDS, IDS, strict=True)
    ],
}
# Where the client is next.
PLACES = [(CLIENT, port) for port in range(40001, 40005)] + [(ELSEWHERE, 40006), (CLIENT, 40007)]


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    with a_host("quic") as found:
        key, certificate = found.directory / "key.pem", found.directory / "certificate.pem"
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"),
                *("ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=quic"),
                *("-keyout", str(key), "-out", str(certificate)),
            ],
            check=True,
            capture_output=True,
        )
        found.outside.ip(f"addr add {ELSEWHERE}/24 dev eth0")
        for file in found.services.iterdir():
            file.unlink()
        found.write("quic", PLAIN)
        found.start()
        link = attach_pass(found.outside, "eth0")  # what is translated arrives only then
        servers = []
        for address, server in zip(BACKENDS, IDS, strict=True):
            log = found.directory / f"quic-{server}.log"
            argv = [sys.executable, "-m", "tests.netns.quic_server", address, "8443", server]
            servers.append(found.outside.start([*argv, str(certificate), str(key)], log))
            found.until(partial(says_ready, log), log.name)
        yield found
        for process in servers:
            process.stop()
        os.close(link)


@contextlib.asynccontextmanager
async def connection(host: Host) -> AsyncIterator[Client]:
    """A connection through the VIP."""
    configuration = QuicConfiguration(
        is_client=True, alpn_protocols=[ALPN], verify_mode=ssl.CERT_NONE
    )
    with host.outside.inside(), contextlib.ExitStack() as stack:
        async with connect(VIP, 443, configuration=configuration) as found:
            yield Client(found, stack)


class Client:
    """A connection's client end, that can be elsewhere."""

    def __init__(self, protocol: QuicConnectionProtocol, stack: contextlib.ExitStack) -> None:
        self.protocol, self._stack = protocol, stack

    async def ask(self, timeout_s: float = 20) -> str:
        """The id of the server that answers; empty if none does."""
        reader, writer = await self.protocol.create_stream()
        writer.write_eof()
        try:
            return (await asyncio.wait_for(reader.read(), timeout_s)).decode()
        except TimeoutError:
            return ""

    async def move(self, place: tuple[str, int]) -> None:
        """From now on it sends from there: the protocol uses the transport it was given last."""
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)  # as aioquic's own
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind((f"::ffff:{place[0]}", place[1]))
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: self.protocol, sock=sock
        )
        self._stack.callback(transport.close)


def says_ready(log: Path) -> bool:
    return "ready" in log.read_text()


async def wander(host: Host, places: list[tuple[str, int]], timeout_s: float) -> list[str]:
    """One connection, from one place after the other: who answers at each, until nobody does."""
    async with connection(host) as client:
        answers = [await client.ask()]
        for place in places:
            await client.move(place)
            answers.append(await client.ask(timeout_s))
            if not answers[-1]:
                break
        return answers


def reload(host: Host, service: dict[str, Any]) -> None:
    host.write("quic", service)
    done = host.shunt("config", "reload")
    assert (done.code, done.err) == (0, "")


def events(host: Host) -> dict[str, int]:
    found: dict[str, int] = host.json("status")["events"]
    return {name: count for name, count in found.items() if name.startswith("QUIC_")}


def test_a_connection_outlives_its_clients_addresses(host: Host) -> None:
    reload(host, BY_ID)
    before = events(host)
    first, *rest = asyncio.run(wander(host, PLACES, 20))
    assert first in IDS
    assert rest == [first] * len(PLACES)
    after = events(host)
    assert after["QUIC_BY_ID"] - before.get("QUIC_BY_ID", 0) > 2 * len(PLACES)
    assert after.get("QUIC_UNROUTABLE", 0) == before.get("QUIC_UNROUTABLE", 0)


def test_without_the_option_it_does_not(host: Host) -> None:
    """The same wanderings: what was shown above is the option's doing."""
    reload(host, PLAIN)
    # By addresses alone each place is a toss between the backends: not thirty times the same.
    places = [(CLIENT, port) for port in range(41001, 41031)]
    first, *rest = asyncio.run(wander(host, places, 2))
    assert first in IDS
    assert rest[-1] == "", "another server got the packets"


def test_a_drained_server_keeps_its_connections(host: Host) -> None:
    reload(host, BY_ID)

    async def drained() -> tuple[str, str, str]:
        async with connection(host) as client:
            first = await client.ask()
            name = f"{BACKENDS[IDS.index(first)]}:8443"
            assert host.shunt("backend", "drain", "quic", name).code == 0
            await client.move((CLIENT, 41000))
            second = await client.ask()
        async with connection(host) as other:
            return first, second, await other.ask()

    first, second, other = asyncio.run(drained())
    assert (first, {first, other}) == (second, set(IDS))


def test_it_is_shown(host: Host) -> None:
    reload(host, BY_ID)
    shown = host.json("service", "show", "quic")
    assert shown["quic"] == {"server_id_length": 2, "config_id": 0, "nonce_length": 4}
    assert [row["server_id"] for row in shown["backends"]] == list(IDS)
    assert "server id 2 octets" in host.shunt("service", "show", "quic").out
