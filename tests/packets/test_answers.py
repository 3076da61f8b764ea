# SPDX-License-Identifier: Apache-2.0
"""What a sender gets instead of silence: RST, ICMP unreachable, ICMP too big."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from scapy.layers.inet import ICMP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6PacketTooBig,
    IPv6,
    IPv6ExtHdrHopByHop,
)
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from shunt.kern.libbpf import XDP_DROP, XDP_TX
from tests.packets import balancer
from tests.packets.balancer import Balancer, Out, Reason
from tests.packets.frames import ETH, OWN_MAC, ROUTER_MAC, either, ether, ip, network, tcp, udp

ENDS = {4: ("192.0.2.1", "203.0.113.1"), 6: ("2001:db8:c::1", "2001:db8:a::1")}
BACKENDS = {4: "10.0.0.1", 6: "fd00::1"}
HEADER = {4: 20, 6: 40}
OPTIONS = [IPOption_NOP()] * 4

versions = pytest.mark.parametrize("version", [4, 6])


def answered(out: Out, reason: int) -> Packet:
    """The answer: back to where the frame came from."""
    assert out.said == (XDP_TX, {reason: 1})
    assert (out.packet.src, out.packet.dst) == (OWN_MAC, ROUTER_MAC)
    return out.packet


def from_vip_to_client(packet: Packet, version: int) -> None:
    src, dst = ENDS[version]
    assert (network(packet).src, network(packet).dst) == (dst, src)


# flags, sequence, acknowledgement, payload -> flags, sequence, acknowledgement (RFC 9293, 3.10.7.1)
RESETS = [
    ("S", 1000, 0, 0, ("RA", 0, 1001)),
    ("S", 1000, 0, 50, ("RA", 0, 1051)),
    ("S", 2**32 - 1, 0, 0, ("RA", 0, 0)),
    ("F", 1000, 0, 0, ("RA", 0, 1001)),
    ("F", 1000, 0, 7, ("RA", 0, 1008)),
    ("P", 1000, 0, 7, ("RA", 0, 1007)),
    ("", 1000, 0, 0, ("RA", 0, 1000)),
    ("SF", 1000, 0, 3, ("RA", 0, 1005)),
    ("A", 1000, 5555, 0, ("R", 5555, 0)),
    ("PA", 1000, 5555, 99, ("R", 5555, 0)),
    ("FA", 1000, 5555, 0, ("R", 5555, 0)),
    ("SA", 1000, 5555, 0, ("R", 5555, 0)),
]


@versions
@pytest.mark.parametrize(("flags", "seq", "ack", "size", "want"), RESETS)
def test_rst(
    version: int,
    flags: str,
    seq: int,
    ack: int,
    size: int,
    want: tuple[str, int, int],
    lb: Balancer,
) -> None:
    lb.add_service(ENDS[version][1])
    packet = tcp(*ENDS[version], flags, sport=4321, seq=seq, ack=ack, payload=bytes(size))
    reply = answered(lb.run(packet), Reason.SENT_RST_NO_BACKEND)
    from_vip_to_client(reply, version)
    assert (str(reply[TCP].flags), reply[TCP].seq, reply[TCP].ack) == want
    assert (reply[TCP].sport, reply[TCP].dport, reply[TCP].window) == (80, 4321, 0)
    assert len(reply) == ETH + HEADER[version] + 20


@versions
@pytest.mark.parametrize("flags", ["R", "RA", "SR"])
def test_a_reset_is_never_answered(version: int, flags: str, lb: Balancer) -> None:
    lb.add_service(ENDS[version][1])
    out = lb.run(tcp(*ENDS[version], flags))
    assert out.said == (XDP_DROP, {Reason.DROP_NO_BACKEND: 1})


@pytest.mark.parametrize(
    "packet",
    [
        tcp(*ENDS[4], options=OPTIONS, payload=b"x"),
        ether(ip(*ENDS[6]) / IPv6ExtHdrHopByHop() / TCP(dport=80, seq=1000) / Raw(b"x")),
        ether(ip(*ENDS[4]) / TCP(dport=80, seq=1000, options=[("MSS", 1460)]) / Raw(b"x")),
        Raw(bytes(tcp(*ENDS[4], payload=b"x")) + bytes(20)),
    ],
    ids=["IPv4 options", "IPv6 extension header", "TCP options", "padding"],
)
def test_rst_counts_payload_only(packet: Packet, lb: Balancer) -> None:
    for _, vip in ENDS.values():
        lb.add_service(vip)
    reply = answered(lb.run(packet), Reason.SENT_RST_NO_BACKEND)
    assert reply[TCP].ack == 1002
    assert isinstance(network(reply).payload, TCP)


@versions
def test_rst_is_not_on_the_budget(version: int, make_lb: Callable[..., Balancer]) -> None:
    lb = make_lb(answers_per_s=0)
    lb.add_service(ENDS[version][1])
    answered(lb.run(tcp(*ENDS[version])), Reason.SENT_RST_NO_BACKEND)


@versions
@pytest.mark.parametrize("size", [0, 1, 4, 1000])
def test_unreachable(version: int, size: int, lb: Balancer) -> None:
    lb.add_service(ENDS[version][1], proto=balancer.UDP)
    packet = udp(*ENDS[version], payload=bytes(size), tos=4, ttl=9)
    reply = answered(lb.run(packet), Reason.SENT_UNREACHABLE)
    from_vip_to_client(reply, version)
    error = reply[ICMP if version == 4 else ICMPv6DestUnreach]
    assert (error.type, error.code) == ((3, 3) if version == 4 else (1, 4))
    quoted(reply, packet, version)


def quoted(reply: Packet, packet: Packet, version: int) -> None:
    """An error quotes the IP header and eight bytes, as they came."""
    quote = HEADER[version] + 8
    assert bytes(reply)[-quote:] == bytes(packet)[ETH : ETH + quote]
    assert len(reply) == ETH + HEADER[version] + 8 + quote


MODES = [("dsr-ipip", 4, 20), ("dsr-ipip", 6, 40), ("dsr-l2", 0, 0), ("nat", 0, 0)]


@versions
@pytest.mark.parametrize("proto", [balancer.TCP, balancer.UDP])
@pytest.mark.parametrize(("mode", "outer", "outer_bytes"), MODES)
@pytest.mark.parametrize("mtu", [1500, 1420])
def test_too_big_tells_what_would_fit(
    version: int, proto: int, mode: str, outer: int, outer_bytes: int, mtu: int, lb: Balancer
) -> None:
    service = lb.add_service(ENDS[version][1], proto=proto, mode=mode)
    hop = lb.add_nexthop("10.0.0.9" if version == 4 else "fd00::9", mtu=mtu)
    service.set_slots(lb.add_backend(service.id, BACKENDS[outer or version], nexthop=hop))
    packet = either(proto, *ENDS[version], payload=bytes(1500))
    reply = answered(lb.run(packet), Reason.SENT_TOO_BIG)
    from_vip_to_client(reply, version)
    if version == 4:
        error = reply[ICMP]
        assert (error.type, error.code, error.nexthopmtu) == (3, 4, mtu - outer_bytes)
    else:
        error = reply[ICMPv6PacketTooBig]
        assert (error.code, error.mtu) == (0, mtu - outer_bytes)
    quoted(reply, packet, version)
    # A sender that does as it is told gets through.
    payload = mtu - outer_bytes - (len(either(proto, *ENDS[version])) - ETH)
    out = lb.run(either(proto, *ENDS[version], payload=bytes(payload)))
    assert out.reasons == {Reason.SENT_TO_BACKEND: 1}


def test_quote_ends_before_what_follows_an_extension_header(lb: Balancer) -> None:
    lb.add_service(ENDS[6][1], proto=balancer.UDP)
    packet = ether(ip(*ENDS[6]) / IPv6ExtHdrHopByHop() / UDP(dport=80))
    reply = answered(lb.run(packet), Reason.SENT_UNREACHABLE)
    quoted(reply, packet, 6)
    assert IPv6(bytes(reply)[-48:]).nh == 0


def test_ipv4_options_are_not_quoted_nor_answered(lb: Balancer) -> None:
    lb.add_service(ENDS[4][1], proto=balancer.UDP)
    out = lb.run(udp(*ENDS[4], options=OPTIONS))
    assert out.said == (XDP_DROP, {Reason.DROP_NO_BACKEND: 1})
    assert out.data == bytes(udp(*ENDS[4], options=OPTIONS))
    lb.add_service(ENDS[4][1], proto=balancer.TCP, backends=[BACKENDS[4]])
    out = lb.run(tcp(*ENDS[4], "A", options=OPTIONS, payload=bytes(1460)))
    assert out.said == (XDP_DROP, {Reason.DROP_TOO_BIG: 1})


@versions
def test_answers_are_rationed_by_the_second(version: int, make_lb: Callable[..., Balancer]) -> None:
    lb = make_lb(answers_per_s=3)
    lb.add_service(ENDS[version][1], proto=balancer.UDP)
    lb.add_service(ENDS[version][1], proto=balancer.TCP, backends=[BACKENDS[version]])
    unanswered, big = udp(*ENDS[version]), tcp(*ENDS[version], payload=bytes(1500))

    def sent_of_five() -> tuple[int, int]:
        """Both kinds of ICMP errors are paid from one purse."""
        outs = [lb.run(unanswered if i % 2 else big) for i in range(5)]
        return sum(o.verdict == XDP_TX for o in outs), sum(o.verdict == XDP_DROP for o in outs)

    assert sent_of_five() == (3, 2)
    lb.advance(0.999)
    assert sent_of_five() == (0, 5)
    lb.advance(0.001)
    assert sent_of_five() == (3, 2)
    lb.advance(3600)
    assert sent_of_five() == (3, 2)


@versions
@pytest.mark.parametrize("proto", [balancer.TCP, balancer.UDP])
def test_an_answer_is_understood_by_the_stack_it_is_for(
    version: int, proto: int, lb: Balancer
) -> None:
    """The quote holds the ports, by which a sender finds the socket."""
    lb.add_service(ENDS[version][1], proto=proto, backends=[BACKENDS[4]])
    packet = either(proto, *ENDS[version], sport=7777, payload=bytes(1500))
    reply = answered(lb.run(packet), Reason.SENT_TOO_BIG)
    inner = Ether(bytes(reply)).payload.payload.payload
    assert (inner.src, inner.dst) == ENDS[version]
    assert (inner.payload.sport, inner.payload.dport) == (7777, 80)
