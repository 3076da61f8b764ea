# SPDX-License-Identifier: Apache-2.0
"""What leaves the node has its address: real sockets, in the namespaces of test_tc_datapath.py.

There the pod is another host, behind pod0, and the client is also what pods are: behind the node.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from shunt.lab.netns import Namespace, offloads
from tests.netns.shunt_host import Host, at
from tests.netns.test_tc_datapath import (
    CLIENT_ADDR,
    FAMILIES,
    NODE_ADDR,
    POD_ADDR,
    a_node,
    connect,
    echoed,
)

OWN = {4: "10.8.0.1", 6: "fd08::1"}
MIXED, AWAY = {4: "203.0.113.1", 6: "2001:db8:a::1"}, {4: "203.0.113.2", 6: "2001:db8:a::2"}
LATER = {4: "198.51.100.80", 6: "2001:db8:80::1"}  # of the other host, and then a VIP
NEAR = {4: "198.18.0.1", 6: "fd18::1"}  # of the other host, and not to be masqueraded to
MASQUERADE: dict[str, Any] = {
    "interfaces": ["pod0"],
    "sources": ["192.0.2.0/24", "2001:db8:c::/64"],
    "not_to": ["198.18.0.0/15", "fd18::/16"],
}


@pytest.fixture(scope="module", params=["auto", "off"], ids=["xdp", "no-xdp"])
def ends(request: pytest.FixtureRequest) -> Iterator[tuple[Host, Namespace]]:
    with a_node("mq", xdp=request.param, interfaces=["eth0", "pod0"], masquerade=MASQUERADE) as (
        host,
        pod,
    ):
        pod.own(*NEAR.values(), *LATER.values())
        # What comes from elsewhere has no way back but by way of the node's own address.
        pod.ip("route del default", "route del ::/0")
        pod.sysctl({"ipv4.ip_forward": 1})  # so that it says what it knows no way to
        for ip in (4, 6):
            for there in (NEAR[ip], LATER[ip]):
                host.here.ip(f"route add {there} via {POD_ADDR[ip]}")
            for there in (POD_ADDR[ip], NEAR[ip], LATER[ip]):
                host.outside.ip(f"route add {there} via {NODE_ADDR[ip]}")
            both = [at(NODE_ADDR[ip], 8080), at(POD_ADDR[ip], 8080)]
            for name, vip, backends in (("mixed", MIXED, both), ("away", AWAY, both[1:])):
                document = {"name": f"{name}-{ip}", "vip": vip[ip], "ports": [80], "mode": "local"}
                host.write(f"{name}-{ip}", {**document, "backends": backends, "health": "none"})
            document = {"name": f"udp-{ip}", "vip": AWAY[ip], "ports": ["53/udp"], "mode": "local"}
            host.write(f"udp-{ip}", {**document, "backends": [at(POD_ADDR[ip], 5300)]})
        host.start()
        yield host, pod


@pytest.fixture(scope="module")
def node(ends: tuple[Host, Namespace]) -> Host:
    return ends[0]


@pytest.fixture
def wires(ends: tuple[Host, Namespace]) -> Iterator[None]:
    """What XDP's translation needs of these devices: whole checksums, no segments to be made, and
    ends that poll."""
    here = (ends[0].outside, ends[1])
    for end in here:
        offloads(end, "eth0")
        end.run("ethtool", "-K", "eth0", "gro", "on")
    yield
    for end in here:
        end.run("ethtool", "-K", "eth0", "tx", "on", "tso", "on", "gso", "on", "gro", "off")


def peer(client: socket.socket) -> tuple[str, int]:
    address, port = client.recv(100).decode().split()
    return address, int(port)


@FAMILIES
def test_a_backend_elsewhere(node: Host, ip: int) -> None:
    with connect(node, AWAY[ip]) as client:
        address, port = peer(client)
        assert (address, 10000 <= port <= 29999) == (OWN[ip], True)
        assert echoed(client, 3_000_000)


@FAMILIES
def test_a_backend_here_sees_the_client(node: Host, ip: int) -> None:
    """S41, and S37's other half: of one service, by where the backend is."""
    seen = set()
    for _ in range(40):
        with connect(node, MIXED[ip]) as client:
            seen.add(peer(client)[0])
            assert echoed(client, 1000)
    assert seen == {OWN[ip], CLIENT_ADDR[ip]}


@FAMILIES
@pytest.mark.parametrize("to", ["vip", "itself"])
def test_udp(node: Host, ip: int, to: str) -> None:
    with node.outside.inside():
        client = socket.socket(socket.AF_INET6 if ip == 6 else socket.AF_INET, socket.SOCK_DGRAM)
    with client:
        client.settimeout(10)
        client.connect((AWAY[ip], 53) if to == "vip" else (POD_ADDR[ip], 5300))
        for size in (0, 1, 1000):
            client.send(b"x" * size)
            line, _, rest = client.recv(2000).partition(b"\n")
            assert (line.decode().split()[0], rest) == (OWN[ip], b"x" * size)


@FAMILIES
@pytest.mark.parametrize("size", [56, 5000], ids=["small", "fragments"])
def test_pings(node: Host, ip: int, size: int) -> None:
    """The other host knows no way to who asks, so it is the node's address that it answers."""
    argv = ["ping", "-n", "-c", "3", "-i", "0.2", "-W", "5", "-s", str(size), POD_ADDR[ip]]
    both = [
        subprocess.Popen([*node.outside.enter, *argv], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for ping in both:
        out, _ = ping.communicate(timeout=60)
        assert "3 received, 0% packet loss" in out
        assert out.count(f"from {POD_ADDR[ip]}: icmp_seq=") == 3
    name = "icmpv6" if ip == 6 else "icmp"
    rows = [row for row in node.json("nat", "list") if row["protocol"] == name]
    assert len({row["client_port"] for row in rows}) >= 2
    assert {(row["own"], 10000 <= row["own_port"] <= 29999) for row in rows} == {(OWN[ip], True)}


@FAMILIES
def test_a_router_beyond_says_that_a_ping_got_no_further(node: Host, ip: int) -> None:
    """The error quotes what the node sent, and reaches who pinged as if about its own."""
    nowhere = {4: "198.51.100.1", 6: "2001:db8:bad::1"}[ip]
    node.outside.ip(f"route replace {nowhere} via {NODE_ADDR[ip]}")
    node.here.ip(f"route replace {nowhere} via {POD_ADDR[ip]}")
    argv = ["ping", "-n", "-c", "1", "-W", "5", nowhere]
    done = subprocess.run(
        [*node.outside.enter, *argv], capture_output=True, text=True, timeout=60, check=False
    )
    assert f"From {POD_ADDR[ip]}" in done.stdout, done.stdout + done.stderr
    assert "nreachable" in done.stdout


@FAMILIES
def test_large_datagrams(node: Host, ip: int) -> None:
    """S22, and both ways: the answer is as long."""
    with node.outside.inside():
        client = socket.socket(socket.AF_INET6 if ip == 6 else socket.AF_INET, socket.SOCK_DGRAM)
    with client:
        client.settimeout(10)
        client.connect((POD_ADDR[ip], 5300))
        for size in (3000, 30_000):
            client.send(b"y" * size)
            line, _, rest = client.recv(65536).partition(b"\n")
            assert (line.decode().split()[0], rest) == (OWN[ip], b"y" * size)


@FAMILIES
def test_the_world_sees_the_node(node: Host, ip: int) -> None:
    with connect(node, POD_ADDR[ip], 8080) as client:
        address, port = peer(client)
        assert (address, 10000 <= port <= 29999) == (OWN[ip], True)
        assert echoed(client, 3_000_000)
        own = client.getsockname()[1]
        rows = [row for row in node.json("nat", "list") if row["client_port"] == own]
        (row,) = [row for row in rows if row["vip"] == POD_ADDR[ip]]
        assert (row["service"], row["backend"]) == ("", "")
        assert (row["own"], row["own_port"]) == (OWN[ip], port)


@FAMILIES
@pytest.mark.usefixtures("wires")
@pytest.mark.parametrize("mode", ["local", "nat"])
def test_connections_outlive_a_vip_that_comes_where_they_go(node: Host, ip: int, mode: str) -> None:
    """New ones are for its service: here of a backend on the node, or of the other host by XDP."""
    backend, seen = {
        "local": (NODE_ADDR[ip], CLIENT_ADDR[ip]),
        "nat": (POD_ADDR[ip], OWN[ip]),
    }[mode]
    document = {"name": "later", "vip": LATER[ip], "ports": [8080], "mode": mode}
    with connect(node, LATER[ip], 8080) as client:
        assert peer(client)[0] == OWN[ip]
        node.write("later", {**document, "backends": [at(backend, 8080)], "health": "none"})
        try:
            node.until(lambda: serves(node, "later"), "the VIP is a service's")
            assert echoed(client, 300_000)
            source = at(*client.getsockname()[:2])
            ends = ("--from", source, "--to", at(LATER[ip], 8080), "--flags", "ack")
            told = node.shunt("explain", *ends, "--on", "eth0").out
            assert "leaves the node masqueraded" in told
            with connect(node, LATER[ip], 8080) as anew:
                assert peer(anew)[0] == seen
                assert echoed(anew, 1000)
                assert echoed(client, 1000)
        finally:
            (node.services / "later.yaml").unlink()
            node.until(lambda: not serves(node, "later"), "it is gone")


def serves(node: Host, name: str) -> bool:
    return any(row["name"] == name for row in node.json("service", "list"))


@FAMILIES
def test_not_to_those_that_know_the_way(node: Host, ip: int) -> None:
    with node.outside.inside():
        other = socket.socket(socket.AF_INET6 if ip == 6 else socket.AF_INET, socket.SOCK_STREAM)
    with other:
        other.settimeout(0.5)
        with pytest.raises(TimeoutError):  # it leaves as it is, and the other host knows no way
            other.connect((NEAR[ip], 8080))
    assert node.json("status")["problems"] == []


@FAMILIES
def test_many_short_connections(node: Host, ip: int) -> None:
    for _ in range(200):
        with connect(node, AWAY[ip]) as client:
            assert client.recv(100)


@FAMILIES
def test_connections_outlive_the_daemon(node: Host, ip: int) -> None:
    with connect(node, AWAY[ip]) as to_vip, connect(node, POD_ADDR[ip], 8080) as direct:
        assert to_vip.recv(100)
        assert direct.recv(100)
        assert node.process is not None
        node.process.kill()
        with connect(node, AWAY[ip]) as fresh:
            assert fresh.recv(100)
        node.start()
        assert echoed(to_vip, 100_000)
        assert echoed(direct, 100_000)


def test_another_address_of_the_node(node: Host) -> None:
    node.here.ip("addr add 10.8.0.99/24 dev pod0")  # a further one changes nothing
    with connect(node, AWAY[4]) as client:
        assert peer(client)[0] == OWN[4]
    node.here.ip("addr del 10.8.0.1/24 dev pod0")  # and that took its subnet's others with it
    node.here.ip("addr replace 10.8.0.7/24 dev pod0", f"route replace {NEAR[4]} via {POD_ADDR[4]}")

    def seen() -> bool:
        with connect(node, AWAY[4]) as client:
            return peer(client)[0] == "10.8.0.7"

    try:
        node.until(seen, "takes the new one")
        node.here.ip("addr flush dev pod0")
        node.until(lambda: any("pod0 has no" in p for p in problems(node)), "is told")
    finally:
        node.here.ip(
            "addr flush dev pod0", "addr add 10.8.0.1/24 dev pod0",
            "addr add fd08::1/64 dev pod0 nodad", f"route replace {NEAR[4]} via {POD_ADDR[4]}",
        )  # fmt: skip
    node.until(lambda: problems(node) == [], "has it back")
    with connect(node, AWAY[4]) as client:
        assert peer(client)[0] == OWN[4]


def problems(host: Host) -> list[str]:
    return host.shunt("status", "-o", "json").json["problems"]  # type: ignore[no-any-return]


def test_it_can_be_switched_off_and_on(node: Host) -> None:
    settings = yaml.safe_load(node.config.read_text())
    off = {key: value for key, value in settings.items() if key != "masquerade"}
    generation = node.json("status")["generation"]
    node.config.write_text(yaml.safe_dump(off))
    node.until(lambda: node.json("status")["generation"] > generation, "is in force")
    with node.outside.inside(), pytest.raises(TimeoutError):
        socket.create_connection((POD_ADDR[4], 8080), timeout=0.5)
    node.config.write_text(yaml.safe_dump(settings))
    node.until(lambda: node.json("status")["generation"] > generation + 1, "is in force")
    with connect(node, POD_ADDR[4], 8080) as client:
        assert peer(client)[0] == OWN[4]
