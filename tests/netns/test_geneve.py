# SPDX-License-Identifier: Apache-2.0
"""Mode dsr-geneve with real sockets, ports that differ, and 1500 bytes everywhere.

```
    client ---- router ---- switch ---- lb1        shuntd: mode dsr-geneve, either in either
          1500         1500         '---- be1, be2  HTTP and echo servers; decap; no VIP on `lo`
```

lab/topology.py draws it in full. Answers go straight to the router.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import pytest

from shunt.lab.scenario import HEALTH, LabService
from shunt.lab.servers import BIG_BYTES, ECHO_PORT, HTTP_PORT
from shunt.lab.shuntd import attach_decap, daemons
from shunt.lab.topology import BPFFS, CLIENT4, CLIENT6, Host
from shunt.lb.model import Mode
from shunt.xdp import decap
from tests.netns.iperf import LISTEN, TRANSFERS, arrives
from tests.netns.lab_scene import TIMEOUT_S, LabScene, set_mtus, until_refused
from tests.scenes import lab_with_servers

MTU, NARROW_MTU = 1500, 1400
WEB, ECHO, CLOSED, IPERF3 = 8000, 7007, 7009, 8001  # the VIPs' ports
CLOSED_PORT = 9  # of every backend, and no server there
IP_MTU, IPV6_MTU, IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, DO = 14, 24, 10, 23, 2
OUTER_BYTES = {4: 60, 6: 80}
SOURCE_PORTS = itertools.count(20000)
SERVICES = (
    LabService("4in4", Mode.DSR_GENEVE, ip_address("203.0.113.44"), 4),
    LabService("6in6", Mode.DSR_GENEVE, ip_address("2001:db8:a::66"), 6),
    LabService("4in6", Mode.DSR_GENEVE, ip_address("203.0.113.46"), 6),
    LabService("6in4", Mode.DSR_GENEVE, ip_address("2001:db8:a::64"), 4),
)
services = pytest.mark.parametrize("service", SERVICES, ids=[s.name for s in SERVICES])


def documents(service: LabService, backends: list[Host]) -> Iterator[dict[str, Any]]:
    """A service for each port of the backends."""
    for name, ports, port in (
        ("web", [WEB], HTTP_PORT),
        ("echo", [f"{ECHO}/tcp", f"{ECHO}/udp"], ECHO_PORT),
        ("closed", [f"{CLOSED}/udp"], CLOSED_PORT),
    ):
        addresses = [host.addresses[service.backend_version == 6] for host in backends]
        yield {
            "name": f"{service.name}-{name}",
            "mode": "dsr-geneve",
            "vip": str(service.vip),
            "ports": ports,
            "backends": [{"address": str(address), "port": port} for address in addresses],
            "health": HEALTH,
        }
    # iperf3 has two connections, to the same server.
    address = backends[0].addresses[service.backend_version == 6]
    yield {
        "name": f"{service.name}-iperf3",
        "mode": "dsr-geneve",
        "vip": str(service.vip),
        "ports": [IPERF3, f"{IPERF3}/udp"],
        "backends": [{"address": str(address), "port": LISTEN}],
        "health": HEALTH | {"port": HTTP_PORT},
    }


class Scene(LabScene):
    def web(self, service: LabService, path: str, *more: str) -> str:
        return self.curl(service.vip, path, *more, port=WEB)

    def connect(
        self, service: LabService, kind: socket.SocketKind, port: int = ECHO
    ) -> socket.socket:
        """Two VIPs lead to one port here: a datagram's flow of the other may still have an
        ephemeral one."""
        return self.dial(service.vip, port, kind, next(SOURCE_PORTS))

    def decaps(self) -> list[decap.Decap]:
        found = []
        for host in self.lab.backends:
            with host.namespace.inside():
                found += decap.status(BPFFS / f"{self.lab.name}-{host.role}")
        return found

    def counted(self, name: str) -> int:
        """By decap, on all backends."""
        return sum(one.packets[name] for one in self.decaps())


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with lab_with_servers((), balancer_count=1, backend_count=2) as (lab, _):
        set_mtus(lab, MTU)
        for host in lab.backends:
            attach_decap(lab, host, host.addresses)
        wanted = [document for s in SERVICES for document in documents(s, lab.backends)]
        with daemons(lab, wanted) as started:
            (daemon,) = started.values()
            daemon.wait_up(30)
            yield Scene(lab, daemon)


@services
def test_http_there_and_back(scene: Scene, service: LabService) -> None:
    """The server sees the client itself (S41). A quarter of a megabyte comes back."""
    with scene.counts("SENT_TO_BACKEND"):
        name, peer = scene.web(service, "/").split()
        assert name in {host.role for host in scene.lab.backends}
        assert ip_address(peer) == (CLIENT4 if service.vip.version == 4 else CLIENT6)
        big = scene.web(service, "/big")
        assert len(big) >= BIG_BYTES
        assert set(big.splitlines()) == {"shunt"}
    seen = {scene.web(service, "/").split()[0] for _ in range(30)}
    assert seen == {host.role for host in scene.lab.backends}


@services
@TRANSFERS
def test_iperf3(scene: Scene, service: LabService, options: tuple[str, ...]) -> None:
    server = scene.lab.backends[0].namespace
    log = scene.lab.directory / "iperf3.log"
    arrives(scene.lab.client, server, log, str(service.vip), IPERF3, *options)


@services
def test_what_a_client_sends_fits_at_once(scene: Scene, service: LabService) -> None:
    """The SYN-ACK's MSS leaves room: no segment is ever too big, and nobody had to be told."""
    before = scene.reasons(), scene.counted("clamped")
    body = scene.lab.directory / "upload"
    body.write_bytes(b"u" * 300_000)
    scene.web(service, "/", "--data-binary", f"@{body}", "-H", "Expect:")
    after = scene.reasons()
    for reason in ("SENT_TOO_BIG", "DROP_TOO_BIG"):
        assert after.get(reason, 0) == before[0].get(reason, 0)
    assert scene.counted("clamped") > before[1]
    with scene.connect(service, socket.SOCK_STREAM) as client:
        largest = MTU - OUTER_BYTES[service.backend_version]
        headers = 40 if service.vip.version == 4 else 60
        mss = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
        assert largest - headers - 12 <= mss <= largest - headers  # 12: timestamps


@services
@pytest.mark.parametrize("size", [0, 1, 999, 1300])
def test_udp_there_and_back(scene: Scene, service: LabService, size: int) -> None:
    payload = bytes(i & 0xFF for i in range(size))
    for _ in range(5):
        with scene.connect(service, socket.SOCK_DGRAM) as client:
            client.send(payload)
            assert client.recv(65535).split(b" ", 2)[2] == payload


@services
def test_a_large_datagram_is_told_of_and_then_fits(scene: Scene, service: LabService) -> None:
    """The client's stack learns what fits; its fragments, and those of the answer, arrive (S22)."""
    version = service.vip.version
    level = socket.IPPROTO_IP if version == 4 else socket.IPPROTO_IPV6
    payload = bytes(i * 7 & 0xFF for i in range(60_000))
    with scene.counts("SENT_TOO_BIG"), scene.connect(service, socket.SOCK_DGRAM) as client:
        client.settimeout(1)
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            client.send(payload)
            with contextlib.suppress(OSError):  # EMSGSIZE, on being told
                assert client.recv(65535).split(b" ", 2)[2] == payload
                break
            assert time.monotonic() < deadline
        known = client.getsockopt(level, IP_MTU if version == 4 else IPV6_MTU)
        assert known == MTU - OUTER_BYTES[service.backend_version]
        client.setsockopt(level, IP_MTU_DISCOVER if version == 4 else IPV6_MTU_DISCOVER, DO)
        with pytest.raises(OSError, match="too long"):
            client.send(bytes(known))


@services
def test_a_connection_goes_on_when_decap_is_set_anew(scene: Scene, service: LabService) -> None:
    with scene.connect(service, socket.SOCK_STREAM) as client:
        for turn in range(4):
            client.sendall(b"%d\n" % turn)
            assert b"%d\n" % turn in client.recv(1000)
            for host in scene.lab.backends:
                attach_decap(scene.lab, host, host.addresses)
        client.shutdown(socket.SHUT_WR)


@services
def test_path_mtu_discovery_of_the_backend(scene: Scene, service: LabService) -> None:
    """A router towards the client takes less; its error comes through the tunnel, translated."""
    with scene.narrow(NARROW_MTU), scene.counts("SENT_ERROR_TO_BACKEND"):
        for _ in range(20):  # both backends
            assert len(scene.web(service, "/big")) >= BIG_BYTES


@services
def test_an_error_of_a_backend_reaches_the_client(scene: Scene, service: LabService) -> None:
    """The backend has no such port. The client's socket knows the error by the quote."""
    with scene.connect(service, socket.SOCK_DGRAM, CLOSED) as client:
        until_refused(client)


@services
def test_explain_tells_of_it(scene: Scene, service: LabService) -> None:
    client = f"[{CLIENT6}]" if service.vip.version == 6 else str(CLIENT4)
    vip = f"[{service.vip}]" if service.vip.version == 6 else str(service.vip)
    ends = "--from", f"{client}:4000", "--to", f"{vip}:{WEB}"
    done = scene.daemon.cli("explain", *ends, "--on", "eth0")
    assert "sent-to-backend" in done.stdout
    assert "dsr-geneve" in done.stdout
    (told,) = [line for line in done.stdout.splitlines() if "wrapped in Geneve" in line]
    backend = service.vip
    if service.backend_version == service.vip.version:
        backend = next(
            host.addresses[service.backend_version == 6]
            for host in scene.lab.backends
            if str(host.addresses[service.backend_version == 6]) in told
        )
    to = f"[{backend}]" if backend.version == 6 else str(backend)
    assert told.endswith(f"in it tcp {client}:4000 > {to}:{HTTP_PORT}")


def test_decap_shows_what_it_did(scene: Scene) -> None:
    scene.web(SERVICES[0], "/")
    host = scene.lab.backends[0]
    for one in scene.decaps():
        assert one.flows > 0
        assert one.flows_max == decap.DEFAULT_FLOWS
        assert one.packets["answered"] > 0
        assert one.answers in {"tcx", "clsact"}
    assert scene.decaps()[0].addresses == host.addresses


def test_a_client_may_talk_to_the_backend_itself(scene: Scene) -> None:
    """Beside it, with a tuple of its own; nothing of that is touched."""
    host = scene.lab.backends[0]
    before = scene.counted("answered")
    body = scene.lab.client.run("curl", "-sS", "-m", "10", f"http://{host.address4}/").stdout
    assert body.split() == [host.role, str(CLIENT4)]
    assert scene.counted("answered") == before
