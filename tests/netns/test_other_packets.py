# SPDX-License-Identifier: Apache-2.0
"""What is no plain packet, with real sockets: path MTU discovery, large datagrams, errors, ping.

```
    client ---- router ---- switch ---- lb1        shuntd: every mode, both families
          1400         1600        '---- be1, be2  HTTP and echo servers, on all VIPs
```

lab/topology.py draws it in full. The router's route to the client has a smaller MTU than backends
know of: what they send is too big there, and the router's errors go to the VIP.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from shunt.lab.scenario import SERVICES, LabService
from shunt.lab.servers import BIG_BYTES, ECHO_PORT
from shunt.lab.shuntd import daemons
from shunt.lab.topology import CLIENT4, CLIENT6
from shunt.lb.model import Mode
from tests.netns.lab_scene import LabScene, until, until_refused
from tests.netns.parts import send_part
from tests.scenes import lab_with_servers

WAN_MTU = 1400
CLOSED_PORT = 9  # of every service, and no server of it
LARGE = 60_000

services = pytest.mark.parametrize("service", SERVICES, ids=[s.name for s in SERVICES])


class Scene(LabScene):
    def udp(self, service: LabService, port: int) -> socket.socket:
        return self.dial(service.vip, port, socket.SOCK_DGRAM)


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with lab_with_servers(balancer_count=1, backend_count=2) as (lab, _):
        documents = [s.document(lab.backends) for s in SERVICES]
        for document in documents:
            document["ports"].append(f"{CLOSED_PORT}/udp")
        with daemons(lab, documents) as started:
            (daemon,) = started.values()
            daemon.wait_up()
            yield Scene(lab, daemon)


@pytest.fixture
def narrow(scene: Scene) -> Iterator[None]:
    """The way to the client takes WAN_MTU, and nobody knows yet."""
    with scene.narrow(WAN_MTU):
        yield


def known_mtus(scene: Scene, service: LabService) -> set[int]:
    """What the backends have learnt of the way to the client (nat: as they see it)."""
    version = service.vip.version
    to = CLIENT4 if version == 4 else CLIENT6
    if service.mode is Mode.NAT:
        to = scene.lab.balancers[0].addresses[version == 6]
    found = set()
    for host in scene.lab.backends:
        shown = host.namespace.run("ip", "-j", "route", "get", str(to)).stdout
        for route in json.loads(shown):
            found |= {metric["mtu"] for metric in route.get("metrics", []) if "mtu" in metric}
    return found


@services
@pytest.mark.usefixtures("narrow")
def test_path_mtu_discovery_through_a_vip(scene: Scene, service: LabService) -> None:
    """The backend's large segments meet the router; its error finds the backend, by way of the
    VIP. Without it nothing arrives but what is small."""
    with scene.counts("SENT_ERROR_TO_BACKEND"):
        assert len(scene.curl(service.vip, "/big")) >= BIG_BYTES
    assert known_mtus(scene, service) == {WAN_MTU}


@services
def test_a_datagram_of_60_kb_in_fragments(scene: Scene, service: LabService) -> None:
    """There, and (from the echo server) back again."""
    payload = bytes(range(256)) * (LARGE // 256)
    with scene.udp(service, ECHO_PORT) as client:
        until(lambda: echoed(client, payload), "the datagram came back")
        before = scene.reasons()
        assert echoed(client, payload)
        after = scene.reasons()
    passed = after["SENT_TO_BACKEND"] - before["SENT_TO_BACKEND"]
    assert passed >= len(payload) // 1500
    if service.mode is Mode.NAT:
        assert after["SENT_TO_CLIENT"] - before.get("SENT_TO_CLIENT", 0) >= len(payload) // 1600
    assert scene.daemon.client.get("status")["events"]["FRAGMENT_FIRST"] > 0


@services
def test_fragments_for_a_vip_that_came_before_their_first_are_counted(
    scene: Scene, service: LabService
) -> None:
    early_ones_are_counted(scene, service)


def early_ones_are_counted(scene: Scene, service: LabService) -> None:
    """Those for the balancer itself are not."""
    version = service.vip.version
    source = str(CLIENT4 if version == 4 else CLIENT6)
    own = str(scene.lab.balancers[0].addresses[version == 6])

    def early() -> int:
        return int(scene.daemon.client.get("status")["events"].get("FRAGMENT_EARLY", 0))

    before = early()
    for to in (own, str(service.vip), own, str(service.vip)):
        send_part(scene.lab.client, source, to)
    until(lambda: early() - before >= 2, "those for the VIP are counted")
    assert early() - before == 2


def echoed(client: socket.socket, payload: bytes) -> bool:
    """Whether the answer is `NAME PEER ` and what was sent. A lost fragment loses it."""
    client.send(payload)
    client.settimeout(3)
    try:
        return client.recv(65535).split(b" ", 2)[2] == payload
    except TimeoutError:
        return False


@pytest.mark.parametrize("service", [s for s in SERVICES if s.mode is Mode.NAT], ids=["4", "6"])
def test_an_error_about_a_translated_packet_reaches_the_client(
    scene: Scene, service: LabService
) -> None:
    """The backend has no such port. The client's socket knows the error by the quote."""
    with scene.counts("SENT_ERROR_TO_CLIENT"), scene.udp(service, CLOSED_PORT) as client:
        until_refused(client)


@services
def test_ping_is_answered_while_a_backend_lives(scene: Scene, service: LabService) -> None:
    def ping(count: int = 3) -> bool:
        argv = ["ping", "-c", str(count), "-i", "0.2", "-W", "2", "-s", "1000", str(service.vip)]
        return scene.lab.client.run(*argv, check=False).returncode == 0

    with scene.counts("SENT_ECHO_REPLY"):
        assert ping()
    document = service.document(scene.lab.backends)
    document["ports"].append(f"{CLOSED_PORT}/udp")
    try:
        scene.daemon.write_services([document | {"echo": "off"}])
        until(lambda: not ping(1), "no answer where echo is off")
        early_ones_are_counted(scene, service)
        scene.daemon.write_services([document | {"backends": []}])
        until(lambda: service.name in told(scene) and not ping(1), "no answer without backends")
        scene.daemon.write_services([document])
        until(lambda: ping(1), "an answer again")
    finally:
        scene.daemon.write_services([document])
        scene.daemon.wait_up()


def told(scene: Scene) -> dict[str, Any]:
    return {s["name"]: s for s in scene.daemon.client.get("services")["services"]}
