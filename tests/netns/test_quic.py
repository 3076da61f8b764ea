# SPDX-License-Identifier: Apache-2.0
"""Real QUIC connections through a real shuntd, whose client gets other ports and addresses.

```
    client ---- router ---- switch ---- lb1        shuntd: nat in both families, and a DSR mode
                                   '---- be1, be2  QUIC servers
```

lab/topology.py draws it in full. The servers make connection ids as draft-ietf-quic-load-balancers
wants them.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic.configuration import QuicConfiguration

from shunt.lab.scenario import SERVICES, LabService
from shunt.lab.shuntd import daemons
from shunt.lab.topology import CLIENT4, CLIENT6, Host
from shunt.lb.model import IPAddress, Mode
from tests.netns.lab_scene import LabScene
from tests.netns.quic_server import ALPN
from tests.scenes import lab_with_servers

IDS = {"be1": "0001", "be2": "0002"}  # by the backend's role
FORMS = [s for s in SERVICES if s.name in {"nat-v4", "nat-v6", "ipip-6in6"}]
forms = pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])
PORT = 8443  # the servers'
PLAIN: dict[str, Any] = {"udp_window": "500ms"}
BY_ID = PLAIN | {"quic": {"server_id_length": 2}}
Place = tuple[IPAddress, int]


def home(form: LabService) -> IPAddress:
    return CLIENT4 if form.vip.version == 4 else CLIENT6


def elsewhere(form: LabService) -> IPAddress:
    return home(form) + 8


def port_of(form: LabService) -> int:
    """The VIP's: the servers' own, where no packet is changed."""
    return 443 if form.mode is Mode.NAT else PORT


def places(form: LabService) -> list[Place]:
    """Where the client is next."""
    ports = [(home(form), port) for port in range(40001, 40005)]
    return [*ports, (elsewhere(form), 40006), (home(form), 40007)]


def name_of(form: LabService, host: Host) -> str:
    """The backend's, as the configuration and commands have it."""
    address = host.addresses[form.backend_version == 6]
    if form.mode is not Mode.NAT:
        return str(address)
    return f"[{address}]:{PORT}" if address.version == 6 else f"{address}:{PORT}"


class Scene(LabScene):
    def document(self, form: LabService, options: dict[str, Any]) -> dict[str, Any]:
        backends: list[dict[str, Any]] = []
        for host in self.lab.backends:
            backend: dict[str, Any] = {"address": str(host.addresses[form.backend_version == 6])}
            if form.mode is Mode.NAT:
                backend["port"] = PORT
            if "quic" in options:
                backend["server_id"] = IDS[host.role]
            backends.append(backend)
        plain = form.document(self.lab.backends)
        return plain | {"ports": [f"{port_of(form)}/udp"], "backends": backends} | options

    def reload(self, form: LabService, options: dict[str, Any]) -> None:
        self.daemon.write_services([self.document(form, options)])
        self.daemon.client.post("reload")

    def events(self) -> dict[str, int]:
        found: dict[str, int] = self.daemon.client.get("status")["events"]
        return {name: count for name, count in found.items() if name.startswith("QUIC_")}


def make_certificate(key: Path, certificate: Path) -> None:
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"),
            *("ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj", "/CN=quic"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:
        entering = lab_with_servers(FORMS, balancer_count=1, backend_count=2)
        lab, _ = stack.enter_context(entering)
        key, certificate = lab.directory / "key.pem", lab.directory / "certificate.pem"
        make_certificate(key, certificate)
        for form in FORMS:
            bits = 24 if form.vip.version == 4 else "64 nodad"
            lab.client.ip(f"addr replace {elsewhere(form)}/{bits} dev eth0")
        logs = []
        for host in lab.backends:
            logs.append(lab.directory / f"quic-{host.role}.log")
            addresses = ",".join(map(str, [*host.addresses, *lab.vips]))
            argv = [sys.executable, "-m", "tests.netns.quic_server", addresses, str(PORT)]
            argv += [IDS[host.role], str(certificate), str(key)]
            stack.callback(host.namespace.start(argv, logs[-1]).stop)
        (daemon,) = stack.enter_context(daemons(lab, [])).values()
        scene = Scene(lab, daemon)
        for form in FORMS:
            scene.reload(form, PLAIN)
        daemon.wait_up(30)
        for log in logs:
            daemon.wait_until(partial(says_ready, log), log.name, 30)
        yield scene


@contextlib.asynccontextmanager
async def connection(scene: Scene, form: LabService) -> AsyncIterator[Client]:
    """A connection through the VIP."""
    configuration = QuicConfiguration(
        is_client=True, alpn_protocols=[ALPN], verify_mode=ssl.CERT_NONE
    )
    with scene.lab.client.inside(), contextlib.ExitStack() as stack:
        async with connect(str(form.vip), port_of(form), configuration=configuration) as found:
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

    async def move(self, place: Place) -> None:
        """From now on it sends from there: the protocol uses the transport it was given last."""
        sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)  # as aioquic's own
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        address, port = place
        sock.bind((f"::ffff:{address}" if address.version == 4 else str(address), port))
        transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: self.protocol, sock=sock
        )
        self._stack.callback(transport.close)


def says_ready(log: Path) -> bool:
    return "ready" in log.read_text()


async def wander(
    scene: Scene, form: LabService, places: Sequence[Place], timeout_s: float
) -> list[str]:
    """One connection, from one place after the other: who answers at each, until nobody does."""
    async with connection(scene, form) as client:
        answers = [await client.ask()]
        for place in places:
            await client.move(place)
            answers.append(await client.ask(timeout_s))
            if not answers[-1]:
                break
        return answers


@forms
def test_a_connection_outlives_its_clients_addresses(scene: Scene, form: LabService) -> None:
    scene.reload(form, BY_ID)
    before, visited = scene.events(), places(form)
    first, *rest = asyncio.run(wander(scene, form, visited, 20))
    assert first in IDS.values()
    assert rest == [first] * len(visited)
    after = scene.events()
    assert after["QUIC_BY_ID"] - before.get("QUIC_BY_ID", 0) > 2 * len(visited)
    assert after.get("QUIC_UNROUTABLE", 0) == before.get("QUIC_UNROUTABLE", 0)


@forms
def test_without_the_option_it_does_not(scene: Scene, form: LabService) -> None:
    """The same wanderings: what was shown above is the option's doing."""
    scene.reload(form, PLAIN)
    # By addresses alone each place is a toss between the backends: not thirty times the same.
    tosses = [(home(form), port) for port in range(41001, 41031)]
    first, *rest = asyncio.run(wander(scene, form, tosses, 1))
    assert first in IDS.values()
    assert rest[-1] == "", "another server got the packets"


@forms
def test_a_drained_server_keeps_its_connections(scene: Scene, form: LabService) -> None:
    scene.reload(form, BY_ID)

    async def drained() -> list[str]:
        async with connection(scene, form) as client:
            first = await client.ask()
            host = next(host for host in scene.lab.backends if IDS[host.role] == first)
            scene.daemon.cli("backend", "drain", form.name, name_of(form, host))
            await client.move((home(form), 41000))
            return [first, await client.ask()]

    def settled() -> bool:
        return not scene.daemon.client.get("status")["slots"]["moving"]

    first, second = asyncio.run(drained())
    # Until then what a DSR mode has not seen may be an older flow, and goes where those went.
    scene.daemon.wait_until(settled, "the slots' windows are over")
    (other,) = asyncio.run(wander(scene, form, [], 20))
    assert (first, {first, other}) == (second, set(IDS.values()))


def test_it_is_shown(scene: Scene) -> None:
    form = FORMS[0]
    scene.reload(form, BY_ID)
    shown = scene.daemon.client.get("services", form.name)
    assert shown["quic"] == {"server_id_length": 2, "config_id": 0, "nonce_length": 4}
    assert [row["server_id"] for row in shown["backends"]] == list(IDS.values())
    assert "server id 2 octets" in scene.daemon.cli("service", "show", form.name).stdout
