# SPDX-License-Identifier: Apache-2.0
"""Modes dsr-ipip and dsr-l2: the backend gets the client's packet, in an envelope or as it is."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_address, ip_network

import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from shunt.kern.libbpf import XDP_DROP, XDP_REDIRECT, XDP_TX
from tests.packets.balancer import BACKEND_MAC, ELSEWHERE, TCP, UDP, Balancer, Out, Reason
from tests.packets.frames import ETH, OWN_MAC, either, network, tcp

ENDS = {4: ("192.0.2.1", "203.0.113.1"), 6: ("2001:db8:c::1", "2001:db8:a::1")}
BACKENDS = {4: ("10.0.0.1", "10.0.0.2"), 6: ("fd00::1", "fd00::2")}
PREFIXES = {4: ip_network("198.18.0.0/16"), 6: ip_network("100::/64")}
OUTER_BYTES = {4: 20, 6: 40}

combinations = pytest.mark.parametrize(
    ("inner", "outer"), [(4, 4), (6, 6), (4, 6), (6, 4)], ids=["4in4", "6in6", "4in6", "6in4"]
)
protocols = pytest.mark.parametrize("proto", [TCP, UDP], ids=["tcp", "udp"])
versions = pytest.mark.parametrize("version", [4, 6])


def sent(out: Out) -> Packet:
    assert out.said == (XDP_TX, {Reason.SENT_TO_BACKEND: 1})
    assert out.events == {}
    return out.packet


def flow_hash(packet: Packet) -> int:
    """All 32 bits of it show in an IPv6 outer source."""
    assert int(ip_address(packet.payload.src)) >> 32 == int(PREFIXES[6].network_address) >> 32
    return int(ip_address(packet.payload.src)) & 0xFFFFFFFF


@protocols
@combinations
@pytest.mark.parametrize("tos", [0, 0xB8, 0x02, 0xFF])
def test_outer_header_is_exact_and_inner_untouched(
    inner: int, outer: int, proto: int, tos: int, lb: Balancer
) -> None:
    backend = BACKENDS[outer][0]
    lb.add_service(ENDS[inner][1], proto=proto, backends=[backend])
    packet = either(proto, *ENDS[inner], payload=b"hello", tos=tos, ttl=7)
    out = lb.run(packet)
    source = network(sent(out)).src
    assert ip_address(source) in PREFIXES[outer]
    number = 4 if inner == 4 else 41
    envelope: Packet
    if outer == 4:
        envelope = IP(
            src=source, dst=backend, tos=tos, id=0, flags="DF", frag=0, ttl=64, proto=number
        )
    else:
        label = int(ip_address(source)) & 0xFFFFF
        envelope = IPv6(src=source, dst=backend, tc=tos, fl=label, nh=number, hlim=64)
    frame = Ether(src=OWN_MAC, dst=BACKEND_MAC) / envelope / bytes(packet)[ETH:]
    assert out.data == bytes(frame)


@combinations
def test_outer_source_spreads_flows_and_keeps_each(inner: int, outer: int, lb: Balancer) -> None:
    lb.add_service(ENDS[inner][1], backends=[BACKENDS[outer][0]])
    sources = []
    for port in range(1024, 1324):
        first = network(sent(lb.run(tcp(*ENDS[inner], sport=port)))).src
        later = network(sent(lb.run(tcp(*ENDS[inner], "PA", sport=port, payload=b"x")))).src
        assert first == later
        assert ip_address(first) in PREFIXES[outer]
        sources.append(first)
    # 300 draws from 65,536: 299.3 different ones expected.
    assert len(set(sources)) >= 295


@pytest.mark.parametrize(("prefix", "spread"), [("198.18.7.0", 0xFF), ("198.18.7.9", 0)])
def test_narrower_source_prefix(prefix: str, spread: int, make_lb: Callable[..., Balancer]) -> None:
    lb = make_lb(ipip_saddr4=prefix, ipip_spread4=spread)
    lb.add_service(ENDS[4][1], backends=[BACKENDS[4][0]])
    seen = {network(sent(lb.run(tcp(*ENDS[4], sport=p)))).src for p in range(2000, 2100)}
    base = int(ip_address(prefix))
    assert all(int(ip_address(s)) & ~spread == base for s in seen)
    assert len(seen) > 50 * (spread > 0)


def test_whole_hash_shows_and_its_top_bits_are_the_slot(lb: Balancer) -> None:
    """Slots are children of coarser slots: a table that grows keeps flows where they are."""
    service = lb.add_service(
        ENDS[4][1], backends=[f"fd00::{i:x}" for i in range(1, 257)], slots=256
    )
    for port in range(1024, 1324):
        packet = sent(lb.run(tcp(*ENDS[4], sport=port)))
        slot = int(ip_address(packet.payload.dst)) - int(ip_address("fd00::1"))
        assert slot == flow_hash(packet) >> 24
    assert service.slots == 256


@protocols
@combinations
def test_fits_exactly_or_not(inner: int, outer: int, proto: int, lb: Balancer) -> None:
    service = lb.add_service(ENDS[inner][1], proto=proto)
    hop = lb.add_nexthop(mtu=1400)
    service.set_slots(lb.add_backend(service.id, BACKENDS[outer][0], nexthop=hop))
    empty = len(either(proto, *ENDS[inner])) - ETH
    room = 1400 - OUTER_BYTES[outer] - empty
    sent(lb.run(either(proto, *ENDS[inner], payload=bytes(room))))
    out = lb.run(either(proto, *ENDS[inner], payload=bytes(room + 1)))
    assert out.said == (XDP_TX, {Reason.SENT_TOO_BIG: 1})


@versions
@pytest.mark.parametrize("mode", ["dsr-ipip", "dsr-l2", "dsr-geneve", "nat"])
def test_next_hop_on_another_interface(version: int, mode: str, lb: Balancer) -> None:
    service = lb.add_service(ENDS[version][1], mode=mode)
    hop = lb.add_nexthop("10.0.0.9" if version == 4 else "fd00::9", ifindex=ELSEWHERE)
    service.set_slots(lb.add_backend(service.id, BACKENDS[version][0], nexthop=hop))
    out = lb.run(tcp(*ENDS[version]))
    assert out.said == (XDP_REDIRECT, {Reason.SENT_TO_BACKEND: 1})
    assert (out.packet.dst, out.packet.src) == (BACKEND_MAC, OWN_MAC)


@protocols
@versions
@pytest.mark.parametrize("ttl", [255, 64, 2])
def test_l2_changes_macs_and_ttl_only(version: int, proto: int, ttl: int, lb: Balancer) -> None:
    lb.add_service(ENDS[version][1], proto=proto, mode="dsr-l2", backends=[BACKENDS[version][0]])
    packet = either(proto, *ENDS[version], payload=b"hello", ttl=ttl, tos=0x2E)
    out = lb.run(packet)
    sent(out)
    want = either(proto, *ENDS[version], payload=b"hello", ttl=ttl - 1, tos=0x2E)
    want.src, want.dst = OWN_MAC, BACKEND_MAC
    assert out.data == bytes(want)


def test_l2_updates_the_header_checksum_for_every_value(lb: Balancer) -> None:
    """RFC 1624's corner: sums whose fold would be all ones or all zeros."""
    lb.add_service(ENDS[4][1], mode="dsr-l2", backends=[BACKENDS[4][0]])
    frame = bytearray(bytes(tcp(*ENDS[4])))
    for ident in range(0, 65536, 97):
        frame[ETH + 4 : ETH + 6] = ident.to_bytes(2, "big")
        header = IP(bytes(frame[ETH:]))
        del header.chksum
        frame[ETH:] = bytes(header)
        sent(lb.run(bytes(frame)))


@versions
@pytest.mark.parametrize("ttl", [0, 1])
@pytest.mark.parametrize("mode", ["dsr-l2", "nat"])
def test_ttl_expires(version: int, mode: str, ttl: int, lb: Balancer) -> None:
    lb.add_service(ENDS[version][1], mode=mode, backends=[BACKENDS[version][0]])
    out = lb.run(tcp(*ENDS[version], ttl=ttl))
    assert out.said == (XDP_DROP, {Reason.DROP_TTL_EXPIRED: 1})


@versions
def test_l2_fits_exactly_or_not(version: int, lb: Balancer) -> None:
    lb.add_service(ENDS[version][1], mode="dsr-l2", backends=[BACKENDS[version][0]])
    room = 1500 - (len(tcp(*ENDS[version])) - ETH)
    sent(lb.run(tcp(*ENDS[version], "A", payload=bytes(room))))
    out = lb.run(tcp(*ENDS[version], "A", payload=bytes(room + 1)))
    assert out.reasons == {Reason.SENT_TOO_BIG: 1}


@protocols
@versions
def test_a_failing_owner_of_a_settled_slot_still_gets_its_packets(
    version: int, proto: int, lb: Balancer
) -> None:
    """Whose slot it is, the agent decides; on a settled one nothing is asked."""
    service = lb.add_service(ENDS[version][1], proto=proto, backends=BACKENDS[version])
    service.set_slots(service.backends[1])
    lb.set_flags(service.backends[1], 1)
    assert lb.backend_of(either(proto, *ENDS[version])) == BACKENDS[version][1]
    assert not len(lb.flows())


@pytest.mark.parametrize(
    "break_it", ["mode", "region", "backend", "no backend"], ids=lambda name: name
)
def test_tables_that_contradict_each_other_drop(break_it: str, lb: Balancer) -> None:
    service = lb.add_service(ENDS[4][1], backends=[BACKENDS[4][0]])
    if break_it == "mode":
        service.change(mode=0)
    elif break_it == "region":
        service.change(region=(1 << 20) << 8 | 4)
    elif break_it == "backend":
        service.set_slots(len(lb.map("backends").mapped()) + 1)
    else:
        lb.set_flags(service.backends[0], 0)
    assert lb.run(tcp(*ENDS[4])).said == (XDP_DROP, {Reason.DROP_BAD_TABLE: 1})
