# SPDX-License-Identifier: Apache-2.0
"""Fragments follow their first fragment, in both families and every mode."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from shunt.kern.libbpf import XDP_DROP, XDP_PASS, XDP_TX
from tests.packets import balancer
from tests.packets.balancer import Balancer, Event, Out, Reason
from tests.packets.frames import ETH, either, ether, ip, network, udp, verify
from tests.packets.test_echo import know_vip

CLIENT = {4: "192.0.2.1", 6: "2001:db8:c::1"}
VIP = {4: "203.0.113.1", 6: "2001:db8:a::1"}
BACKENDS = {4: ["10.0.0.1", "10.0.0.2"], 6: ["fd00::1", "fd00::2"]}
ROUTER = {4: "198.51.100.9", 6: "2001:db8:f::9"}
SIZE = 60_000

versions = pytest.mark.parametrize("version", [4, 6])
protos = pytest.mark.parametrize("proto", [balancer.TCP, balancer.UDP])
MODES = [("dsr-ipip", 4), ("dsr-ipip", 6), ("dsr-l2", 0), ("nat", 0)]
modes = pytest.mark.parametrize(("mode", "outer"), MODES)


def fragments_of(frame: Packet, ident: int = 77, size: int = 1400) -> list[Packet]:
    """The frame's packet as a sender cuts it; the sum is the whole's."""
    packet = network(frame)
    header = 20 if IP in frame else 40
    body, step = bytes(packet)[header:], size // 8 * 8
    parts = []
    for at in range(0, len(body), step):
        more = at + step < len(body)
        head: Packet
        if IP in frame:
            flags = "MF" if more else ""
            head = ip(
                packet.src,
                packet.dst,
                id=ident,
                flags=flags,
                frag=at // 8,
                proto=network(Ether(bytes(frame))).proto,
            )
        else:
            nh = network(Ether(bytes(frame))).nh
            head = ip(packet.src, packet.dst) / IPv6ExtHdrFragment(
                id=ident, nh=nh, offset=at // 8, m=more
            )
        parts.append(ether(head / Raw(body[at : at + step])))
    return parts


def reassemble(parts: Sequence[Packet]) -> Packet:
    """What the receiver makes of them, parsed; its checksums are verified."""
    first = parts[0]
    if isinstance(first, IP):
        body = b"".join(bytes(part)[20:] for part in sorted(parts, key=lambda p: int(p.frag)))
        whole = first.copy()
        whole.remove_payload()
        whole.flags = whole.frag = 0
        del whole.len, whole.chksum
        packet: Packet = whole / Raw(body)
    else:
        order = sorted(parts, key=lambda p: int(p[IPv6ExtHdrFragment].offset))
        body = b"".join(bytes(part)[48:] for part in order)
        packet = IPv6(src=first.src, dst=first.dst, nh=first[IPv6ExtHdrFragment].nh) / Raw(body)
    return network(verify(bytes(ether(packet))))


def big(version: int, proto: int, **fields: int) -> Packet:
    size = SIZE if proto == balancer.UDP else 4000
    return either(
        proto, CLIENT[version], VIP[version], payload=bytes(range(250)) * (size // 250), **fields
    )


def sent(
    lb: Balancer, parts: Sequence[Packet], reason: int = Reason.SENT_TO_BACKEND
) -> list[Packet]:
    out = []
    for part in parts:
        ran = lb.run(part)
        assert ran.said == (XDP_TX, {reason: 1})
        out.append(network(Ether(ran.data)))
    return out


@versions
@protos
@modes
@pytest.mark.parametrize("moving", [False, True])
def test_a_large_datagram_arrives_whole(
    version: int, proto: int, mode: str, outer: int, moving: bool, lb: Balancer
) -> None:
    service = lb.add_service(VIP[version], 80, proto, mode, BACKENDS[outer or version])
    if moving:
        service.move()
    frame = big(version, proto)
    parts = sent(lb, fragments_of(frame))
    assert len({part.dst for part in parts}) == 1
    if mode == "dsr-ipip":
        # Whoever balances by outer addresses must send all of them the same way.
        assert len({(part.src, getattr(part, "fl", 0)) for part in parts}) == 1
        parts = [part.payload for part in parts]
    whole = reassemble(parts)
    layer = whole.payload
    assert bytes(layer.payload) == bytes(network(frame).payload.payload)
    if mode == "nat":
        assert whole.dst in BACKENDS[version]
        assert layer.dport == 80
    else:
        assert (whole.src, whole.dst, layer.sport) == (CLIENT[version], VIP[version], 40000)


@versions
@modes
def test_of_services_that_hash_by_client(version: int, mode: str, outer: int, lb: Balancer) -> None:
    made = lb.add_service(VIP[version], 80, balancer.UDP, mode, BACKENDS[outer or version])
    made.ask(hash_client=True, affinity_ns=10**12)
    parts = sent(lb, fragments_of(big(version, balancer.UDP)))
    assert len({part.dst for part in parts}) == 1


@versions
@protos
def test_a_large_reply_is_translated_back(version: int, proto: int, lb: Balancer) -> None:
    lb.add_service(VIP[version], 80, proto, "nat", BACKENDS[version], backend_port=8080)
    there = network(lb.run(either(proto, CLIENT[version], VIP[version])).packet)
    reply = either(
        proto, there.dst, there.src, sport=8080, dport=there.payload.sport, payload=bytes(SIZE // 2)
    )
    whole = reassemble(sent(lb, fragments_of(reply), Reason.SENT_TO_CLIENT))
    assert (whole.src, whole.dst) == (VIP[version], CLIENT[version])
    assert (whole.payload.sport, whole.payload.dport) == (80, 40000)


@versions
@modes
def test_what_comes_before_its_first_is_the_stacks(
    version: int, mode: str, outer: int, lb: Balancer
) -> None:
    lb.add_service(VIP[version], 80, balancer.UDP, mode, BACKENDS[outer or version])
    first, second, *_ = fragments_of(big(version, balancer.UDP))
    out = lb.run(second)
    assert out.said == (XDP_PASS, {Reason.PASS_FRAGMENT: 1})
    assert out.data == bytes(second)
    assert lb.run(first).events.get(Event.FRAGMENT_FIRST) == 1
    assert lb.run(second).said == (XDP_TX, {Reason.SENT_TO_BACKEND: 1})


def early(lb: Balancer, version: int = 4, at_tc: bool = False) -> Out:
    """A later fragment for a VIP, of a datagram whose first is not known."""
    lb.add_service(VIP[version], 80, balancer.UDP, "dsr-l2", BACKENDS[version])
    know_vip(lb, VIP[version], at_tc=at_tc)
    return lb.run(fragments_of(udp(CLIENT[version], VIP[version], payload=bytes(3000)))[1])


@versions
def test_only_those_for_vips_are_counted_as_early(version: int, lb: Balancer) -> None:
    """Others are the host's own, which `pass-fragment` has too; and what is known is followed."""
    assert early(lb, version).events == {Event.FRAGMENT_EARLY: 1}
    to_vip = udp(CLIENT[version], VIP[version], payload=bytes(3000))
    to_host = udp(CLIENT[version], ROUTER[version], payload=bytes(3000))
    for frame, events in ((to_host, [{}] * 3), (to_vip, [{Event.FRAGMENT_FIRST: 1}, {}, {}])):
        assert [lb.run(part).events for part in fragments_of(frame)] == events
    lb.advance(31)
    assert lb.run(fragments_of(to_vip)[1]).events == {Event.FRAGMENT_LATE: 1}


@versions
def test_what_tc_may_follow_is_not_early_here(version: int, lb: Balancer) -> None:
    out = early(lb, version, at_tc=True)
    assert (out.said, out.events) == ((XDP_PASS, {Reason.PASS_FRAGMENT: 1}), {})


@versions
def test_datagrams_are_told_apart(version: int, lb: Balancer) -> None:
    """By identifier and addresses: each follows its own first fragment."""
    lb.add_service(VIP[version], 80, balancer.UDP, "dsr-ipip", BACKENDS[4])
    wanted = {}
    for ident in range(40):
        frame = udp(CLIENT[version], VIP[version], sport=5000 + ident, payload=bytes(3000))
        first, second, *_ = fragments_of(frame, ident)
        wanted[ident] = (network(Ether(lb.run(first).data)).dst, second)
    assert {to for to, _ in wanted.values()} == set(BACKENDS[4])
    for to, second in wanted.values():
        assert network(Ether(lb.run(second).data)).dst == to


@versions
def test_a_first_one_is_forgotten_in_time(version: int, lb: Balancer) -> None:
    lb.add_service(VIP[version], 80, balancer.UDP, "dsr-l2", BACKENDS[version])
    first, second, *_ = fragments_of(big(version, balancer.UDP))
    lb.run(first)
    lb.advance(30)
    assert lb.run(second).reasons == {Reason.SENT_TO_BACKEND: 1}
    lb.advance(0.1)
    assert lb.run(second).reasons == {Reason.PASS_FRAGMENT: 1}


@versions
def test_one_that_was_not_sent_on_is_not_followed(version: int, lb: Balancer) -> None:
    lb.add_service(VIP[version], 80, balancer.UDP, "dsr-l2")
    first, second, *_ = fragments_of(big(version, balancer.UDP))
    assert lb.run(first).reasons == {Reason.SENT_UNREACHABLE: 1}
    assert lb.run(second).said == (XDP_PASS, {Reason.PASS_FRAGMENT: 1})
    assert not lb.entries("fragments")


@versions
def test_the_rest_stays_with_the_backend_of_the_first(version: int, lb: Balancer) -> None:
    """Also if the slot's owner changes in between."""
    service = lb.add_service(VIP[version], 80, balancer.UDP, "dsr-ipip", BACKENDS[4])
    service.set_slots(service.backends[0])
    first, second, *_ = fragments_of(big(version, balancer.UDP))
    lb.run(first)
    service.set_slots(service.backends[1])
    assert network(Ether(lb.run(second).data)).dst == BACKENDS[4][0]
    lb.set_flags(service.backends[0], 0)
    assert lb.run(second).said == (XDP_DROP, {Reason.DROP_BAD_TABLE: 1})


@versions
@modes
def test_too_big_fragments(version: int, mode: str, outer: int, lb: Balancer) -> None:
    """IPv6: the sender is told. IPv4: the stack may cut a wrapped one again; none is cut else."""
    service = lb.add_service(VIP[version], 80, balancer.UDP, mode)
    hop = lb.add_nexthop("10.0.0.9" if version == 4 else "fd00::9", mtu=1300)
    service.set_slots(lb.add_backend(service.id, BACKENDS[outer or version][0], nexthop=hop))
    first, second, *_ = fragments_of(big(version, balancer.UDP))
    if version == 6:
        assert lb.run(first).said == (XDP_TX, {Reason.SENT_TOO_BIG: 1})
    elif (mode, outer) == ("dsr-ipip", 4):
        for part in (first, second):
            out = lb.run(part)
            assert out.said == (XDP_PASS, {Reason.PASS_TO_FRAGMENT: 1})
            wrapped = network(Ether(out.data))
            assert (wrapped.dst, int(wrapped.flags), wrapped.frag) == (BACKENDS[4][0], 0, 0)
            assert IP(out.data[ETH:]).chksum == IP(bytes(wrapped)).chksum
            assert out.data.endswith(bytes(part)[ETH:])
            assert out.data[:12] == bytes(part)[:12]
    else:
        assert lb.run(first).said == (XDP_DROP, {Reason.DROP_TOO_BIG: 1})


def test_a_header_that_is_not_all_there_is_the_stacks(lb: Balancer) -> None:
    lb.add_service(VIP[4], 80, balancer.TCP, "dsr-l2", BACKENDS[4])
    tiny = ether(ip(CLIENT[4], VIP[4], proto=6, flags="MF") / Raw(bytes(8)))
    assert lb.run(tiny).said == (XDP_PASS, {Reason.PASS_MALFORMED: 1})


def test_an_atomic_fragment_is_a_whole_packet(lb: Balancer) -> None:
    lb.add_service(VIP[6], 80, balancer.UDP, "dsr-l2", BACKENDS[6])
    whole = network(udp(CLIENT[6], VIP[6]))
    packet = IPv6(src=CLIENT[6], dst=VIP[6]) / IPv6ExtHdrFragment(nh=17, id=9) / whole.payload
    out = lb.run(ether(packet))
    assert out.said == (XDP_TX, {Reason.SENT_TO_BACKEND: 1})
    assert not lb.entries("fragments")
