# SPDX-License-Identifier: Apache-2.0
"""Mode dsr-geneve: the backend gets the client's packet as its own, and the VIP beside it."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import numpy as np
import pytest
from scapy.contrib.geneve import GENEVE, GeneveOptions
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from shunt.kern.libbpf import XDP_DROP, XDP_REDIRECT, XDP_TX
from tests.packets import balancer
from tests.packets.balancer import (
    BACKEND_MAC,
    ELSEWHERE,
    OWN4,
    OWN6,
    Balancer,
    Event,
    Out,
    Reason,
    Service,
    mapped,
)
from tests.packets.frames import ETH, OWN_MAC, either, ether, ip, network, tcp, udp
from tests.packets.test_icmp import CLIENT, ROUTER, VIP, error, quote_of, sent_by_vip, tuple_of

BACKENDS = {4: ("10.0.0.1", "10.0.0.2"), 6: ("fd00::1", "fd00::2")}
SOURCES = {4: "198.18.", 6: "100::"}
OUTER_BYTES = {4: 20 + 8 + 8 + 24, 6: 40 + 8 + 8 + 24}
PORT = 8080  # the backends'
CLASS, TYPE = 0xFF53, 0x81

combinations = pytest.mark.parametrize(
    ("inner", "outer"), [(4, 4), (6, 6), (4, 6), (6, 4)], ids=["4in4", "6in6", "4in6", "6in4"]
)
protocols = pytest.mark.parametrize("proto", [balancer.TCP, balancer.UDP], ids=["tcp", "udp"])
versions = pytest.mark.parametrize("version", [4, 6])


def serve(
    lb: Balancer,
    inner: int,
    outer: int,
    proto: int = balancer.TCP,
    port: int = PORT,
    count: int = 1,
) -> Service:
    backends = BACKENDS[outer][:count]
    return lb.add_service(VIP[inner], 80, proto, "dsr-geneve", backends, backend_port=port)


def opened(out: Out, inner: int, outer: int, reason: Any = Reason.SENT_TO_BACKEND) -> bytes:
    """The inner packet; all that is around it is checked."""
    assert out.said == (XDP_TX, {reason: 1})
    frame = out.packet
    assert (frame.dst, frame.src) == (BACKEND_MAC, OWN_MAC)
    envelope = network(frame)
    assert isinstance(envelope, IP if outer == 4 else IPv6)
    assert envelope.src.startswith(SOURCES[outer])
    assert envelope.dst in BACKENDS[outer]
    datagram, geneve = frame[UDP], frame[GENEVE]
    assert (datagram.dport, datagram.chksum) == (6081, 0)
    assert datagram.sport >= 49152
    assert (geneve.version, geneve.oam, geneve.critical, geneve.vni) == (0, 0, 1, 0)
    assert (geneve.reserved, geneve.reserved2, geneve.optionlen) == (0, 0, 6)
    assert geneve.proto == (0x0800 if inner == 4 else 0x86DD)
    (option,) = geneve.options
    assert (option.classid, option.type, option.length) == (CLASS, TYPE, 5)
    assert option.data == mapped(VIP[inner]).tobytes() + (80).to_bytes(2, "big") + bytes(2)
    return bytes(geneve.payload)


def destination(inner: int, outer: int, backend: int = 0) -> str:
    """Of the inner packet; a backend of the other family puts an address in the VIP's place."""
    return BACKENDS[outer][backend] if inner == outer else VIP[inner]


@combinations
@protocols
@pytest.mark.parametrize("size", [0, 1, 1000])
@pytest.mark.parametrize("port", [PORT, 0])
def test_the_inner_packet_is_for_the_backend_itself(
    inner: int, outer: int, proto: int, size: int, port: int, lb: Balancer
) -> None:
    serve(lb, inner, outer, proto, port)
    fields: dict[str, Any] = {"payload": b"x" * size, "tos": 0xB8, "ttl": 9}
    out = lb.run(either(proto, CLIENT[inner], VIP[inner], **fields))
    want = either(
        proto, CLIENT[inner], destination(inner, outer), dport=port or 80, **fields
    )  # fmt: skip
    assert opened(out, inner, outer) == bytes(want)[ETH:]


@combinations
@pytest.mark.parametrize("tos", [0, 0xB8, 0x02, 0xFF])
def test_the_outer_header_is_exact(inner: int, outer: int, tos: int, lb: Balancer) -> None:
    serve(lb, inner, outer)
    out = lb.run(tcp(CLIENT[inner], VIP[inner], tos=tos, ttl=7))
    source = network(out.packet).src
    rest = out.data[ETH + (20 if outer == 4 else 40) :]
    header: Packet
    if outer == 4:
        header = IP(src=source, dst=BACKENDS[4][0], tos=tos, id=0, flags="DF", ttl=64, proto=17)
    else:
        label = int(ip_address(source)) & 0xFFFFF
        header = IPv6(src=source, dst=BACKENDS[6][0], tc=tos, fl=label, nh=17, hlim=64)
    assert out.data == bytes(Ether(src=OWN_MAC, dst=BACKEND_MAC) / header / rest)


@combinations
def test_what_scapy_would_write_is_the_same(inner: int, outer: int, lb: Balancer) -> None:
    serve(lb, inner, outer)
    out = lb.run(tcp(CLIENT[inner], VIP[inner]))
    sport = out.packet[UDP].sport
    option = GeneveOptions(
        classid=CLASS,
        type=TYPE,
        length=5,
        data=mapped(VIP[inner]).tobytes() + bytes([0, 80, 0, 0]),
    )
    headers = UDP(sport=sport, dport=6081, chksum=0) / GENEVE(
        critical=1, options=[option], proto=0x0800 if inner == 4 else 0x86DD
    )
    content = tcp(CLIENT[inner], destination(inner, outer), dport=PORT)
    assert out.data.endswith(bytes(headers / Raw(bytes(content)[ETH:])))


@combinations
def test_source_ports_spread_flows_and_keep_each(inner: int, outer: int, lb: Balancer) -> None:
    serve(lb, inner, outer)
    ports = []
    for sport in range(1024, 1324):
        first = lb.run(tcp(CLIENT[inner], VIP[inner], sport=sport)).packet[UDP].sport
        later = lb.run(tcp(CLIENT[inner], VIP[inner], "PA", sport=sport)).packet[UDP].sport
        assert first == later
        ports.append(first)
    # 300 draws from 16,384: 297.3 different ones expected.
    assert len(set(ports)) >= 288


def test_a_datagram_without_a_checksum_keeps_none(lb: Balancer) -> None:
    serve(lb, 4, 4, balancer.UDP)
    bare = ether(ip(CLIENT[4], VIP[4]) / UDP(sport=40000, dport=80, chksum=0) / Raw(b"hello"))
    inner = IP(opened(lb.run(bare), 4, 4))
    assert (inner.dst, inner[UDP].dport, inner[UDP].chksum) == (BACKENDS[4][0], PORT, 0)


@combinations
@protocols
def test_checksums_are_right_for_every_sum(
    inner: int, outer: int, proto: int, lb: Balancer
) -> None:
    """RFC 1624's corners: `verify` computes each anew."""
    serve(lb, inner, outer, proto)
    for value in range(0, 65536, 2039):
        packet = either(proto, CLIENT[inner], VIP[inner], payload=value.to_bytes(2, "big"))
        opened(lb.run(packet), inner, outer)


@combinations
@pytest.mark.parametrize("state", ["settled", "moving", "lingering"])
def test_flows_are_kept_as_in_every_mode(inner: int, outer: int, state: str, lb: Balancer) -> None:
    service = serve(lb, inner, outer, count=2)
    service.set_slots(service.backends[0])
    old = tcp(CLIENT[inner], VIP[inner], "A", sport=1)
    assert network(lb.run(old).packet).dst == BACKENDS[outer][0]
    if state == "settled":
        service.set_slots(service.backends[1])
        assert network(lb.run(old).packet).dst == BACKENDS[outer][1]
        return
    service.move()
    assert network(lb.run(old).packet).dst == BACKENDS[outer][0]
    assert network(lb.run(tcp(CLIENT[inner], VIP[inner], sport=2)).packet).dst == BACKENDS[outer][1]
    if state == "lingering":
        service.linger()
        assert network(lb.run(old).packet).dst == BACKENDS[outer][0]
    assert len(lb.flows())


# Sizes ------------------------------------------------------------------------------------------


@combinations
@protocols
def test_fits_exactly_or_is_told(inner: int, outer: int, proto: int, lb: Balancer) -> None:
    service = serve(lb, inner, outer, proto)
    hop = lb.add_nexthop(OWN6 if outer == 6 else OWN4, mtu=1400)
    lb.map("backends").mapped()["nexthop"][service.backends[0]] = hop
    empty = len(either(proto, CLIENT[inner], VIP[inner])) - ETH
    room = 1400 - OUTER_BYTES[outer] - empty
    opened(lb.run(either(proto, CLIENT[inner], VIP[inner], payload=bytes(room))), inner, outer)
    out = lb.run(either(proto, CLIENT[inner], VIP[inner], payload=bytes(room + 1)))
    assert out.said == (XDP_TX, {Reason.SENT_TOO_BIG: 1})
    answer = network(out.packet)
    assert (answer.src, answer.dst) == (VIP[inner], CLIENT[inner])
    mtu = answer.payload.nexthopmtu if inner == 4 else answer.payload.mtu
    assert mtu == 1400 - OUTER_BYTES[outer]
    quoted = quote_of(out.packet, inner)
    assert tuple_of(quoted) == (CLIENT[inner], 40000, VIP[inner], 80)


def test_also_who_has_not_set_df_is_told(lb: Balancer) -> None:
    """What the stack would make of it, fragments of the outer packet, no backend opens."""
    serve(lb, 4, 4, balancer.UDP)
    out = lb.run(udp(CLIENT[4], VIP[4], payload=bytes(1460), flags=""))
    assert out.said == (XDP_TX, {Reason.SENT_TOO_BIG: 1})


def test_of_a_datagram_in_fragments_the_first_is_told_of(lb: Balancer) -> None:
    serve(lb, 4, 4, balancer.UDP)
    first = udp(CLIENT[4], VIP[4], payload=bytes(1200), flags="MF", id=7)
    opened(lb.run(first), 4, 4)
    rest = ether(ip(CLIENT[4], VIP[4], proto=17, flags="MF", frag=151, id=7) / Raw(bytes(1480)))
    assert lb.run(rest).said == (XDP_DROP, {Reason.DROP_TOO_BIG: 1})
    big = udp(CLIENT[4], VIP[4], payload=bytes(1472), flags="MF", id=8)
    assert lb.run(big).said == (XDP_TX, {Reason.SENT_TOO_BIG: 1})


def test_a_first_fragment_of_ipv6_is_quoted_with_its_ports(lb: Balancer) -> None:
    """Behind the fragment's own header, where Linux looks for them: else it takes no notice."""
    serve(lb, 6, 6, balancer.UDP)
    header = ip(CLIENT[6], VIP[6]) / IPv6ExtHdrFragment(nh=17, m=1, id=5)
    big = ether(header / UDP(sport=40000, dport=80, len=3000, chksum=1) / Raw(bytes(1440)))
    out = lb.run(big)
    assert out.said == (XDP_TX, {Reason.SENT_TOO_BIG: 1})
    quoted = quote_of(out.packet, 6)
    assert quoted.nh == 44
    assert (quoted[UDP].sport, quoted[UDP].dport) == (40000, 80)


def test_answers_have_a_budget(make_lb: Any) -> None:
    lb = make_lb(answers_per_s=1)
    serve(lb, 4, 4, balancer.UDP)
    packet = udp(CLIENT[4], VIP[4], payload=bytes(1460))
    assert lb.run(packet).reasons == {Reason.SENT_TOO_BIG: 1}
    assert lb.run(packet).said == (XDP_DROP, {Reason.DROP_TOO_BIG: 1})


# What is no plain packet ------------------------------------------------------------------------


@combinations
def test_fragments_follow_their_first(inner: int, outer: int, lb: Balancer) -> None:
    serve(lb, inner, outer, balancer.UDP)
    whole = UDP(sport=40000, dport=80) / Raw(b"y" * 1600)
    for start, more in ((0, True), (800, False)):
        if inner == 4:
            flags: Any = "MF" if more else ""
            header = ip(CLIENT[4], VIP[4], proto=17, flags=flags, frag=start // 8, id=5)
        else:
            header = ip(CLIENT[6], VIP[6]) / IPv6ExtHdrFragment(
                nh=17, offset=start // 8, m=int(more), id=5
            )
        body = bytes(network(ether(ip(CLIENT[inner], VIP[inner]) / whole)))
        payload = body[20 if inner == 4 else 40 :][start : start + 800 if more else None]
        out = lb.run(ether(header / Raw(payload)))
        content = network_of(opened_fragment(out, outer), inner)
        assert content.dst == destination(inner, outer)
        if more:
            assert bytes(content)[-800:][2:4] == PORT.to_bytes(2, "big")
            assert out.events == {Event.FRAGMENT_FIRST: 1}
        else:
            assert bytes(content).endswith(payload)


def opened_fragment(out: Out, outer: int) -> bytes:
    assert out.said == (XDP_TX, {Reason.SENT_TO_BACKEND: 1})
    return out.data[ETH + OUTER_BYTES[outer] :]


def network_of(raw: bytes, version: int) -> Packet:
    return IP(raw) if version == 4 else IPv6(raw)


@combinations
@protocols
@pytest.mark.parametrize("kind", ["too-big", "unreachable", "ttl"])
def test_an_error_reaches_the_backend_as_one_about_its_own_packet(
    inner: int, outer: int, proto: int, kind: str, lb: Balancer
) -> None:
    serve(lb, inner, outer, proto)
    packet = error(inner, VIP[inner], sent_by_vip(inner, proto), kind=kind)
    out = lb.run(packet)
    raw = opened(out, inner, outer, Reason.SENT_ERROR_TO_BACKEND)
    content = network_of(raw, inner)
    to = destination(inner, outer)
    assert (content.src, content.dst) == (ROUTER[inner], to)
    quoted = network_of(raw[(20 if inner == 4 else 40) + 8 :], inner)
    assert tuple_of(quoted) == (to, PORT, CLIENT[inner], 40000)


# What stops it ----------------------------------------------------------------------------------


@versions
def test_the_next_hop_decides_where_out(version: int, lb: Balancer) -> None:
    service = lb.add_service(VIP[version], mode="dsr-geneve")
    hop = lb.add_nexthop(OWN4 if version == 4 else OWN6, ifindex=ELSEWHERE)
    service.set_slots(lb.add_backend(service.id, BACKENDS[version][0], nexthop=hop))
    out = lb.run(tcp(CLIENT[version], VIP[version]))
    assert out.said == (XDP_REDIRECT, {Reason.SENT_TO_BACKEND: 1})
    unknown = lb.add_service(VIP[version], 81, mode="dsr-geneve")
    unknown.set_slots(lb.add_backend(unknown.id, BACKENDS[version][0], nexthop=0))
    out = lb.run(tcp(CLIENT[version], VIP[version], dport=81))
    assert out.said == (XDP_DROP, {Reason.DROP_NO_NEXTHOP: 1})


def test_a_driver_without_headroom(lb: Balancer) -> None:
    serve(lb, 4, 4)
    frame = bytes(tcp(CLIENT[4], VIP[4], "A", payload=bytes(128 - 54)))
    out = lb.run_without_headroom(frame)
    assert out.said == (XDP_DROP, {Reason.DROP_NO_HEADROOM: 1})


def test_a_backend_that_is_gone(lb: Balancer) -> None:
    service = serve(lb, 4, 4)
    lb.set_flags(service.backends[0], 0)
    assert lb.run(tcp(CLIENT[4], VIP[4])).said == (XDP_DROP, {Reason.DROP_BAD_TABLE: 1})


def test_packets_are_counted_for_service_and_backend(lb: Balancer) -> None:
    service = serve(lb, 4, 4)
    lb.run(tcp(CLIENT[4], VIP[4]))
    lb.run(error(4, VIP[4], sent_by_vip(4, balancer.TCP)))
    assert int(lb.counts("backend_stats")["packets"][service.backends[0]]) == 2
    assert int(np.sum(lb.counts("svc_stats")["packets"])) == 0
