# SPDX-License-Identifier: Apache-2.0
"""handover: peer. What TC sends to a pod, or back to one, appears at the veth's other end.

The hosts, and the servers, are test_tc_datapath.py's; the client is behind a veth device, too.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from shunt.lab.netns import Namespace
from tests.netns.shunt_host import Host
from tests.netns.test_tc_datapath import (
    FAMILIES,
    POD,
    POD_ADDR,
    a_node,
    connect,
    describe,
    echoed,
)

SEGMENTS = 3_000_000


@pytest.fixture(scope="module", params=["nat", "local"])
def node(request: pytest.FixtureRequest) -> Iterator[tuple[Host, Namespace]]:
    """Its stack forwards nothing."""
    name = f"hop{request.param[0]}"
    with a_node(name, xdp="off", handover="peer", interfaces=["eth0", "pod0"]) as (host, pod):
        host.here.sysctl({"ipv4.ip_forward": 0, "ipv6.conf.all.forwarding": 0})
        describe(host, mode=request.param, only="pod")
        host.start()
        host.until(lambda: all(reaches(host, ip) for ip in (4, 6)), "the pod's neighbour is known")
        yield host, pod


def reaches(host: Host, ip: int) -> bool:
    host.here.run("ping", "-c3", "-i0.2", "-W1", POD_ADDR[ip])
    try:
        connect(host, POD[ip], timeout=0.5).close()
    except TimeoutError:
        return False
    return True


def sent(host: Host, device: str) -> int:
    """Bytes that went out of a device."""
    (link,) = json.loads(host.here.run("ip", "-s", "-j", "link", "show", "dev", device).stdout)
    return int(link["stats64"]["tx"]["bytes"])


@FAMILIES
def test_tcp_passes_no_device(node: tuple[Host, Namespace], ip: int) -> None:
    host, _ = node
    before = [sent(host, device) for device in ("eth0", "pod0")]
    with connect(host, POD[ip]) as client:
        assert client.recv(100)
        assert echoed(client, SEGMENTS)
    after = [sent(host, device) for device in ("eth0", "pod0")]
    # ARP and neighbour discovery are the kernel's, and go out as ever.
    assert all(b - a < SEGMENTS / 100 for a, b in zip(before, after, strict=True))


@FAMILIES
def test_replies_by_the_stack(ip: int) -> None:
    """The pod's device has no program: the client's packets are handed over all the same."""
    with a_node("hops", xdp="off", handover="peer") as (host, _):
        describe(host, only="pod")
        host.start()

        def handed_over() -> bool:
            """The pod's neighbour may have to be found first, which is the stack's."""
            before = sent(host, "pod0")
            with connect(host, POD[ip]) as client:
                assert client.recv(100)
                assert echoed(client, SEGMENTS)
            return sent(host, "pod0") - before < SEGMENTS / 100

        host.until(handed_over, "what goes to the pod passes no device")


@FAMILIES
def test_udp(node: tuple[Host, Namespace], ip: int) -> None:
    host, _ = node
    with host.outside.inside():
        client = socket.socket(socket.AF_INET6 if ip == 6 else socket.AF_INET, socket.SOCK_DGRAM)
    with client:
        client.settimeout(10)
        client.connect((POD[ip], 53))
        for size in (0, 1, 1000):
            client.send(b"x" * size)
            assert client.recv(2000).partition(b"\n")[2] == b"x" * size
