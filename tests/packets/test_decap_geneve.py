# SPDX-License-Identifier: Apache-2.0
"""Mode dsr-geneve on a backend: what is opened, and what is refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.packet import Raw

from shunt.kern.libbpf import XDP_PASS
from shunt.xdp import decap
from tests.packets import balancer
from tests.packets.backend_node import (
    CLIENT,
    OTHER_VIP,
    OUTER_BYTES,
    OWN,
    OWN_PORT,
    PORT,
    VIP,
    BackendNode,
    Reason,
    answered,
    fragment,
    geneve,
    passed,
    refused,
    reply,
    sent,
)
from tests.packets.balancer import Balancer
from tests.packets.frames import ETH, either, ether, ip, network, tcp
from tests.packets.test_icmp import ROUTER, error, quote_of, sent_by_vip, tuple_of

combinations = pytest.mark.parametrize(
    ("inner", "outer"), [(4, 4), (6, 6), (4, 6), (6, 4)], ids=["4in4", "6in6", "4in6", "6in4"]
)
protocols = pytest.mark.parametrize("proto", [balancer.TCP, balancer.UDP], ids=["tcp", "udp"])
versions = pytest.mark.parametrize("version", [4, 6])


@combinations
@protocols
@pytest.mark.parametrize("size", [0, 1, 1300])
def test_it_comes_out_for_this_hosts_own_address(
    inner: int, outer: int, proto: int, size: int, node: BackendNode
) -> None:
    fields: dict[str, Any] = {"payload": b"z" * size, "tos": 0xB8, "ttl": 9}
    want = either(proto, CLIENT[inner], OWN[inner], dport=OWN_PORT, **fields)
    assert node.opened(sent(inner, outer, proto, **fields)) == bytes(want)[ETH:]
    (way,) = node.ways()
    assert (way["vip_port"], way["outer_bytes"]) == (PORT, OUTER_BYTES[outer])


@combinations
@protocols
def test_what_the_balancer_wraps_comes_out(
    inner: int, outer: int, proto: int, lb: Balancer, node: BackendNode
) -> None:
    lb.add_service(VIP[inner], PORT, proto, "dsr-geneve", [OWN[outer]], backend_port=OWN_PORT)
    for value in range(0, 65536, 4099):
        fields: dict[str, Any] = {"payload": value.to_bytes(2, "big")}
        wrapped = lb.run(either(proto, CLIENT[inner], VIP[inner], **fields)).data
        want = either(proto, CLIENT[inner], OWN[inner], dport=OWN_PORT, **fields)
        assert node.opened(wrapped) == bytes(want)[ETH:]
        packet = answered(node.send(reply(inner, proto, **fields)))
        want = either(
            proto, VIP[inner], CLIENT[inner], sport=PORT, dport=40000, **fields,
            **({"flags": "SA"} if proto == balancer.TCP else {}),
        )  # fmt: skip
        assert bytes(packet) == bytes(want)


def test_a_datagram_without_a_checksum_keeps_none(node: BackendNode) -> None:
    bare = ether(ip(CLIENT[4], VIP[4]) / UDP(sport=40000, dport=OWN_PORT, chksum=0) / Raw(b"hi"))
    content = IP(node.opened(geneve(6, bare, VIP[4])))
    assert (content.dst, content[UDP].chksum) == (OWN[4], 0)
    back = ether(ip(OWN[4], CLIENT[4]) / UDP(sport=OWN_PORT, dport=40000, chksum=0) / Raw(b"hi"))
    packet = answered(node.send(back))
    assert (network(packet).src, packet[UDP].sport, packet[UDP].chksum) == (VIP[4], PORT, 0)


@combinations
def test_fragments_come_in(inner: int, outer: int, node: BackendNode) -> None:
    for start, more in ((0, True), (400, False)):
        frame = fragment(inner, CLIENT[inner], VIP[inner] if inner != outer else OWN[inner],
                         40000, OWN_PORT, start, more)  # fmt: skip
        out = node.receive(geneve(outer, frame, VIP[inner]))
        assert (out.verdict, out.reasons) == (XDP_PASS, {Reason.UNWRAPPED: 1})
        want = fragment(inner, CLIENT[inner], OWN[inner], 40000, OWN_PORT, start, more)
        assert out.data[ETH:] == bytes(want)[ETH:]
    assert len(node.ways()) == 1


@combinations
@protocols
def test_an_error_is_about_this_hosts_packet(
    inner: int, outer: int, proto: int, lb: Balancer, node: BackendNode
) -> None:
    lb.add_service(VIP[inner], PORT, proto, "dsr-geneve", [OWN[outer]], backend_port=OWN_PORT)
    wrapped = lb.run(error(inner, VIP[inner], sent_by_vip(inner, proto))).data
    raw = node.opened(wrapped)
    header = IP(raw) if inner == 4 else IPv6(raw)
    assert (header.src, header.dst) == (ROUTER[inner], OWN[inner])
    quoted = quote_of(ether(Raw(raw)), inner)
    assert tuple_of(quoted) == (OWN[inner], OWN_PORT, CLIENT[inner], 40000)
    assert node.ways() == []


# What is refused --------------------------------------------------------------------------------


def test_without_addresses_geneve_is_the_stacks(make_node: Callable[..., BackendNode]) -> None:
    assert passed(make_node(()), sent(4)) == Reason.PASS_NOT_TUNNEL
    assert passed(make_node(()), sent(6)) == Reason.PASS_NOT_TUNNEL


@versions
def test_other_geneve_is_the_stacks(version: int, node: BackendNode) -> None:
    frame = either(balancer.TCP, CLIENT[version], OWN[version])
    odd: list[dict[str, Any]] = [
        {"option": {"classid": 0x0100}},
        {"option": {"type": 0x01}},
        {"option": {"length": 4}},
        {"header": {"oam": 1}},
        {"header": {"critical": 0}},
        {"header": {"version": 1}},
        {"header": {"proto": 0x6558}},
        {"datagram": {"chksum": 0x1234}},
    ]
    for fields in odd:
        packet = geneve(version, frame, VIP[version], **fields)
        assert passed(node, packet) == Reason.PASS_GENEVE, fields
    assert passed(node, geneve(version, frame, VIP[version], datagram={"dport": 6082})) == (
        Reason.PASS_NOT_TUNNEL
    )
    assert passed(node, geneve(version, frame, VIP[version], datagram={"len": 90})) == (
        Reason.PASS_MALFORMED
    )
    stranger = "192.0.2.9" if version == 4 else "2001:db8::9"
    packet = geneve(version, frame, VIP[version], src=stranger)
    assert passed(node, packet) == Reason.PASS_SOURCE
    assert node.ways() == []


@combinations
def test_a_frame_cut_anywhere(inner: int, outer: int, node: BackendNode) -> None:
    whole = bytes(sent(inner, outer))
    for length in range(len(whole)):
        out = node.receive(whole[:length]) if length >= ETH else None
        assert out is None or out.reasons.keys() <= {
            Reason.PASS_NOT_TUNNEL,
            Reason.PASS_MALFORMED,
        }
    assert node.ways() == []


def test_fragments_of_the_outer_packet_and_options(node: BackendNode) -> None:
    frame = tcp(CLIENT[4], OWN[4])
    assert passed(node, geneve(4, frame, VIP[4], flags="MF")) == Reason.PASS_FRAGMENT
    ordinary = ether(ip("192.0.2.9", OWN[4], proto=17, flags="MF") / Raw(bytes(64)))
    assert passed(node, ordinary) == Reason.PASS_NOT_TUNNEL


@versions
def test_an_address_of_another_host(version: int, node: BackendNode) -> None:
    elsewhere = "10.9.0.77" if version == 4 else "fd09::77"
    frame = tcp(CLIENT[version], elsewhere)
    refused(node.receive(geneve(version, frame, VIP[version])), Reason.DROP_ADDRESS)


@versions
def test_an_error_for_another_host_that_quotes_a_packet_of_this_one(
    version: int, node: BackendNode
) -> None:
    quote = network(tcp(OWN[version], CLIENT[version], "A", sport=OWN_PORT, dport=40000))
    elsewhere = "10.9.0.77" if version == 4 else "fd09::77"
    node.opened(geneve(version, error(version, OWN[version], quote), VIP[version]))
    frame = error(version, elsewhere, quote)
    refused(node.receive(geneve(version, frame, VIP[version])), Reason.DROP_PROTOCOL)


def test_a_family_without_an_address(make_node: Callable[..., BackendNode]) -> None:
    only4 = make_node((OWN[4],))
    only4.opened(sent(4))
    only4.opened(sent(4, 6))
    refused(only4.receive(sent(6, 4)), Reason.DROP_ADDRESS)


@versions
def test_what_has_no_ports(version: int, node: BackendNode) -> None:
    ping: Any = ICMP() if version == 4 else ICMPv6EchoRequest()
    frame = ether(ip(CLIENT[version], OWN[version]) / ping)
    refused(node.receive(geneve(version, frame, VIP[version])), Reason.DROP_PROTOCOL)
    frame = ether(ip(CLIENT[version], OWN[version], **{"proto" if version == 4 else "nh": 47}))
    refused(node.receive(geneve(version, frame, VIP[version])), Reason.DROP_PROTOCOL)


def test_congestion_is_told_or_the_packet_dropped(node: BackendNode) -> None:
    refused(node.receive(geneve(4, tcp(CLIENT[4], OWN[4]), VIP[4], tos=3)), Reason.DROP_CONGESTED)
    raw = node.opened(geneve(4, tcp(CLIENT[4], OWN[4], tos=2), VIP[4], tos=3))
    assert IP(raw).tos == 3


@versions
@protocols
def test_a_tuple_has_one_way_back(version: int, proto: int, node: BackendNode) -> None:
    """A flow to another VIP, or straight to this host: answers could not tell them apart."""
    node.opened(sent(version, proto=proto))
    other = sent(version, proto=proto, vip=OTHER_VIP[version])
    refused(node.receive(other), Reason.DROP_CLASH)
    direct = either(proto, CLIENT[version], OWN[version], dport=OWN_PORT)
    refused(node.receive(direct), Reason.DROP_CLASH)
    beside = either(proto, CLIENT[version], OWN[version], dport=OWN_PORT, sport=40001)
    assert passed(node, beside) == Reason.PASS_NOT_TUNNEL
    packet = answered(node.send(reply(version, proto)))
    assert network(packet).src == VIP[version]


@versions
def test_a_tuple_is_free_again_when_its_flow_is_over(version: int, node: BackendNode) -> None:
    node.opened(sent(version))
    answered(node.send(reply(version, flags="RA")))
    node.opened(sent(version, vip=OTHER_VIP[version]))
    (way,) = node.ways()
    assert way["flags"] == 0
    assert network(answered(node.send(reply(version)))).src == OTHER_VIP[version]


def test_no_room_for_another_flow(make_node: Callable[..., BackendNode]) -> None:
    node = make_node(flows=4, over=0.3)
    for sport in range(1, 5):
        node.opened(sent(4, sport=sport))
    refused(node.receive(sent(4, sport=5)), Reason.DROP_FULL)
    refused(node.receive(sent(4, sport=5, proto=balancer.UDP)), Reason.DROP_FULL)
    node.opened(sent(4, sport=1, flags="A"))  # nobody has lost what was there
    answered(node.send(reply(4, dport=2, flags="RA")))
    deadline = time.monotonic() + 30
    while node.receive(sent(4, sport=5)).reasons != {Reason.UNWRAPPED: 1}:  # once a second it looks
        assert time.monotonic() < deadline
        time.sleep(0.1)
    refused(node.receive(sent(4, sport=6)), Reason.DROP_FULL)
    node.opened(sent(4, sport=1, flags="A"))


def test_room_is_made_in_pieces(make_node: Callable[..., BackendNode]) -> None:
    """A packet does not wait until all that is over has gone."""
    node = make_node(flows=8192)
    ways = node.object.maps[decap.FLOWS]
    keys, values = ways.new_keys(8192), ways.new_values(8192)
    keys["client_port"] = np.arange(8192)
    ways.update_many(keys, values)
    for left in (8192 - 2048 + 1, *range(8192 - 2048 + 2, 8192 - 2048 + 6)):
        node.opened(sent(4, sport=left))
        assert len(ways.items()[0]) == left
    assert len(node.ways()) == 5
