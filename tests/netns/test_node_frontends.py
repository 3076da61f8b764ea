# SPDX-License-Identifier: Apache-2.0
"""Frontends on the node's own addresses, and VIPs captured on their way through it; real sockets.

The namespaces are those of test_tc_datapath.py. For XDP: those of shunt_host.py.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator

import pytest
import yaml

from shunt.lab.netns import Namespace
from tests.netns.shunt_host import BACKENDS, Host, a_host, at
from tests.netns.test_tc_datapath import (
    CLIENT_ADDR,
    FAMILIES,
    NODE_ADDR,
    POD_ADDR,
    a_node,
    connect,
    echoed,
)

OF_CLIENTS = {4: "node/192.0.2.0/24", 6: "node/2001:db8:c::/64"}
LATER = {4: "192.0.2.77", 6: "2001:db8:c::77"}
LENGTH = {4: 24, 6: 64}
LOOPBACK = {4: "127.0.0.1", 6: "::1"}
NODE_PORT, HOST_PORT, DATAGRAMS, PRIVATE = 30080, 8081, 30053, 30081
TRANSIT = {4: "203.0.113.50", 6: "2001:db8:a::50"}  # the pod's: the node routes it


def describe(host: Host, mode: str = "local") -> None:
    for ip in (4, 6):
        for kind, vip, port, backend in (
            ("np", OF_CLIENTS[ip], NODE_PORT, at(POD_ADDR[ip], 8080)),
            ("hostport", OF_CLIENTS[ip], HOST_PORT, at(POD_ADDR[ip], 8080)),
            ("udp", OF_CLIENTS[ip], f"{DATAGRAMS}/udp", at(POD_ADDR[ip], 5300)),
            ("private", f"node/{LOOPBACK[ip]}", PRIVATE, at(POD_ADDR[ip], 8080)),
            ("transit", TRANSIT[ip], 80, at(POD_ADDR[ip], 8080)),
        ):
            document = {"name": f"{kind}-{ip}", "vip": vip, "ports": [port], "mode": mode}
            host.write(f"{kind}-{ip}", {**document, "backends": [backend]})


def route_through(node: Namespace, pod: Namespace) -> None:
    """The addresses in transit are the pod's own, behind the node."""
    pod.own(TRANSIT[4], TRANSIT[6])
    node.ip(
        f"route add {TRANSIT[4]} via {POD_ADDR[4]}", f"route add {TRANSIT[6]} via {POD_ADDR[6]}"
    )


@pytest.fixture(scope="module")
def node() -> Iterator[Host]:
    with a_node("npl") as (host, pod):
        route_through(host.here, pod)
        describe(host)
        host.start()
        yield host


@pytest.fixture(scope="module")
def remote() -> Iterator[Host]:
    """Without XDP, mode nat: the pod is another host."""
    with a_node("npr", xdp="off", interfaces=["eth0", "pod0"]) as (host, pod):
        route_through(host.here, pod)
        describe(host, "nat")
        host.start()
        yield host


@pytest.fixture(params=["node", "remote"])
def either(request: pytest.FixtureRequest) -> Host:
    return request.getfixturevalue(request.param)  # type: ignore[no-any-return]


def problems(host: Host) -> list[str]:
    return host.shunt("status", "-o", "json").json["problems"]  # type: ignore[no-any-return]


def vips(host: Host, service: str) -> list[str]:
    return host.json("service", "show", service)["vips"]  # type: ignore[no-any-return]


@FAMILIES
@pytest.mark.parametrize("port", [NODE_PORT, HOST_PORT])
def test_tcp(either: Host, ip: int, port: int) -> None:
    """S13, S18: a client finds the service at an address of the node's."""
    with connect(either, NODE_ADDR[ip], port) as client:
        assert client.recv(100)
        assert echoed(client, 1_000_000)


@FAMILIES
def test_udp(either: Host, ip: int) -> None:
    with either.outside.inside():
        client = socket.socket(socket.AF_INET6 if ip == 6 else socket.AF_INET, socket.SOCK_DGRAM)
    with client:
        client.settimeout(10)
        client.connect((NODE_ADDR[ip], DATAGRAMS))
        client.send(b"x" * 500)
        assert client.recv(2000).partition(b"\n")[2] == b"x" * 500


@FAMILIES
def test_an_address_that_comes_and_goes(either: Host, ip: int) -> None:
    later = LATER[ip]
    assert vips(either, f"np-{ip}") == [NODE_ADDR[ip]]
    nodad = " nodad" if ip == 6 else ""
    with connect(either, NODE_ADDR[ip], NODE_PORT) as lasting:
        assert lasting.recv(100)
        either.here.ip(f"addr add {later}/{LENGTH[ip]} dev eth0{nodad}")
        either.until(lambda: vips(either, f"np-{ip}") == [NODE_ADDR[ip], later], "takes it")
        with connect(either, later, NODE_PORT) as client:
            assert client.recv(100)
            assert echoed(client, 100_000)
        either.here.ip(f"addr del {later}/{LENGTH[ip]} dev eth0")
        either.until(lambda: vips(either, f"np-{ip}") == [NODE_ADDR[ip]], "gives it back")
        assert echoed(lasting, 100_000)
    # It can be somebody else's: nothing of ours takes its packets any more.
    either.here.own(later)
    try:
        either.until(lambda: len(vips(either, f"np-{ip}")) == 2, "takes it on any device")
    finally:
        either.here.ip(f"addr del {later}/{128 if ip == 6 else 32} dev lo")
    either.until(lambda: len(vips(either, f"np-{ip}")) == 1, "gives it back")


def test_other_ports_and_pings_are_the_hosts_own(either: Host) -> None:
    with connect(either, NODE_ADDR[4], 8080) as client:  # the node's own server
        assert client.recv(100).split()[0].decode() == CLIENT_ADDR[4]
    done = subprocess.run(
        [*either.outside.enter, "ping", "-c", "1", "-W", "5", NODE_ADDR[4]], capture_output=True
    )
    assert done.returncode == 0, done.stdout
    assert "SENT_ECHO_REPLY" not in either.json("status")["reasons"]


@FAMILIES
def test_the_nodes_own_processes(node: Host, ip: int) -> None:
    """S14: on loopback, where that was chosen, and on the node's addresses."""
    for address, port in ((LOOPBACK[ip], PRIVATE), (NODE_ADDR[ip], NODE_PORT)):
        with node.here.inside():
            client = socket.create_connection((address, port), timeout=10)
        with client:
            assert client.recv(100)
    with node.here.inside(), pytest.raises(ConnectionRefusedError):
        socket.create_connection((LOOPBACK[ip], NODE_PORT), timeout=10)  # not chosen there


def test_a_service_that_names_an_address_itself_counts_more(node: Host) -> None:
    mine = {"name": "named", "vip": NODE_ADDR[4], "ports": [NODE_PORT], "mode": "local"}
    node.write("named", {**mine, "backends": [at(NODE_ADDR[4], 8080)], "health": "none"})
    # It is refused, since its backend is its VIP.
    node.until(lambda: problems(node) != [], "is read")
    node.write("named", {**mine, "backends": [at(POD_ADDR[4], 8080)]})
    node.until(lambda: "named" in node.shunt("service", "list").out, "is in force")
    (told,) = problems(node)
    assert told.startswith("service np-4 does not answer on 192.0.2.1:30080/tcp")
    with connect(node, NODE_ADDR[4], NODE_PORT) as client:
        assert client.recv(100)
        rows = node.json("nat", "list", "named")
        assert client.getsockname()[1] in {row["client_port"] for row in rows}
    (node.services / "named.yaml").unlink()
    node.until(lambda: problems(node) == [], "np-4 has it back")
    with connect(node, NODE_ADDR[4], NODE_PORT) as client:
        assert client.recv(100)
        rows = node.json("nat", "list", "np-4")
        assert client.getsockname()[1] in {row["client_port"] for row in rows}


@FAMILIES
def test_captured_in_transit(either: Host, ip: int) -> None:
    """S16: a VIP that is on no node, and is routed through it."""
    with connect(either, TRANSIT[ip], 80) as client:  # nobody listens there where it is routed to
        assert client.recv(100)
        assert echoed(client, 1_000_000)
    with connect(either, TRANSIT[ip], 8080) as client:  # no frontend: goes on its way
        assert client.recv(100)


@pytest.fixture(scope="module")
def xdp() -> Iterator[Host]:
    with a_host("npx") as host:
        settings = yaml.safe_load(host.config.read_text())
        host.config.write_text(yaml.safe_dump({**settings, "xdp": "generic"}))
        for path in host.services.iterdir():
            path.unlink()
        for name, vip in (("np", "node/10.9.0.0/16"), ("transit", "203.0.113.50")):
            document = {"name": name, "vip": vip, "ports": [NODE_PORT], "mode": "nat"}
            host.write(name, {**document, "backends": [f"{BACKENDS[0]}:8080"]})
        host.here.sysctl({"ipv4.ip_forward": 1})
        host.here.ip(f"route add 203.0.113.50 via {BACKENDS[1]}")
        host.start()
        host.until(lambda: host.backend("np", "10.9.0.2:8080")["state"] == "up", "is up")
        yield host


@pytest.mark.parametrize("vip", ["10.9.0.1", "203.0.113.50"], ids=["node", "transit"])
def test_by_xdp(xdp: Host, vip: str) -> None:
    before = packets(xdp)
    with xdp.outside.inside():
        client = socket.create_connection((vip, NODE_PORT), 10, source_address=("10.9.0.9", 0))
    with client:
        assert packets(xdp) >= before + 2
        assert [row["tc"] for row in xdp.json("status")["interfaces"]] == ["none"]


def packets(host: Host) -> int:
    found = host.json("status")["reasons"].get("SENT_TO_BACKEND", {"packets": 0})
    return int(found["packets"])
