# SPDX-License-Identifier: Apache-2.0
"""ICMP for a VIP: errors reach whoever sent what they quote; echo requests are answered."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import numpy as np
import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6PacketTooBig,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrFragment,
)
from scapy.packet import Packet, Raw

from shunt.kern.libbpf import XDP_DROP, XDP_PASS, XDP_TX
from tests.packets import balancer
from tests.packets.balancer import BACKEND_MAC, Balancer, Reason, Service
from tests.packets.frames import ETH, OWN_MAC, ROUTER_MAC, either, ether, ip, network, tcp

CLIENT = {4: "192.0.2.1", 6: "2001:db8:c::1"}
VIP = {4: "203.0.113.1", 6: "2001:db8:a::1"}
ROUTER = {4: "198.51.100.9", 6: "2001:db8:e::9"}
BACKENDS = {4: ["10.0.0.1", "10.0.0.2"], 6: ["fd00::1", "fd00::2"]}
OUTER = {"dsr-ipip-4": 4, "dsr-ipip-6": 6}

versions = pytest.mark.parametrize("version", [4, 6])
protos = pytest.mark.parametrize("proto", [balancer.TCP, balancer.UDP])


def error(version: int, to: str, quote: Packet, size: int = 0, kind: str = "too-big") -> Packet:
    """An ICMP error as a router sends it. `size`: bytes of the quote; 0 is all of it."""
    raw = bytes(quote)[: size or None]
    headers: dict[tuple[int, str], Any] = {
        (4, "too-big"): ICMP(type=3, code=4, nexthopmtu=1280),
        (4, "unreachable"): ICMP(type=3, code=1),
        (4, "ttl"): ICMP(type=11, code=0),
        (4, "redirect"): ICMP(type=5, code=1),
        (6, "too-big"): ICMPv6PacketTooBig(mtu=1280),
        (6, "unreachable"): ICMPv6DestUnreach(code=3),
        (6, "ttl"): ICMPv6TimeExceeded(code=0),
    }
    return ether(ip(ROUTER[version], to) / headers[version, kind] / Raw(raw))


def sent_by_vip(version: int, proto: int, *, sport: int = 80, dport: int = 40000) -> Packet:
    """The packet that a router on the way to the client quotes."""
    frame = either(
        proto, VIP[version], CLIENT[version], sport=sport, dport=dport, payload=b"x" * 99
    )
    return network(frame.__class__(bytes(frame)))


def quote_of(packet: Packet, version: int, skip: int = 0) -> Packet:
    """What an error quotes, parsed from its bytes."""
    start = ETH + skip + (20 if version == 4 else 40) + 8
    return (IP if version == 4 else IPv6)(bytes(packet)[start:])


def tuple_of(packet: Packet) -> tuple[str, int, str, int]:
    ports = bytes(packet.payload)
    sport, dport = (int.from_bytes(ports[i : i + 2], "big") for i in (0, 2))
    return packet.src, sport, packet.dst, dport


def service(lb: Balancer, version: int, proto: int, mode: str) -> Service:
    family = OUTER.get(mode, version)
    name = mode[:8] if mode in OUTER else mode
    return lb.add_service(VIP[version], 80, proto, name, BACKENDS[family])


def owner(lb: Balancer, version: int, proto: int) -> Any:
    """To which MAC and address the flow's own packets go."""
    out = lb.run(either(proto, CLIENT[version], VIP[version]))
    assert out.reasons == {Reason.SENT_TO_BACKEND: 1}
    return out.packet.payload.dst


@versions
@protos
@pytest.mark.parametrize("mode", ["dsr-ipip-4", "dsr-ipip-6"])
@pytest.mark.parametrize("kind", ["too-big", "unreachable", "ttl"])
def test_an_error_is_wrapped_whole_for_the_backend_of_the_flow(
    version: int, proto: int, mode: str, kind: str, lb: Balancer
) -> None:
    service(lb, version, proto, mode)
    packet = error(version, VIP[version], sent_by_vip(version, proto), kind=kind)
    out = lb.run(packet)
    assert out.said == (XDP_TX, {Reason.SENT_ERROR_TO_BACKEND: 1})
    assert out.packet.payload.dst == owner(lb, version, proto)
    assert out.data.endswith(bytes(packet)[ETH:])
    assert out.packet.dst == BACKEND_MAC


@versions
@protos
def test_it_goes_where_the_flow_goes_for_many_flows(version: int, proto: int, lb: Balancer) -> None:
    service(lb, version, proto, "dsr-ipip-4")
    seen = set()
    for port in range(40000, 40040):
        flow = either(proto, CLIENT[version], VIP[version], sport=port)
        quote = sent_by_vip(version, proto, dport=port)
        out = lb.run(error(version, VIP[version], quote))
        to = out.packet.payload.dst
        assert to == lb.backend_of(flow)
        seen.add(to)
    assert len(seen) == 2


@versions
@protos
def test_l2_forwards_it_as_it_is(version: int, proto: int, lb: Balancer) -> None:
    service(lb, version, proto, "dsr-l2")
    packet = error(version, VIP[version], sent_by_vip(version, proto))
    out = lb.run(packet)
    assert out.said == (XDP_TX, {Reason.SENT_ERROR_TO_BACKEND: 1})
    assert (out.packet.dst, network(out.packet).dst) == (BACKEND_MAC, VIP[version])
    assert bytes(out.packet)[ETH + 40 :] == bytes(packet)[ETH + 40 :]


@versions
@protos
@pytest.mark.parametrize("size", [0, 8])
def test_nat_translates_error_and_quote_for_the_backend(
    version: int, proto: int, size: int, lb: Balancer
) -> None:
    lb.add_service(VIP[version], 80, proto, "nat", BACKENDS[version], backend_port=8080)
    sent = network(lb.run(either(proto, CLIENT[version], VIP[version])).packet)
    quote = sent_by_vip(version, proto)
    quoted = (20 if version == 4 else 40) + size if size else 0
    out = lb.run(error(version, VIP[version], quote, quoted))
    assert out.said == (XDP_TX, {Reason.SENT_ERROR_TO_BACKEND: 1})
    packet = out.packet  # its checksums are right
    # As if the backend's own packet, to us, had met the router.
    source, port, backend, backend_port = tuple_of(sent)
    assert (network(packet).src, network(packet).dst) == (source, backend)
    inner = quote_of(packet, version)
    assert tuple_of(inner) == (backend, backend_port, source, port)
    checksums_hold(inner, whole=not size)


@versions
@protos
@pytest.mark.parametrize("size", [0, 8])
def test_nat_restores_the_quote_for_the_client(
    version: int, proto: int, size: int, lb: Balancer
) -> None:
    lb.add_service(VIP[version], 80, proto, "nat", BACKENDS[version], backend_port=8080)
    sent = lb.run(either(proto, CLIENT[version], VIP[version], payload=b"y" * 50)).packet
    quoted = (20 if version == 4 else 40) + size if size else 0
    packet = error(version, network(sent).src, network(sent), quoted)
    packet.src = BACKEND_MAC
    out = lb.run(packet)
    assert out.said == (XDP_TX, {Reason.SENT_ERROR_TO_CLIENT: 1})
    assert (out.packet.src, out.packet.dst) == (OWN_MAC, ROUTER_MAC)
    assert (network(out.packet).src, network(out.packet).dst) == (VIP[version], CLIENT[version])
    inner = quote_of(out.packet, version)
    assert tuple_of(inner) == (CLIENT[version], 40000, VIP[version], 80)
    checksums_hold(inner, whole=not size)


def checksums_hold(inner: Packet, whole: bool) -> None:
    """Of a quoted packet: its header's, and its transport header's if all of it is there."""
    again = inner.copy()
    if IP in again:
        del again[IP].chksum
        assert (again.__class__(bytes(again)))[IP].chksum == inner[IP].chksum
    if whole:
        name = TCP if TCP in again else UDP
        del again[name].chksum
        assert again.__class__(bytes(again))[name].chksum == inner[name].chksum


@versions
def test_a_quote_creates_confirms_and_closes_nothing(version: int, lb: Balancer) -> None:
    moving = service(lb, version, balancer.TCP, "dsr-l2")
    moving.move()
    lb.run(tcp(CLIENT[version], VIP[version], "S"))
    before = lb.flows().copy()
    for flags in ("SA", "R", "FA"):
        frame = tcp(VIP[version], CLIENT[version], flags, sport=80, dport=40000)
        for port in (40000, 41000):
            quote = network(frame.__class__(bytes(frame)))
            quote[TCP].dport = port
            lb.run(error(version, VIP[version], quote))
    assert np.array_equal(before, lb.flows())


@versions
@pytest.mark.parametrize("mode", ["dsr-ipip-4"])
def test_on_a_moving_slot_it_follows_the_flow(version: int, mode: str, lb: Balancer) -> None:
    moving = service(lb, version, balancer.TCP, mode)
    moving.move()
    new, old = BACKENDS[4][1], BACKENDS[4][0]
    assert lb.backend_of(tcp(CLIENT[version], VIP[version], "S", sport=1)) == new

    def to(port: int) -> str:
        out = lb.run(error(version, VIP[version], sent_by_vip(version, balancer.TCP, dport=port)))
        assert out.reasons == {Reason.SENT_ERROR_TO_BACKEND: 1}
        return str(out.packet.payload.dst)

    assert to(1) == new  # remembered
    assert to(2) == old  # unknown: an older flow
    lb.set_flags(moving.backends[0], 0)
    assert to(2) == new


@versions
@pytest.mark.parametrize("mode", ["dsr-ipip-4", "nat"])
def test_services_that_hash_by_client_or_remember_clients(
    version: int, mode: str, lb: Balancer
) -> None:
    """The quote's flow has the hash, and the entry, that its packets have."""
    family = 4 if mode == "dsr-ipip-4" else version
    made = lb.add_service(VIP[version], 80, balancer.UDP, mode[:8], BACKENDS[family])
    made.ask(hash_client=True, affinity_ns=10**12)
    wanted = {}
    for number in range(1, 30):
        client = str(ip_address(CLIENT[version]) + number)
        sent = lb.run(either(balancer.UDP, client, VIP[version]))
        assert sent.reasons == {Reason.SENT_TO_BACKEND: 1}
        wanted[client] = sent.packet.payload.dst
    # What is remembered counts, not what the slots say by now.
    made.set_slots(made.backends[0])
    assert len(set(wanted.values())) == 2
    for client, to in wanted.items():
        reply = either(balancer.UDP, VIP[version], client, sport=80, dport=40000)
        out = lb.run(error(version, VIP[version], network(reply.__class__(bytes(reply)))))
        assert out.reasons == {Reason.SENT_ERROR_TO_BACKEND: 1}
        assert out.packet.payload.dst == to


@versions
def test_of_nobodys_flow_or_with_a_foreign_quote_it_is_the_stacks(
    version: int, lb: Balancer
) -> None:
    service(lb, version, balancer.TCP, "dsr-l2")
    lb.open_port(balancer.UDP, 80)
    portless = (
        ip(VIP[4], CLIENT[4], flags="MF", frag=3) if version == 4 else ip(VIP[6], CLIENT[6], nh=59)
    )
    for packet in (
        error(version, VIP[version], portless / Raw(bytes(40))),
        error(version, VIP[version], sent_by_vip(version, balancer.UDP)),
        error(version, VIP[version], sent_by_vip(version, balancer.TCP, sport=81)),
        error(version, CLIENT[version], sent_by_vip(version, balancer.TCP)),
    ):
        out = lb.run(packet)
        assert out.said == (XDP_PASS, {Reason.PASS_NOT_OURS: 1})
        assert out.data == bytes(packet)


@pytest.mark.parametrize("mode", ["dsr-ipip", "nat"])
def test_a_quote_of_a_first_fragment(mode: str, lb: Balancer) -> None:
    """IPv6: what the backend sent in fragments does not fit further on."""
    lb.add_service(VIP[6], 80, balancer.UDP, mode, BACKENDS[6], backend_port=8080)
    sent = network(lb.run(either(balancer.UDP, CLIENT[6], VIP[6])).packet)
    body = sent_by_vip(6, balancer.UDP).payload
    for offset, said in (
        (0, (XDP_TX, {Reason.SENT_ERROR_TO_BACKEND: 1})),
        (9, (XDP_PASS, {Reason.PASS_NOT_OURS: 1})),
    ):
        quote = IPv6(src=VIP[6], dst=CLIENT[6]) / IPv6ExtHdrFragment(nh=17, m=1, offset=offset)
        out = lb.run(error(6, VIP[6], quote / Raw(bytes(body))))
        assert out.said == said
        if offset or mode != "nat":
            continue
        inner = IPv6(out.data[ETH + 48 :])
        assert (inner.src, inner.dst) == (sent.dst, sent.src)
        assert out.packet  # its checksums are right
        assert (inner[UDP].sport, inner[UDP].dport) == (8080, sent[UDP].sport)
        whole = IPv6(src=inner.src, dst=inner.dst) / inner[UDP].copy()
        assert IPv6(bytes(whole))[UDP].chksum == inner[UDP].chksum
        del whole[UDP].chksum
        assert IPv6(bytes(whole))[UDP].chksum == inner[UDP].chksum


def test_a_redirect_is_none(lb: Balancer) -> None:
    service(lb, 4, balancer.TCP, "dsr-l2")
    out = lb.run(error(4, VIP[4], sent_by_vip(4, balancer.TCP), kind="redirect"))
    assert out.said == (XDP_PASS, {Reason.PASS_NOT_OURS: 1})


@versions
def test_cut_anywhere_it_harms_nobody(version: int, lb: Balancer) -> None:
    for proto in (balancer.TCP, balancer.UDP):
        lb.add_service(VIP[version], 80, proto, "nat", BACKENDS[version])
        lb.run(either(proto, CLIENT[version], VIP[version]))
        whole = bytes(error(version, VIP[version], sent_by_vip(version, proto)))
        for size in range(ETH, len(whole)):
            out = lb.run(whole[:size])
            assert out.verdict == XDP_PASS
            assert out.data == whole[:size]


@versions
def test_without_the_translation_it_is_dropped(version: int, lb: Balancer) -> None:
    lb.add_service(VIP[version], 80, balancer.TCP, "nat", BACKENDS[version])
    out = lb.run(error(version, VIP[version], sent_by_vip(version, balancer.TCP)))
    assert out.said == (XDP_DROP, {Reason.DROP_NAT_NO_FLOW: 1})


@versions
def test_nobody_is_told_that_an_error_is_too_big(version: int, lb: Balancer) -> None:
    made = lb.add_service(VIP[version], mode="dsr-ipip")
    hop = lb.add_nexthop(mtu=150)
    made.set_slots(lb.add_backend(made.id, BACKENDS[4][0], nexthop=hop))
    out = lb.run(error(version, VIP[version], sent_by_vip(version, balancer.TCP)))
    assert out.said == (XDP_DROP, {Reason.DROP_TOO_BIG: 1})


def test_options_in_both_headers(lb: Balancer) -> None:
    lb.add_service(VIP[4], 80, balancer.TCP, "nat", BACKENDS[4])
    sent = network(lb.run(tcp(CLIENT[4], VIP[4])).packet)
    options = [IPOption_NOP()] * 8
    quote = IP(bytes(ip(VIP[4], CLIENT[4], options=options) / TCP(sport=80, dport=40000)))
    packet = ether(ip(ROUTER[4], VIP[4], options=options) / ICMP(type=3, code=1) / quote)
    out = lb.run(packet)
    assert out.said == (XDP_TX, {Reason.SENT_ERROR_TO_BACKEND: 1})
    assert network(out.packet).dst == sent.dst
    inner = IP(out.data[ETH + 28 + 8 :])
    assert (inner.src, inner.dst, inner[TCP].dport) == (sent.dst, sent.src, sent[TCP].sport)
    checksums_hold(inner, whole=True)


def test_a_quoted_datagram_without_a_checksum_stays_without(lb: Balancer) -> None:
    lb.add_service(VIP[4], 80, balancer.UDP, "nat", BACKENDS[4])
    lb.run(either(balancer.UDP, CLIENT[4], VIP[4]))
    quote = sent_by_vip(4, balancer.UDP)
    quote[UDP].chksum = 0
    out = lb.run(error(4, VIP[4], quote))
    assert out.said == (XDP_TX, {Reason.SENT_ERROR_TO_BACKEND: 1})
    assert quote_of(out.packet, 4)[UDP].chksum == 0
