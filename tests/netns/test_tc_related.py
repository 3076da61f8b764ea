# SPDX-License-Identifier: Apache-2.0
"""What is no plain packet, by TC with real sockets: errors, fragments, answers, hairpins.

```
    far: eth0 ---- far0 :client: eth0 ---- eth0 :node: pod0 ---- eth0 :pod
         198.51.100.2   takes 1300 bytes        shuntd; in one test its route to the pod takes 1400
         2001:db8:f::2
```

The rest, and the servers, are test_tc_datapath.py's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from scapy.layers.inet import TCP
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from shunt.lab.netns import Namespace, cable
from tests.netns.lab_scene import is_refused
from tests.netns.parts import send_part
from tests.netns.reasons import leaving, packets
from tests.netns.shunt_host import Host
from tests.netns.test_tc_datapath import (
    CLIENT_ADDR,
    FAMILIES,
    HERE,
    NODE_ADDR,
    PLACES,
    POD,
    POD_ADDR,
    a_node,
    describe,
    echoed,
)
from tests.packets.frames import verify

NOBODY = {4: "203.0.113.3", 6: "2001:db8:a::3"}  # has no backend
CLOSED_PORT, OWN_PORT = 9, 5301  # of the services and their backends: nobody listens; a test does
FAR_MTU, POD_MTU = 1300, 1400
CSUM_NOT_READY = 8  # TP_STATUS_CSUMNOTREADY of PACKET_AUXDATA


@dataclass
class Scene:
    host: Host
    pod: Namespace
    far: Namespace

    def reasons(self) -> dict[str, int]:
        return packets(self.host.json("status"))

    def counts(self, reason: str) -> contextlib.AbstractContextManager[None]:
        return leaving(self.reasons, reason)


def extra(host: Host, mode: str, only: str = "") -> None:
    """Ports that nobody serves; and a VIP without backends."""
    for name, vips, backends in (("here", HERE, NODE_ADDR), ("pod", POD, POD_ADDR)):
        for ip in (4, 6) if only in ("", name) else ():
            address = backends[ip] if ip == 4 else f"[{backends[ip]}]"
            for port in (CLOSED_PORT, OWN_PORT):
                document: dict[str, object] = {
                    "vip": vips[ip],
                    "ports": [f"{port}/udp"],
                    "mode": mode,
                }
                unique = f"{name}-{ip}-{port}"
                host.write(unique, {"name": unique, "backends": [f"{address}:{port}"], **document})
    for ip in (4, 6):
        document = {"vip": NOBODY[ip], "ports": [80, "53/udp"], "mode": mode, "backends": []}
        host.write(f"nobody-{ip}", {"name": f"nobody-{ip}", **document})


@contextlib.contextmanager
def a_scene(name: str, mode: str, only: str = "", **settings: object) -> Iterator[Scene]:
    with a_node(name, interfaces=["eth0", "pod0"], **settings) as (host, pod):
        far = Namespace.create(f"shunt-{name}-{os.getpid()}-far")
        try:
            cable(host.outside, "far0", far, "eth0")
            host.outside.ip(
                "addr add 198.51.100.1/24 dev far0", "addr add 2001:db8:f::1/64 dev far0 nodad",
                # Of the routes, not the link: its other end would send into it what it drops.
                f"route replace 198.51.100.0/24 dev far0 mtu lock {FAR_MTU}",
                f"route replace 2001:db8:f::/64 dev far0 mtu {FAR_MTU} metric 1",
            )  # fmt: skip
            host.outside.sysctl({"ipv4.ip_forward": 1, "ipv6.conf.all.forwarding": 1})
            far.ip(
                "addr add 198.51.100.2/24 dev eth0", "addr add 2001:db8:f::2/64 dev eth0 nodad",
                "route add default via 198.51.100.1", "route add default via 2001:db8:f::1",
            )  # fmt: skip
            host.here.ip(
                "route add 198.51.100.0/24 via 192.0.2.2",
                "route add 2001:db8:f::/64 via 2001:db8:c::2",
            )
            for namespace in (host.here, pod):  # errors are not rationed while we look
                namespace.sysctl({"ipv4.icmp_ratelimit": 0, "ipv6.icmp.ratelimit": 0})
            describe(host, mode=mode, only=only)
            extra(host, mode, only)
            host.start()
            yield Scene(host, pod, far)
        finally:
            far.delete()


@pytest.fixture(scope="module")
def local() -> Iterator[Scene]:
    """XDP is there, too, and leaves it to TC."""
    with a_scene("trl", "local") as scene:
        yield scene


@pytest.fixture(scope="module")
def remote() -> Iterator[Scene]:
    """No XDP; the pod is another host."""
    with a_scene("trr", "nat", "pod", xdp="off") as scene:
        yield scene


@pytest.fixture(params=["local", "remote"])
def either(request: pytest.FixtureRequest) -> Scene:
    scene: Scene = request.getfixturevalue(request.param)
    return scene


def tcp(namespace: Namespace, vip: str, port: int = 80) -> socket.socket:
    with namespace.inside():
        return socket.create_connection((vip, port), timeout=10)


def udp(namespace: Namespace, ip: int) -> socket.socket:
    with namespace.inside():
        sock = socket.socket(socket.AF_INET6 if ip == 6 else socket.AF_INET, socket.SOCK_DGRAM)
    sock.settimeout(5)
    return sock


# Errors -------------------------------------------------------------------------------------


@FAMILIES
@PLACES
def test_a_backends_error_reaches_the_client(local: Scene, vips: dict[int, str], ip: int) -> None:
    with local.counts("SENT_ERROR_TO_CLIENT"), udp(local.host.outside, ip) as client:
        client.connect((vips[ip], CLOSED_PORT))
        assert is_refused(client)


@FAMILIES
def test_another_hosts_error_reaches_the_client(remote: Scene, ip: int) -> None:
    with remote.counts("SENT_ERROR_TO_CLIENT"), udp(remote.host.outside, ip) as client:
        client.connect((POD[ip], CLOSED_PORT))
        assert is_refused(client)


@FAMILIES
@PLACES
def test_a_clients_error_reaches_the_backend(local: Scene, vips: dict[int, str], ip: int) -> None:
    at = local.host.here if vips is HERE else local.pod
    backend = (NODE_ADDR if vips is HERE else POD_ADDR)[ip]
    answered_by_nobody(local, at, (backend, OWN_PORT), vips[ip], ip)


@FAMILIES
def test_a_clients_error_reaches_another_host(remote: Scene, ip: int) -> None:
    answered_by_nobody(remote, remote.pod, (POD_ADDR[ip], OWN_PORT), POD[ip], ip)


def answered_by_nobody(
    scene: Scene, at: Namespace, backend: tuple[str, int], vip: str, ip: int
) -> None:
    """The client has gone when the backend answers: its host says so, to the VIP."""
    with scene.counts("SENT_ERROR_TO_BACKEND"), udp(at, ip) as server:
        server.bind(backend)
        with udp(scene.host.outside, ip) as client:
            client.sendto(b"question", (vip, OWN_PORT))
            data, peer = server.recvfrom(100)
            assert data == b"question"
        server.connect(peer)
        assert is_refused(server)


@FAMILIES
@PLACES
def test_path_mtu_towards_the_client(local: Scene, vips: dict[int, str], ip: int) -> None:
    """The backend's large segments meet the router, whose errors go to the VIP."""
    with local.counts("SENT_ERROR_TO_BACKEND"), tcp(local.far, vips[ip]) as client:
        assert client.recv(100)
        assert echoed(client, 300_000)
    forget(local, ip)


@FAMILIES
def test_path_mtu_from_another_host_towards_the_client(remote: Scene, ip: int) -> None:
    with remote.counts("SENT_ERROR_TO_BACKEND"), tcp(remote.far, POD[ip]) as client:
        assert client.recv(100)
        assert echoed(client, 300_000)
    forget(remote, ip)


def forget(scene: Scene, ip: int) -> None:
    """What hosts have learnt of paths."""
    for namespace in (scene.host.here, scene.host.outside, scene.pod, scene.far):
        namespace.run("ip", f"-{ip}", "route", "flush", "cache")


@FAMILIES
@pytest.mark.parametrize(
    ("kind", "reason"), [("local", "SENT_ERROR_TO_CLIENT"), ("remote", "SENT_TOO_BIG")]
)
def test_path_mtu_towards_the_pod(
    request: pytest.FixtureRequest, kind: str, reason: str, ip: int
) -> None:
    """The client's large segments do not fit: the node's stack says so, or the program."""
    scene: Scene = request.getfixturevalue(kind)

    def told() -> bool:
        """Every attempt arrives; the agent may learn of the smaller MTU a moment later."""
        before = scene.reasons().get(reason, 0)
        with tcp(scene.host.outside, POD[ip]) as client:
            assert client.recv(100)
            assert echoed(client, 300_000)
        forget(scene, ip)
        return scene.reasons().get(reason, 0) > before

    # The route's alone: the device itself would refuse what the pod sends.
    wide, narrow, wider = {
        4: ("10.8.0.0/24 dev pod0 src 10.8.0.1", "mtu lock", "replace"),
        6: ("fd08::/64 dev pod0 metric 1", "mtu", "del"),
    }[ip]
    scene.host.here.ip(f"route replace {wide} {narrow} {POD_MTU}")
    try:
        scene.host.until(told, "the client was told")
    finally:
        scene.host.here.ip(f"route {wider} {wide}")


# Fragments ----------------------------------------------------------------------------------


def large_one_comes_back(scene: Scene, client: socket.socket, sender: str) -> None:
    """A datagram of many fragments, there and (with a line before it) back again."""
    payload = bytes(i * 7 & 0xFF for i in range(60_000))

    def comes_back() -> bool:
        client.send(payload)
        try:
            line, _, rest = client.recv(65535).partition(b"\n")
        except TimeoutError:  # a fragment was lost
            return False
        except OSError as e:  # the agent may know an earlier test's narrow path a moment longer
            if e.errno != errno.EMSGSIZE:
                raise
            return False
        assert line.decode().split()[0] == sender
        return rest == payload

    scene.host.until(comes_back, "the datagram came back")


@FAMILIES
@PLACES
def test_large_datagrams(local: Scene, vips: dict[int, str], ip: int) -> None:
    with local.counts("SENT_TO_CLIENT"), udp(local.host.outside, ip) as client:
        client.connect((vips[ip], 53))
        large_one_comes_back(local, client, CLIENT_ADDR[ip])
    assert local.host.json("status")["events"]["FRAGMENT_FIRST"] >= 2


@FAMILIES
def test_large_datagrams_to_another_host(remote: Scene, ip: int) -> None:
    with udp(remote.host.outside, ip) as client:
        client.connect((POD[ip], 53))
        large_one_comes_back(remote, client, {4: "10.8.0.1", 6: "fd08::1"}[ip])
    assert remote.host.json("status")["events"]["FRAGMENT_FIRST"] >= 2


@FAMILIES
def test_those_that_came_before_their_first_are_counted_once(either: Scene, ip: int) -> None:
    """Of a VIP, whether XDP has seen them, too, or not; the node's own are not."""

    def early() -> int:
        return int(either.host.json("status")["events"].get("FRAGMENT_EARLY", 0))

    before, expected = early(), 0
    for to in (NODE_ADDR[ip], POD[ip], POD[ip], NODE_ADDR[ip], POD[ip]):
        send_part(either.host.outside, CLIENT_ADDR[ip], to)
        expected += to == POD[ip]
    either.host.until(lambda: early() - before >= expected, "those for the VIP are counted")
    assert early() - before == expected


# Answers ------------------------------------------------------------------------------------


@contextlib.contextmanager
def frames(namespace: Namespace) -> Iterator[Callable[[], Packet]]:
    """Gives the next frame that comes in, its checksums verified: none is left to a device."""
    with namespace.inside():
        raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        raw.bind(("eth0", 3))
    raw.settimeout(5)
    raw.setsockopt(263, 8, 1)  # SOL_PACKET, PACKET_AUXDATA

    def following() -> Packet:
        while True:
            data, aux, _, address = raw.recvmsg(65535, 256)
            if address[2] == socket.PACKET_OUTGOING:
                continue
            if data[12:14] != b"\x08\x06" and Ether(data).payload.src in NOBODY.values():
                (status,) = struct.unpack_from("=I", aux[0][2])
                assert not status & CSUM_NOT_READY
                return verify(data)

    with raw:
        yield following


@FAMILIES
def test_without_backends_clients_are_told(either: Scene, ip: int) -> None:
    outside = either.host.outside
    with frames(outside) as following:
        with either.counts("SENT_RST_NO_BACKEND"), pytest.raises(ConnectionRefusedError):
            tcp(outside, NOBODY[ip])
        assert str(following()[TCP].flags) == "RA"
        with either.counts("SENT_UNREACHABLE"), udp(outside, ip) as client:
            client.connect((NOBODY[ip], 53))
            for size in (0, 1, 1000):
                assert is_refused(client, bytes(size))
                assert len(following()) == {4: 14 + 20 + 8 + 28, 6: 14 + 40 + 8 + 48}[ip]


@FAMILIES
def test_a_vip_with_a_backend_answers_pings(remote: Scene, ip: int) -> None:
    def ping(vip: str) -> bool:
        argv = ("ping", "-c", "2", "-i", "0.2", "-W", "2", "-s", "1000", vip)
        return remote.host.outside.run(*argv, check=False).returncode == 0

    with remote.counts("SENT_ECHO_REPLY"):
        assert ping(POD[ip])
    assert not ping(NOBODY[ip])


# Hairpins -----------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_pod_reaches_itself(request: pytest.FixtureRequest, kind: str, ip: int) -> None:
    asks = POD[ip] if kind == "local" else {4: "10.8.0.1", 6: "fd08::1"}[ip]
    either: Scene = request.getfixturevalue(kind)
    with tcp(either.pod, POD[ip]) as client:
        assert client.recv(100).decode().split()[0] == asks
        assert echoed(client, 1_000_000)
    with udp(either.pod, ip) as client:
        client.connect((POD[ip], 53))
        for size in (0, 1, 1000):
            client.send(b"x" * size)
            line, _, rest = client.recv(2000).partition(b"\n")
            assert (line.decode().split()[0], rest) == (asks, b"x" * size)
        large_one_comes_back(either, client, asks)
    with udp(either.pod, ip) as client:
        client.connect((POD[ip], CLOSED_PORT))
        assert is_refused(client)


@FAMILIES
def test_a_pod_reaches_the_node_by_its_vip(local: Scene, ip: int) -> None:
    """And keeps its address: that is no hairpin."""
    with tcp(local.pod, HERE[ip]) as client:
        assert client.recv(100).decode().split()[0] == POD_ADDR[ip]
        assert echoed(client, 1_000_000)
