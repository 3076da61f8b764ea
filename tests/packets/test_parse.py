# SPDX-License-Identifier: Apache-2.0
"""Which frames are looked at at all, and that none, however short, leaves uncounted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from scapy.layers.inet import ICMP, TCP, UDP, IPOption_NOP, IPOption_Timestamp
from scapy.layers.inet6 import (
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
)
from scapy.layers.l2 import GRE, Dot1Q, Ether
from scapy.packet import Packet, Raw

from shunt.kern.libbpf import XDP_PASS, XDP_TX
from tests.packets import balancer
from tests.packets.balancer import Balancer, Out, Reason
from tests.packets.frames import ETH, ether, ip, tcp, transport, udp

CLIENT4, VIP4, BACKEND4 = "192.0.2.1", "203.0.113.1", "10.0.0.1"
CLIENT6, VIP6, BACKEND6 = "2001:db8:c::1", "2001:db8:a::1", "fd00::1"
ENDS = {4: (CLIENT4, VIP4), 6: (CLIENT6, VIP6)}
OPTIONS = [IPOption_NOP(), IPOption_NOP(), IPOption_NOP(), IPOption_NOP()]
MODES = ("dsr-ipip", "dsr-l2", "nat")
HOP, DEST = IPv6ExtHdrHopByHop(), IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(12))])
ROUTING = IPv6ExtHdrRouting(addresses=["2001:db8::9"], segleft=0)


def serve_everything(lb: Balancer, mode: str, *, backends: bool = True) -> None:
    for proto in (balancer.TCP, balancer.UDP):
        for vip, backend in ((VIP4, BACKEND4), (VIP6, BACKEND6)):
            lb.add_service(vip, 80, proto, mode, [backend] if backends else [])


def passed(lb: Balancer, frame: Packet | bytes) -> Any:
    """The reason of a frame that must go to the stack as it came."""
    out = lb.run(frame)
    assert out.verdict == XDP_PASS
    assert out.data == bytes(frame)
    assert list(out.reasons.values()) == [1]
    return next(iter(out.reasons))


def opening_frames() -> Iterator[Packet]:
    for src, dst in ENDS.values():
        yield tcp(src, dst, payload=b"data")
        yield udp(src, dst, payload=b"data")
    yield tcp(CLIENT4, VIP4, options=OPTIONS)
    yield ether(ip(CLIENT6, VIP6) / HOP / DEST / TCP(dport=80) / Raw(b"data"))


@pytest.mark.parametrize("backends", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_a_frame_cut_anywhere_goes_to_the_stack(mode: str, backends: bool, lb: Balancer) -> None:
    """From 14 bytes on, an Ethernet header: the kernel runs no program on less."""
    serve_everything(lb, mode, backends=backends)
    for whole in map(bytes, opening_frames()):
        for length in range(ETH, len(whole)):
            assert passed(lb, whole[:length]) == Reason.PASS_MALFORMED, length
        assert lb.run(whole).verdict == XDP_TX


@pytest.mark.parametrize("mode", MODES)
def test_a_cut_packet_in_a_padded_frame_goes_to_the_stack(mode: str, lb: Balancer) -> None:
    """Here the IP header itself says that too little of the transport header came."""
    serve_everything(lb, mode)
    for whole in map(bytes, opening_frames()):
        version = whole[ETH] >> 4
        size = len(Ether(whole).payload) - len(transport(Ether(whole)))
        needed = size + (20 if TCP in Ether(whole) else 8)
        fixed = 0 if version == 4 else 40
        for length in range(fixed, needed):
            field = ETH + (2 if version == 4 else 4)
            short = (length - fixed).to_bytes(2, "big")
            frame = whole[:field] + short + whole[field + 2 :] + bytes(20)
            assert passed(lb, frame) == Reason.PASS_MALFORMED, length


@pytest.mark.parametrize(("field", "value"), [("ihl", 4), ("version", 5), ("len", 41)])
def test_a_wrong_ipv4_header_goes_to_the_stack(field: str, value: int, lb: Balancer) -> None:
    serve_everything(lb, "dsr-ipip")
    packet = ether(ip(CLIENT4, VIP4, **{field: value}) / TCP(dport=80))
    assert passed(lb, packet) == Reason.PASS_MALFORMED


@pytest.mark.parametrize(("field", "value"), [("version", 4), ("plen", 21), ("plen", 0)])
def test_a_wrong_ipv6_header_goes_to_the_stack(field: str, value: int, lb: Balancer) -> None:
    serve_everything(lb, "dsr-ipip")
    packet = ether(ip(CLIENT6, VIP6, **{field: value}) / TCP(dport=80))
    assert passed(lb, packet) == Reason.PASS_MALFORMED


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("words", [0, 4, 6])
def test_a_tcp_header_longer_or_shorter_than_possible(
    version: int, words: int, lb: Balancer
) -> None:
    serve_everything(lb, "dsr-ipip", backends=False)
    packet = ether(ip(*ENDS[version]) / TCP(dport=80, dataofs=words))
    assert passed(lb, packet) == Reason.PASS_MALFORMED


@pytest.mark.parametrize(
    "packet",
    [
        udp(CLIENT4, VIP4, frag=185, payload=bytes(16)),
        ether(ip(CLIENT6, VIP6, nh=44) / IPv6ExtHdrFragment(nh=17, offset=100) / Raw(bytes(16))),
        ether(ip(CLIENT6, VIP6) / HOP / IPv6ExtHdrFragment(nh=17, offset=1) / Raw(bytes(16))),
    ],
)
def test_a_fragment_without_its_first_goes_to_the_stack(packet: Packet, lb: Balancer) -> None:
    serve_everything(lb, "dsr-ipip")
    assert passed(lb, packet) == Reason.PASS_FRAGMENT


def test_what_is_not_ip_goes_to_the_stack(lb: Balancer) -> None:
    serve_everything(lb, "dsr-ipip")
    assert passed(lb, Ether(type=0x88CC) / Raw(bytes(50))) == Reason.PASS_NOT_IP
    tags = Dot1Q(vlan=5) / Dot1Q(vlan=6) / Dot1Q(vlan=7)
    tagged = ether(tags) / ip(CLIENT4, VIP4) / TCP(dport=80)
    assert passed(lb, tagged) == Reason.PASS_NOT_IP


@pytest.mark.parametrize(
    "packet",
    [
        ether(ip(CLIENT4, VIP4) / ICMP()),
        ether(ip(CLIENT4, VIP4) / GRE() / ip(CLIENT4, VIP4) / TCP(dport=80)),
        ether(ip(CLIENT6, VIP6, nh=59)),
        tcp(CLIENT4, VIP4, dport=81),
        udp(CLIENT6, VIP6, dport=81),
        tcp(CLIENT4, "203.0.113.2"),
        tcp(CLIENT6, "2001:db8:a::2"),
        tcp(CLIENT4, VIP4, dport=53),
    ],
)
def test_nobodys_packet_goes_to_the_stack(packet: Packet, lb: Balancer) -> None:
    serve_everything(lb, "dsr-ipip")
    lb.add_service(VIP4, 53, balancer.UDP, backends=[BACKEND4])
    assert passed(lb, packet) == Reason.PASS_NOT_OURS


def test_tcp_and_udp_on_one_port_are_two_services(lb: Balancer) -> None:
    lb.add_service(VIP4, 53, balancer.TCP, backends=["10.0.0.1"])
    lb.add_service(VIP4, 53, balancer.UDP, backends=["10.0.0.2"])
    assert lb.backend_of(tcp(CLIENT4, VIP4, dport=53)) == "10.0.0.1"
    assert lb.backend_of(udp(CLIENT4, VIP4, dport=53)) == "10.0.0.2"


@pytest.mark.parametrize("port", [1, 63, 64, 65535])
def test_ports_at_the_edges_of_the_port_set(port: int, lb: Balancer) -> None:
    lb.add_service(VIP4, port, balancer.UDP, backends=[BACKEND4])
    assert lb.backend_of(udp(CLIENT4, VIP4, dport=port)) == BACKEND4
    for near in {port - 1, port + 1} & set(range(65536)):
        assert passed(lb, udp(CLIENT4, VIP4, dport=near)) == Reason.PASS_NOT_OURS


def forwarded(out: Out) -> Packet:
    assert out.said == (XDP_TX, {Reason.SENT_TO_BACKEND: 1})
    return out.packet


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("version", [4, 6])
def test_padding_stays_outside_the_packet(version: int, mode: str, lb: Balancer) -> None:
    serve_everything(lb, mode)
    bare = udp(*ENDS[version], payload=b"x")
    padded = bytes(bare) + b"\xaa" * 23
    plain, out = forwarded(lb.run(bare)), lb.run(padded)
    assert forwarded(out)
    assert out.data == bytes(plain) + b"\xaa" * 23


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [OPTIONS, [IPOption_Timestamp(flg=0)] * 3])
def test_ipv4_options_are_looked_over(options: list[Packet], mode: str, lb: Balancer) -> None:
    serve_everything(lb, mode)
    for packet in (tcp(CLIENT4, VIP4, options=options), udp(CLIENT4, VIP4, options=options)):
        sent = forwarded(lb.run(packet))
        inner = sent.payload.payload if mode == "dsr-ipip" else sent.payload
        assert inner.options == Ether(bytes(packet)).payload.options


EXTENSIONS = [(HOP,), (DEST,), (ROUTING,), (HOP, DEST), (HOP, DEST, ROUTING, DEST)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("extensions", EXTENSIONS)
def test_ipv6_extension_headers_are_looked_through(
    extensions: tuple[Packet, ...], mode: str, lb: Balancer
) -> None:
    serve_everything(lb, mode)
    for segment in (TCP(dport=80, sport=40000), UDP(dport=80, sport=40000)):
        bare = ether(ip(CLIENT6, VIP6) / segment)
        packet = ip(CLIENT6, VIP6)
        for extension in extensions:
            packet = packet / extension
        sent = forwarded(lb.run(ether(packet / segment)))
        assert [type(e) for e in extensions] == [
            type(sent.getlayer(i))
            for i in range(20)
            if isinstance(sent.getlayer(i), tuple(type(e) for e in extensions))
        ]
        if mode == "dsr-ipip":
            assert sent.payload.src == forwarded(lb.run(bare)).payload.src, "another flow's hash"


def test_more_extension_headers_than_anyone_sends_go_to_the_stack(lb: Balancer) -> None:
    serve_everything(lb, "dsr-ipip")
    packet = ip(CLIENT6, VIP6) / HOP / DEST / DEST / DEST / DEST / TCP(dport=80)
    assert passed(lb, ether(packet)) == Reason.PASS_NOT_OURS
    long = IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(250)), PadN(optdata=bytes(200))])
    packet = ip(CLIENT6, VIP6) / long / long / TCP(dport=80)
    assert passed(lb, ether(packet)) == Reason.PASS_MALFORMED
