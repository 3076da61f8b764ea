# SPDX-License-Identifier: Apache-2.0
"""Echo requests to a VIP are answered while it stands in map echo with a service."""

from __future__ import annotations

from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, IPOption_NOP
from scapy.layers.inet6 import ICMPv6EchoRequest
from scapy.packet import Packet, Raw

from shunt.agent.echo import AT_TC
from shunt.kern.libbpf import XDP_PASS, XDP_TX
from tests.packets.balancer import Balancer, Out, Reason, mapped
from tests.packets.frames import ETH, OWN_MAC, ROUTER_MAC, ether, ip, network
from tests.packets.test_icmp import BACKENDS, CLIENT, ROUTER, VIP, versions


def ping(version: int, src: str, dst: str, **fields: Any) -> Packet:
    data = b"abcdefgh" * 7 + b"x"
    echo = ICMP(id=7, seq=3) if version == 4 else ICMPv6EchoRequest(id=7, seq=3, data=data)
    body = echo / Raw(data) if version == 4 else echo
    return ether(ip(src, dst, **fields) / body)


def know_vip(lb: Balancer, vip: str, svc: int = 0, *, at_tc: bool = False) -> None:
    """As the agent does; for a service echo requests are answered."""
    value = lb.map("echo").new_values(1)[0]
    value["svc"] = svc | (AT_TC if at_tc else 0)
    key = lb.map("echo").new_keys(1)[0]
    key["vip"] = mapped(vip)
    lb.map("echo").update(key, value)


def pinged(lb: Balancer, packet: Packet) -> Out:
    version = 4 if IP in packet else 6
    made = lb.add_service(VIP[version], backends=BACKENDS[version])
    know_vip(lb, VIP[version], made.id)
    return lb.run(packet)


@versions
def test_echo_is_answered(version: int, lb: Balancer) -> None:
    packet = ping(version, CLIENT[version], VIP[version], ttl=3)
    out = pinged(lb, packet)
    assert out.said == (XDP_TX, {Reason.SENT_ECHO_REPLY: 1})
    assert (out.packet.src, out.packet.dst) == (OWN_MAC, ROUTER_MAC)
    reply = network(out.packet)
    assert (reply.src, reply.dst) == (VIP[version], CLIENT[version])
    assert (reply.ttl if version == 4 else reply.hlim) == 64
    start = ETH + (20 if version == 4 else 40)
    assert out.data[start] == (0 if version == 4 else 129)
    assert out.data[start + 4 :] == bytes(packet)[start + 4 :]
    assert lb.counts("svc_stats")[1]["packets"] == 1


@versions
def test_echo_for_another_address_is_the_stacks(version: int, lb: Balancer) -> None:
    packet = ping(version, CLIENT[version], ROUTER[version])
    out = pinged(lb, packet)
    assert out.said == (XDP_PASS, {Reason.PASS_NOT_OURS: 1})
    assert out.data == bytes(packet)


@versions
@pytest.mark.parametrize("at_tc", [False, True])
def test_a_vip_may_be_known_and_silent(version: int, at_tc: bool, lb: Balancer) -> None:
    packet = ping(version, CLIENT[version], VIP[version])
    know_vip(lb, VIP[version], at_tc=at_tc)
    assert lb.run(packet).said == (XDP_PASS, {Reason.PASS_NOT_OURS: 1})
    know_vip(lb, VIP[version], 1, at_tc=at_tc)
    assert lb.run(packet).said == (XDP_TX, {Reason.SENT_ECHO_REPLY: 1})
    assert lb.counts("svc_stats")[1]["packets"] == 1


@pytest.mark.parametrize(
    "packet",
    [
        ping(4, "224.0.0.1", VIP[4]),
        ping(4, "255.255.255.255", VIP[4]),
        ping(4, "127.0.0.1", VIP[4]),
        ping(4, "0.0.0.0", VIP[4]),
        ping(6, "ff02::1", VIP[6]),
        ping(6, "::", VIP[6]),
        ping(4, CLIENT[4], VIP[4], flags="MF"),
        ping(4, CLIENT[4], VIP[4], options=[IPOption_NOP()] * 4),
    ],
    ids=["multicast", "broadcast", "loopback", "none", "multicast 6", "none 6", "part", "options"],
)
def test_what_is_not_to_be_answered_is_the_stacks(packet: Packet, lb: Balancer) -> None:
    out = pinged(lb, packet)
    assert out.verdict == XDP_PASS
    assert out.data == bytes(packet)
