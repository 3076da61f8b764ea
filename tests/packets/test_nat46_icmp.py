# SPDX-License-Identifier: Apache-2.0
"""ICMP errors about packets that got a header of the other family (RFC 7915, 4.2 to 5.5)."""

from __future__ import annotations

from typing import Any

import dpkt
import pytest
from scapy.layers.inet import ICMP, IP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6PacketTooBig,
    ICMPv6ParamProblem,
    ICMPv6TimeExceeded,
    IPv6,
)
from scapy.packet import Packet, Raw

from shunt.kern.libbpf import XDP_DROP, XDP_TX
from tests.packets.balancer import BACKEND_MAC, TCP, UDP, Balancer, Out, Reason
from tests.packets.frames import ETH, OWN_MAC, ROUTER_MAC, either, ether, ip, network, transport
from tests.packets.nat46 import BACKEND, CLIENT, ENDS, HEADER, OTHER, OWN, VIP, clients, serve
from tests.packets.test_icmp import ROUTER, quote_of, tuple_of
from tests.packets.test_nat import answer_to, forwarded, protocols, returned

V4, V6 = 4, 6
# An error of one family and what becomes of it: (type, code, rest of its header), None for nothing.
FROM_4: list[tuple[dict[str, Any], tuple[int, int, int] | None]] = [
    *(({"type": 3, "code": code}, (1, 0, 0)) for code in (0, 1, 5, 6, 7, 8, 11, 12)),
    ({"type": 3, "code": 2}, (4, 1, 6)),
    ({"type": 3, "code": 3}, (1, 4, 0)),
    *(({"type": 3, "code": code}, (1, 1, 0)) for code in (9, 10, 13, 15)),
    ({"type": 3, "code": 14}, None),
    ({"type": 3, "code": 99}, None),
    ({"type": 3, "code": 4, "nexthopmtu": 1400}, (2, 0, 1420)),
    ({"type": 3, "code": 4, "nexthopmtu": 576}, (2, 0, 1280)),
    ({"type": 11, "code": 0}, (3, 0, 0)),
    ({"type": 11, "code": 1}, (3, 1, 0)),
    *(
        ({"type": 12, "code": 0, "ptr": ptr}, (4, 0, other))
        for ptr, other in {0: 0, 1: 1, 2: 4, 3: 4, 8: 7, 9: 6, 12: 8, 15: 8, 16: 24, 19: 24}.items()
    ),
    *(({"type": 12, "code": 0, "ptr": ptr}, None) for ptr in (4, 5, 6, 7, 10, 11, 20)),
    ({"type": 12, "code": 1}, None),
    ({"type": 12, "code": 2, "ptr": 8}, (4, 0, 7)),
]
FROM_6: list[tuple[Packet, tuple[int, int, int] | None]] = [
    *((ICMPv6DestUnreach(code=code), (3, 1, 0)) for code in (0, 2, 3)),
    (ICMPv6DestUnreach(code=1), (3, 10, 0)),
    (ICMPv6DestUnreach(code=4), (3, 3, 0)),
    (ICMPv6DestUnreach(code=5), None),
    (ICMPv6PacketTooBig(mtu=1400), (3, 4, 1380)),
    (ICMPv6PacketTooBig(mtu=1000), (3, 4, 1260)),
    (ICMPv6PacketTooBig(mtu=200_000), (3, 4, 65515)),
    (ICMPv6TimeExceeded(code=0), (11, 0, 0)),
    (ICMPv6TimeExceeded(code=1), (11, 1, 0)),
    *(
        (ICMPv6ParamProblem(code=0, ptr=ptr), (12, 0, other << 24))
        for ptr, other in ((0, 0), (1, 1), (4, 2), (5, 2), (6, 9), (7, 8))
    ),
    *((ICMPv6ParamProblem(code=0, ptr=ptr), (12, 0, 12 << 24)) for ptr in (8, 23)),
    *((ICMPv6ParamProblem(code=0, ptr=ptr), (12, 0, 16 << 24)) for ptr in (24, 39)),
    *((ICMPv6ParamProblem(code=0, ptr=ptr), None) for ptr in (2, 3, 40, 300)),
    (ICMPv6ParamProblem(code=1, ptr=6), (3, 2, 0)),
    (ICMPv6ParamProblem(code=2), None),
]


def error(header: Packet, to: str, quote: Packet, size: int = 0, **fields: Any) -> Packet:
    """An ICMP error as a router sends it. `size`: bytes of the quote; 0 is all of it."""
    router = ROUTER[4 if "." in to else 6]
    return ether(ip(router, to, **fields) / header / Raw(bytes(quote)[: size or None]))


def too_big(version: int) -> Packet:
    return ICMP(type=3, code=4, nexthopmtu=1400) if version == V4 else ICMPv6PacketTooBig(mtu=1400)


def said(out: Out, reason: Any) -> tuple[int, int, int]:
    """Type, code and the rest of the header of an error that left; its checksum is right."""
    assert out.said == (XDP_TX, {reason: 1})
    packet = out.packet
    start = ETH + HEADER[network(packet).version]
    body = out.data[start : start + 8]
    ethernet = dpkt.ethernet.Ethernet(out.data)
    ethernet.data.data.sum = 0
    if isinstance(ethernet.data, dpkt.ip.IP):
        ethernet.data.sum = 0
    assert bytes(ethernet)[start + 2 : start + 4] == body[2:4]
    return body[0], body[1], int.from_bytes(body[4:], "big")


def from_backends_side(lb: Balancer, client: int, header: Packet, proto: int = TCP) -> Out:
    serve(lb, client, proto)
    sent = forwarded(lb.run(either(proto, *ENDS[client])))
    packet = error(header, OWN[OTHER[client]], network(sent))
    packet.src = BACKEND_MAC
    return lb.run(packet)


@pytest.mark.parametrize(("fields", "want"), FROM_4)
def test_what_ipv4_says_of_it_to_an_ipv6_client(
    fields: dict[str, Any], want: tuple[int, int, int] | None, lb: Balancer
) -> None:
    out = from_backends_side(lb, V6, ICMP(**fields))
    if want is None:
        assert out.said == (XDP_DROP, {Reason.DROP_NAT46_NO_EQUAL: 1})
    else:
        assert said(out, Reason.SENT_ERROR_TO_CLIENT) == want


@pytest.mark.parametrize(("header", "want"), FROM_6)
def test_what_ipv6_says_of_it_to_an_ipv4_client(
    header: Packet, want: tuple[int, int, int] | None, lb: Balancer
) -> None:
    out = from_backends_side(lb, V4, header)
    if want is None:
        assert out.said == (XDP_DROP, {Reason.DROP_NAT46_NO_EQUAL: 1})
    else:
        assert said(out, Reason.SENT_ERROR_TO_CLIENT) == want


@pytest.mark.parametrize(("payload", "mtu"), [(1000, 1280), (1453, 1512), (1440, 1280)])
def test_a_router_that_tells_no_mtu(payload: int, mtu: int, lb: Balancer) -> None:
    """The next plateau of RFC 1191, 7, below what it did not send on."""
    serve(lb, V6, UDP)
    sent = network(forwarded(lb.run(either(UDP, *ENDS[V6], payload=bytes(payload)))))
    sent.len = 20 + 8 + payload if payload < 1453 else 1500
    packet = error(ICMP(type=3, code=4, nexthopmtu=0), OWN[V4], sent)
    assert said(lb.run(packet), Reason.SENT_ERROR_TO_CLIENT) == (2, 0, mtu)


@clients
@protocols
@pytest.mark.parametrize("size", [0, 8])
def test_an_error_about_a_request_reaches_its_client(
    client: int, proto: int, size: int, lb: Balancer
) -> None:
    other = OTHER[client]
    serve(lb, client, proto, 8080)
    request = either(proto, *ENDS[client], payload=b"y" * 50, tos=0x48, ttl=9)
    sent = network(forwarded(lb.run(request)))
    packet = error(
        too_big(other), sent.src, sent, HEADER[other] + size if size else 0, ttl=50, tos=0x2C
    )
    packet.src = BACKEND_MAC
    out = lb.run(packet)
    said(out, Reason.SENT_ERROR_TO_CLIENT)
    assert (out.packet.src, out.packet.dst) == (OWN_MAC, ROUTER_MAC)
    outer = network(out.packet)
    assert (outer.src, outer.dst) == (VIP[client], CLIENT[client])
    assert hops_and_class(outer) == (49, 0x2C)
    inner = quote_of(out.packet, client)
    assert tuple_of(inner) == (CLIENT[client], 40000, VIP[client], 80)
    as_sent = network(request.__class__(bytes(request)))
    assert hops_and_class(inner) == (8, 0x48)
    assert length_of(inner) == length_of(as_sent)
    if proto == UDP:
        assert bytes(inner)[-2:] == transport(as_sent).chksum.to_bytes(2, "big")
    else:
        assert bytes(inner)[-4:] == (1000).to_bytes(4, "big")


@clients
@protocols
def test_an_error_about_a_reply_reaches_its_backend(client: int, proto: int, lb: Balancer) -> None:
    other = OTHER[client]
    serve(lb, client, proto, 8080)
    sent = forwarded(lb.run(either(proto, *ENDS[client])))
    answer = answer_to(sent, payload=b"answer")
    reply = network(returned(lb.run(answer)))
    out = lb.run(error(too_big(client), VIP[client], reply))
    assert said(out, Reason.SENT_ERROR_TO_BACKEND)[2] == {V4: 1420, V6: 1380}[client]
    assert (out.packet.src, out.packet.dst) == (OWN_MAC, BACKEND_MAC)
    outer = network(out.packet)
    assert (outer.src, outer.dst) == (OWN[other], BACKEND[other])
    inner = quote_of(out.packet, other)
    assert tuple_of(inner) == (BACKEND[other], 8080, OWN[other], transport(sent).sport)
    if proto == UDP:
        as_sent = answer.__class__(bytes(answer))
        assert bytes(inner)[-2:] == transport(as_sent).chksum.to_bytes(2, "big")


def hops_and_class(header: Packet) -> tuple[int, int]:
    return (header.hlim, header.tc) if IPv6 in header else (header.ttl, header.tos)


def length_of(packet: Packet) -> int:
    """Of the payload, as the header says."""
    return int(packet.plen) if IPv6 in packet else int(packet.len) - 4 * int(packet.ihl)


@clients
def test_an_error_about_no_known_flow(client: int, lb: Balancer) -> None:
    serve(lb, client, TCP)
    forwarded(lb.run(either(TCP, *ENDS[client])))
    stranger = network(either(TCP, VIP[client], CLIENT[client], sport=80, dport=7))
    out = lb.run(error(too_big(client), VIP[client], stranger))
    assert out.said == (XDP_DROP, {Reason.DROP_NAT_NO_FLOW: 1})


@clients
def test_its_ttl_expires_too(client: int, lb: Balancer) -> None:
    serve(lb, client, TCP)
    sent = network(forwarded(lb.run(either(TCP, *ENDS[client]))))
    out = lb.run(error(too_big(OTHER[client]), sent.src, sent, ttl=1))
    assert out.said == (XDP_DROP, {Reason.DROP_TTL_EXPIRED: 1})


def test_a_quote_with_options(lb: Balancer) -> None:
    """As a router quotes that has put a route into the header."""
    serve(lb, V6, TCP)
    sent = network(forwarded(lb.run(either(TCP, *ENDS[V6], payload=b"12345"))))
    with_options = IP(bytes(sent))
    with_options.options, with_options.ihl = [Raw(b"\x01" * 8)], 7
    with_options.len += 8
    out = lb.run(error(too_big(V4), sent.src, with_options))
    said(out, Reason.SENT_ERROR_TO_CLIENT)
    inner = quote_of(out.packet, V6)
    assert tuple_of(inner) == (CLIENT[V6], 40000, VIP[V6], 80)
    assert inner.plen == 20 + 5
