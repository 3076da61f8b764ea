# SPDX-License-Identifier: Apache-2.0
"""Mode dsr-geneve on a backend: answers are the VIP's, and leave room for outer headers."""

from __future__ import annotations

from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.inet6 import ICMPv6DestUnreach
from scapy.packet import Packet, Raw

from tests.packets import balancer
from tests.packets.backend_node import (
    CLIENT,
    OUTER_BYTES,
    OWN,
    OWN_PORT,
    PORT,
    TC_ACT_UNSPEC,
    VIP,
    BackendNode,
    Out,
    Reason,
    answered,
    fragment,
    geneve,
    leaves_alone,
    reply,
    sent,
)
from tests.packets.frames import ETH, either, ether, ip, network, tcp, udp, verify
from tests.packets.private import in_namespace
from tests.packets.test_icmp import ROUTER, quote_of, tuple_of

combinations = pytest.mark.parametrize(
    ("inner", "outer"), [(4, 4), (6, 6), (4, 6), (6, 4)], ids=["4in4", "6in6", "4in6", "6in4"]
)
protocols = pytest.mark.parametrize("proto", [balancer.TCP, balancer.UDP], ids=["tcp", "udp"])
versions = pytest.mark.parametrize("version", [4, 6])
MTU = ["link set dev lo mtu 1500"]


@combinations
@protocols
def test_an_answer_is_the_vips_and_else_as_it_was(
    inner: int, outer: int, proto: int, node: BackendNode
) -> None:
    node.opened(sent(inner, outer, proto))
    for value in range(0, 65536, 4099):
        fields: dict[str, Any] = {"payload": value.to_bytes(2, "big"), "ttl": 33, "tos": 0x29}
        if proto == balancer.TCP:
            fields["flags"] = "PA"
        want = either(
            proto, VIP[inner], CLIENT[inner], sport=PORT, dport=40000, **fields
        )  # fmt: skip
        assert bytes(answered(node.send(reply(inner, proto, **fields)))) == bytes(want)


@versions
@protocols
def test_what_is_no_answer_is_left_alone(version: int, proto: int, node: BackendNode) -> None:
    node.opened(sent(version, proto=proto))
    other = balancer.UDP if proto == balancer.TCP else balancer.TCP
    for packet in (
        reply(version, other),
        reply(version, proto, dport=40001),
        reply(version, proto, sport=OWN_PORT + 1),
        either(proto, CLIENT[version], OWN[version], sport=OWN_PORT, dport=40000),
        ether(ip(OWN[version], CLIENT[version]) / Raw(b"x")),
    ):
        leaves_alone(node, packet)


@versions
def test_an_answer_in_fragments(version: int, node: BackendNode) -> None:
    node.opened(sent(version, proto=balancer.UDP))
    late = fragment(version, OWN[version], CLIENT[version], OWN_PORT, 40000, 400, False)
    leaves_alone(node, late)
    for start, more in ((0, True), (400, False)):
        ends = (OWN[version], CLIENT[version], OWN_PORT, 40000)
        out = node.send(fragment(version, *ends, start, more))
        assert (out.verdict, out.reasons) == (TC_ACT_UNSPEC, {Reason.ANSWERED: 1})
        want = fragment(version, VIP[version], CLIENT[version], PORT, 40000, start, more)
        assert out.data == bytes(want)


@versions
@protocols
def test_an_error_of_this_host_is_about_the_clients_packet(
    version: int, proto: int, node: BackendNode
) -> None:
    frame = either(proto, CLIENT[version], OWN[version], dport=OWN_PORT, payload=b"k" * 40)
    node.opened(geneve(version, frame, VIP[version]))
    header: Any = ICMP(type=3, code=3) if version == 4 else ICMPv6DestUnreach(code=4)
    quote = Raw(bytes(frame)[ETH:])
    out = node.send(ether(ip(OWN[version], CLIENT[version]) / header / quote))
    packet = answered(out)
    assert (network(packet).src, network(packet).dst) == (VIP[version], CLIENT[version])
    quoted = quote_of(packet, version)
    assert tuple_of(quoted) == (CLIENT[version], 40000, VIP[version], PORT)
    if version == 4:
        assert verify(bytes(ether(Raw(bytes(quoted))))[:0] + bytes(packet))
        assert IP(bytes(quoted)[:20]).chksum == IP(bytes(header_of(quoted))).chksum


def header_of(quoted: Packet) -> Packet:
    """The same IPv4 header with its checksum computed anew."""
    again = IP(bytes(quoted)[:20])
    del again.chksum
    return again


@versions
def test_an_error_of_a_router_keeps_its_source(version: int, node: BackendNode) -> None:
    """This host forwards for others (pods), and they, or it, tell the client."""
    frame = udp(CLIENT[version], OWN[version], dport=OWN_PORT, payload=b"k" * 40)
    node.opened(geneve(version, frame, VIP[version]))
    header: Any = ICMP(type=3, code=1) if version == 4 else ICMPv6DestUnreach(code=3)
    out = node.send(ether(ip(ROUTER[version], CLIENT[version]) / header / Raw(bytes(frame)[ETH:])))
    packet = answered(out)
    assert network(packet).src == ROUTER[version]
    assert tuple_of(quote_of(packet, version))[2:] == (VIP[version], PORT)


# The MSS ----------------------------------------------------------------------------------------


def syn_ack(version: int, src: str, sport: int, options: list[Any]) -> Packet:
    segment = TCP(sport=sport, dport=40000, flags="SA", seq=7, ack=1001, options=options)
    return ether(ip(src, CLIENT[version]) / segment)


def on_1500(node: BackendNode, *packets: Packet) -> list[Out]:
    """The device that the program is told of is a namespace's loopback."""
    return in_namespace(lambda: [node.send(packet) for packet in packets], MTU)


@combinations
@pytest.mark.parametrize(
    "before",
    [[], [("NOP", None)], [("NOP", None)] * 2, [("SAckOK", b""), ("WScale", 7)]],
    ids=["first", "odd", "even", "later"],
)
def test_the_mss_leaves_room_for_the_outer_headers(
    inner: int, outer: int, before: list[Any], node: BackendNode
) -> None:
    node.opened(sent(inner, outer))
    largest = 1500 - OUTER_BYTES[outer] - (40 if inner == 4 else 60)
    announced = (65535, 1460, largest + 1, largest, 536)
    packets = [syn_ack(inner, OWN[inner], OWN_PORT, [*before, ("MSS", mss)]) for mss in announced]
    for mss, out in zip(announced, on_1500(node, *packets), strict=True):
        clamped = {Reason.CLAMPED: 1} if mss > largest else {}
        assert out.reasons == {Reason.ANSWERED: 1, **clamped}
        want = syn_ack(inner, VIP[inner], PORT, [*before, ("MSS", min(mss, largest))])
        assert out.data == bytes(want)
        assert out.packet


@versions
def test_only_syn_acks_with_an_mss_are_clamped(version: int, node: BackendNode) -> None:
    node.opened(sent(version))
    packets = (
        syn_ack(version, OWN[version], OWN_PORT, []),
        syn_ack(version, OWN[version], OWN_PORT, [("NOP", None)] * 3 + [("EOL", None)]),
        ether(
            ip(OWN[version], CLIENT[version])
            / TCP(sport=OWN_PORT, dport=40000, flags="A", options=[("MSS", 1460)])
        ),
    )
    assert [out.reasons for out in on_1500(node, *packets)] == [{Reason.ANSWERED: 1}] * 3


@combinations
def test_the_mss_of_flows_through_ipip(inner: int, outer: int, node: BackendNode) -> None:
    """No way back is kept for them: it is the VIP that decap has opened a SYN for."""
    packet = syn_ack(inner, VIP[inner], PORT, [("MSS", 1460)])
    leaves_alone(node, packet)
    number = {"proto" if outer == 4 else "nh": 4 if inner == 4 else 41}
    around = ip("198.18.1.2" if outer == 4 else "100::2", OWN[outer], **number)
    for flags in ("A", "S"):
        frame = tcp(CLIENT[inner], VIP[inner], flags)
        node.opened(ether(around / Raw(bytes(frame)[ETH:])))
        (out,) = on_1500(node, packet)
        if flags == "A":
            assert out.reasons == {}
    largest = 1500 - (20 if outer == 4 else 40) - (40 if inner == 4 else 60)
    assert out.reasons == ({Reason.CLAMPED: 1} if largest < 1460 else {})
    want = syn_ack(inner, VIP[inner], PORT, [("MSS", min(1460, largest))])
    assert out.data == bytes(want)
    assert node.ways() == []


def test_every_reason_of_answers_is_reached(node: BackendNode) -> None:
    """Those of what comes in: test_decap.py. DROP_ANSWER wants a kernel without memory."""
    node.opened(sent(4))
    (out,) = on_1500(node, syn_ack(4, OWN[4], OWN_PORT, [("MSS", 1460)]))
    reached = set(out.reasons)
    assert reached == {r for r in Reason if Reason.ANSWERED <= r < Reason.DROP_ANSWER}
