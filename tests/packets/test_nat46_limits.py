# SPDX-License-Identifier: Apache-2.0
"""What IPv4 and IPv6 have not in common, in mode nat between the two (RFC 7915)."""

from __future__ import annotations

from typing import Any

import pytest
from scapy.layers.inet import IPOption, IPOption_LSRR, IPOption_NOP, IPOption_RR, IPOption_SSRR
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.packet import Packet

from shunt.kern.libbpf import XDP_DROP, XDP_PASS
from tests.packets.balancer import TCP, UDP, Balancer, Reason
from tests.packets.frames import ETH, either, ether, network, tcp, transport, udp
from tests.packets.nat46 import BACKEND, CLIENT, ENDS, VIP, clients, serve
from tests.packets.test_fragments import fragments_of
from tests.packets.test_nat import answer_to, forwarded, protocols, returned, without_checksum

# What the families have not in common -----------------------------------------------------------


@clients
@protocols
def test_fragments_are_dropped_and_counted(client: int, proto: int, lb: Balancer) -> None:
    serve(lb, client, proto)
    sent = forwarded(lb.run(either(proto, *ENDS[client])))
    large = [
        either(proto, *ENDS[client], payload=bytes(2000)),
        answer_to(sent, payload=bytes(2000)),
    ]
    for packet in large:
        first, second = fragments_of(packet)
        assert lb.run(first).said == (XDP_DROP, {Reason.DROP_NAT46_FRAGMENT: 1})
        assert lb.run(second).said == (XDP_PASS, {Reason.PASS_FRAGMENT: 1})
    assert lb.entries("fragments") == []


def test_fragments_of_a_flow_that_changed_family_meanwhile(lb: Balancer) -> None:
    """Never half-translated: the first one went to a backend of the client's family."""
    service = lb.add_service(VIP[4], proto=UDP, mode="nat", backends=[BACKEND[4]])
    first, second = fragments_of(udp(*ENDS[4], payload=bytes(2000)))
    assert lb.run(first).reasons == {Reason.SENT_TO_BACKEND: 1}
    lb.set_flags(service.backends[0], 0)
    service.set_slots(lb.add_backend(service.id, BACKEND[6]))
    forwarded(lb.run(udp(*ENDS[4])))
    assert lb.run(second).said == (XDP_DROP, {Reason.DROP_NAT46_FRAGMENT: 1})


def test_a_fragment_that_is_all_of_its_packet_is_translated(lb: Balancer) -> None:
    """RFC 6946."""
    serve(lb, 6, UDP)
    (whole,) = fragments_of(udp(*ENDS[6], payload=b"whole"))
    sent = forwarded(lb.run(whole))
    assert (network(sent).len, bytes(transport(sent).payload)) == (20 + 8 + 5, b"whole")


def plain4(options: list[IPOption]) -> Packet:
    frame = tcp(*ENDS[4], payload=b"payload")
    # Scapy would compute it for where a source route ends.
    transport(frame).chksum = transport(frame.__class__(bytes(frame))).chksum
    frame.payload.options = options
    return frame


UNSEEN: dict[str, Any] = {"routers": ["192.0.2.9", "192.0.2.8"], "pointer": 4}


@pytest.mark.parametrize(
    "options",
    [
        [IPOption_NOP()],
        [IPOption_NOP()] * 40,
        [IPOption_RR(routers=["0.0.0.0"] * 9)],
        [IPOption_LSRR(routers=["192.0.2.9"], pointer=8)],
        [IPOption_NOP(), IPOption_SSRR(routers=["192.0.2.9"], pointer=8)],
    ],
)
def test_options_are_left_out(options: list[IPOption], lb: Balancer) -> None:
    serve(lb, 4, TCP)
    sent = forwarded(lb.run(plain4(options)))
    assert (network(sent).nh, network(sent).plen) == (TCP, 20 + 7)
    assert bytes(transport(sent).payload) == b"payload"
    assert network(returned(lb.run(answer_to(sent)))).dst == CLIENT[4]


@pytest.mark.parametrize(
    "options",
    [
        [IPOption_LSRR(**UNSEEN)],
        [IPOption_NOP(), IPOption_NOP(), IPOption_SSRR(**UNSEEN)],
        [IPOption_RR(routers=["0.0.0.0"] * 2), IPOption_LSRR(**UNSEEN)],
        [IPOption(b"\x07\x00\x00\x00")],
        [IPOption(b"\x07\x01\x00\x00")],
    ],
)
def test_a_source_route_is_dropped_and_counted(options: list[IPOption], lb: Balancer) -> None:
    serve(lb, 4, TCP)
    out = lb.run(plain4(options))
    assert out.said == (XDP_DROP, {Reason.DROP_NAT46_NO_EQUAL: 1})


def with_headers(*headers: Packet) -> Packet:
    packet: Packet = IPv6(src=CLIENT[6], dst=VIP[6])
    for header in headers:
        packet /= header
    return ether(packet / transport(tcp(*ENDS[6], payload=b"payload")))


@pytest.mark.parametrize(
    "headers",
    [
        [IPv6ExtHdrDestOpt()],
        [IPv6ExtHdrHopByHop(), IPv6ExtHdrDestOpt()],
        [IPv6ExtHdrRouting(segleft=0, addresses=["2001:db8::9"])],
        [IPv6ExtHdrRouting(segleft=0), IPv6ExtHdrFragment(id=9)],
    ],
)
def test_extension_headers_are_left_out(headers: list[Packet], lb: Balancer) -> None:
    serve(lb, 6, TCP)
    sent = forwarded(lb.run(with_headers(*headers)))
    assert (network(sent).proto, network(sent).len) == (TCP, 20 + 20 + 7)
    assert bytes(transport(sent).payload) == b"payload"


def test_a_routing_header_still_in_force_is_dropped_and_counted(lb: Balancer) -> None:
    serve(lb, 6, TCP)
    headers = [IPv6ExtHdrDestOpt(), IPv6ExtHdrRouting(segleft=1, addresses=["2001:db8::9"])]
    out = lb.run(with_headers(*headers))
    assert out.said == (XDP_DROP, {Reason.DROP_NAT46_NO_EQUAL: 1})


# UDP without a checksum -------------------------------------------------------------------------

SIZES = [0, 1, 7, 247, 248, 249, 250, 503, 504, 505, 1000, 1451, 1452]


@pytest.mark.parametrize("size", SIZES)
def test_ipv6_gets_the_checksum_that_ipv4_left_out(size: int, lb: Balancer) -> None:
    payload = bytes((i * 7 + size) & 0xFF for i in range(size))
    serve(lb, 4, UDP)
    wanted = transport(forwarded(lb.run(udp(*ENDS[4], payload=payload)))).chksum
    sent = forwarded(lb.run(without_checksum(udp(*ENDS[4], payload=payload))))
    assert transport(sent).chksum == wanted

    lb.empty()
    serve(lb, 6, UDP)
    sent = forwarded(lb.run(udp(*ENDS[6])))
    wanted = transport(returned(lb.run(answer_to(sent, payload=payload)))).chksum
    back = returned(lb.run(without_checksum(answer_to(sent, payload=payload))))
    assert transport(back).chksum == wanted


def test_a_made_up_checksum_is_never_zero(lb: Balancer) -> None:
    serve(lb, 4, UDP)
    sent = forwarded(lb.run(without_checksum(udp(*ENDS[4], payload=b"\0\0"))))
    payload = transport(sent).chksum.to_bytes(2, "big")
    sent = forwarded(lb.run(without_checksum(udp(*ENDS[4], payload=payload))))
    assert transport(sent).chksum == 0xFFFF


def test_ipv4_may_go_without_one(lb: Balancer) -> None:
    """RFC 7915, 5.5; only tunnels send such (RFC 6935)."""
    serve(lb, 6, UDP)
    out = lb.run(without_checksum(udp(*ENDS[6], payload=b"x")))
    assert out.reasons == {Reason.SENT_TO_BACKEND: 1}
    assert out.data[ETH + 20 + 6 : ETH + 28] == b"\0\0"


@pytest.mark.parametrize("length", [0, 7, 100])
def test_a_checksum_over_what_is_not_there(length: int, lb: Balancer) -> None:
    serve(lb, 4, UDP)
    packet = without_checksum(udp(*ENDS[4], payload=b"payload"))
    packet["UDP"].len = length
    assert lb.run(packet).said == (XDP_DROP, {Reason.DROP_NAT46_NO_EQUAL: 1})
