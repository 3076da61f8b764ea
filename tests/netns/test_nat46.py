# SPDX-License-Identifier: Apache-2.0
"""Clients of one family and backends of the other, with real sockets and 1500 bytes everywhere.

```
    client ---- router ---- switch ---- lb1        shuntd: mode nat, from IPv4 to IPv6 and back
          1500         1500         '---- be1, be2  HTTP and echo servers
```

lab/topology.py draws it in full.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import pytest

from shunt.lab.scenario import HEALTH, LabService
from shunt.lab.servers import BIG_BYTES, ECHO_PORT, HTTP_PORT
from shunt.lab.shuntd import daemons
from shunt.lb.model import Mode
from tests.netns.iperf import LISTEN, TRANSFERS, arrives
from tests.netns.lab_scene import LabScene, set_mtus, until, until_refused
from tests.scenes import lab_with_servers

MTU, NARROW_MTU = 1500, 1400
CLOSED_PORT = 9  # of every service, and no server of it
IP_MTU, IPV6_MTU, SO_NO_CHECK = 14, 24, 11
SERVICES = (
    LabService("nat-4to6", Mode.NAT, ip_address("198.51.100.46"), 6),
    LabService("nat-6to4", Mode.NAT, ip_address("2001:db8:b::64"), 4),
)
services = pytest.mark.parametrize("service", SERVICES, ids=[s.name for s in SERVICES])


class Scene(LabScene):
    def udp(self, service: LabService, port: int) -> socket.socket:
        return self.dial(service.vip, port, socket.SOCK_DGRAM)


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with lab_with_servers((), balancer_count=1, backend_count=2) as (lab, _):
        set_mtus(lab, MTU)
        documents, alone = [s.document(lab.backends) for s in SERVICES], list[dict[str, Any]]()
        for document in documents:
            document["ports"].append(f"{CLOSED_PORT}/udp")
            # iperf3 has two connections, to the same server.
            one = {"name": f"{document['name']}-iperf3", "ports": [LISTEN, f"{LISTEN}/udp"]}
            first = {"backends": document["backends"][:1], "health": HEALTH | {"port": HTTP_PORT}}
            alone.append(document | one | first)
        documents += alone
        with daemons(lab, documents) as started:
            (daemon,) = started.values()
            daemon.wait_up(30)
            yield Scene(lab, daemon)


@services
def test_http_there_and_back(scene: Scene, service: LabService) -> None:
    """A quarter of a megabyte each way. The server sees an address of the balancer's."""
    own = scene.lab.balancers[0].addresses[service.backend_version == 6]
    with scene.counts("SENT_TO_BACKEND", "SENT_TO_CLIENT"):
        name, peer = scene.curl(service.vip, "/").split()
        assert name in {host.role for host in scene.lab.backends}
        assert ip_address(peer) == own
        big = scene.curl(service.vip, "/big")
        assert len(big) >= BIG_BYTES
        assert set(big.splitlines()) == {"shunt"}
    for _ in range(20):
        scene.curl(service.vip, "/")


@services
@TRANSFERS
def test_iperf3(scene: Scene, service: LabService, options: tuple[str, ...]) -> None:
    server = scene.lab.backends[0].namespace
    log = scene.lab.directory / "iperf3.log"
    arrives(scene.lab.client, server, log, str(service.vip), LISTEN, *options)


@services
@pytest.mark.parametrize("size", [0, 1, 999, 1452])
def test_udp_there_and_back(scene: Scene, service: LabService, size: int) -> None:
    payload = bytes(i & 0xFF for i in range(size))
    with scene.udp(service, ECHO_PORT) as client:
        client.send(payload)
        # The answer is `NAME PEER ` before what was sent, which may be more than fits.
        if size < 1400:
            assert client.recv(65535).split(b" ", 2)[2] == payload


def test_a_datagram_without_a_checksum_arrives(scene: Scene) -> None:
    service = SERVICES[0]
    with scene.udp(service, ECHO_PORT) as client:
        client.setsockopt(socket.SOL_SOCKET, SO_NO_CHECK, 1)
        client.send(b"no sum" * 100)
        assert client.recv(65535).split(b" ", 2)[2] == b"no sum" * 100


def test_a_client_learns_what_fits(scene: Scene) -> None:
    """20 bytes less than its own link, since an IPv6 header is 20 bytes larger."""
    with scene.counts("SENT_TOO_BIG"), scene.udp(SERVICES[0], ECHO_PORT) as client:
        client.send(bytes(MTU - 28))
        told = MTU - 20
        until(lambda: client.getsockopt(socket.IPPROTO_IP, IP_MTU) == told, "the client was told")
        client.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER: DF, and say so
        with pytest.raises(OSError, match="too long") as caught:
            client.send(bytes(MTU - 20 - 28 + 1))
        assert caught.value.errno == errno.EMSGSIZE


@services
def test_path_mtu_discovery_across_the_families(scene: Scene, service: LabService) -> None:
    """A router towards the client takes less; its error reaches the backend in its own family."""
    with scene.narrow(NARROW_MTU), scene.counts("SENT_ERROR_TO_BACKEND"):
        assert len(scene.curl(service.vip, "/big")) >= BIG_BYTES


@services
def test_an_error_of_a_backend_reaches_the_client(scene: Scene, service: LabService) -> None:
    """The backend has no such port. The client's socket knows the error by the quote."""
    with scene.counts("SENT_ERROR_TO_CLIENT"), scene.udp(service, CLOSED_PORT) as client:
        until_refused(client)


@services
def test_explain_tells_of_the_other_family(scene: Scene, service: LabService) -> None:
    client = "192.0.2.2" if service.vip.version == 4 else "[2001:db8:1::2]"
    vip = f"[{service.vip}]" if service.vip.version == 6 else str(service.vip)
    ends = "--from", f"{client}:4000", "--to", f"{vip}:80"
    done = scene.daemon.cli("explain", *ends, "--on", "eth0")
    assert "sent-to-backend" in done.stdout
    own = scene.lab.balancers[0].addresses[service.backend_version == 6]
    assert str(own) in done.stdout


@services
def test_the_ports_taken_towards_each_backend(scene: Scene, service: LabService) -> None:
    own = str(scene.lab.balancers[0].addresses[service.backend_version == 6])

    def rows() -> list[Any]:
        found: list[Any] = scene.daemon.client.get("nat", "top")["destinations"]
        return [row for row in found if row["own"] == own and row["protocol"] == "tcp"]

    scene.curl(service.vip, "/")
    scene.daemon.wait_until(lambda: bool(rows()), "a scan has seen the flow", 60)
    assert all(0 < row["taken"] < row["ports"] == 20000 for row in rows())
    shown = scene.daemon.cli("nat", "list", "--top", "1").stdout.splitlines()
    assert shown[0].split() == ["BACKEND", "PROTOCOL", "OWN", "TAKEN", "PORTS", "SHARE", "REFUSED"]
    assert len(shown) == 2


def test_a_listener_on_one_of_nats_ports_is_told(scene: Scene) -> None:
    daemon, host = scene.daemon, scene.lab.balancers[0]
    files = "--config", str(daemon.config), "--services", str(daemon.services)

    def doctor() -> str:
        return daemon.cli("doctor", *files, check=False).stdout

    assert "10000-29999 are nobody else's" in doctor()
    with host.namespace.inside():
        listener = socket.create_server(("", 12345))
    with listener:
        assert "a listener on 12345/tcp" in doctor()


def test_a_backend_without_an_address_to_come_from(scene: Scene) -> None:
    """Found out before a packet is lost: it gets none, and it is said why."""
    lab, daemon = scene.lab, scene.daemon
    host, service = lab.balancers[0], SERVICES[1]

    def reasons() -> list[str]:
        return [b["reason"] for b in daemon.backends() if b["service"] == service.name]

    host.namespace.ip(f"addr del {host.address4}/24 dev eth0", "route add 10.0.0.0/24 dev eth0")
    try:
        daemon.wait_until(lambda: all("mode nat puts" in r for r in reasons()), "says so")
        files = "--config", str(daemon.config), "--services", str(daemon.services)
        told = daemon.cli("doctor", *files, check=False).stdout
        assert "cannot be reached from an address of this host" in told
    finally:
        host.namespace.ip("route del 10.0.0.0/24 dev eth0", f"addr add {host.address4}/24 dev eth0")
    daemon.wait_up()
