# SPDX-License-Identifier: Apache-2.0
"""Frames with VLAN tags: taken off, put back, or exchanged for those of the next hop."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from scapy.layers.inet import TCP
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from shunt.kern.libbpf import XDP_PASS, XDP_REDIRECT, XDP_TX
from tests.packets import balancer
from tests.packets.balancer import BACKEND_MAC, Balancer, Out, Reason
from tests.packets.frames import OWN_MAC, ROUTER_MAC, either, network, tcp, udp, verify
from tests.packets.test_echo import ping, pinged
from tests.packets.test_fragments import fragments_of
from tests.packets.test_icmp import error

CLIENT = {4: "192.0.2.1", 6: "2001:db8:c::1"}
VIP = {4: "203.0.113.1", 6: "2001:db8:a::1"}
BACKENDS = {4: "10.0.0.1", 6: "fd00::1"}
Tags = Sequence[tuple[bool, int, int]]  # whether it is 802.1ad, priority, number

ONE: Tags = [(False, 5, 100)]
TWO: Tags = [(True, 3, 7), (False, 3, 100)]
tags_of_both = pytest.mark.parametrize(
    "tags", [ONE, TWO, [(True, 0, 4094)]], ids=["one", "two", "ad"]
)
versions = pytest.mark.parametrize("version", [4, 6])


def tagged(frame: Packet, tags: Tags) -> Packet:
    out: Packet = Ether(src=frame.src, dst=frame.dst)
    for provider, priority, number in tags:
        out /= (Dot1AD if provider else Dot1Q)(prio=priority, vlan=number)
    return out / network(frame)


def word(tags: Tags) -> int:
    """As tables hold them: bpf/vlan.h."""
    value = 0
    for provider, _, number in tags:
        value = value << 16 | provider << 12 | number
    return value


def tags_of(raw: bytes) -> tuple[list[tuple[bool, int, int]], bytes]:
    """The tags of a frame, and the frame without them."""
    found, head, rest = [], raw[:12], raw[12:]
    while rest[:2] in {b"\x81\x00", b"\x88\xa8"}:
        tci = int.from_bytes(rest[2:4], "big")
        found.append((rest[:2] == b"\x88\xa8", tci >> 13, tci & 0xFFF))
        rest = rest[4:]
    return found, head + rest


def untag(raw: bytes) -> tuple[list[tuple[bool, int, int]], Packet]:
    """The same of a whole packet, which is verified."""
    found, frame = tags_of(raw)
    return found, verify(frame)


def serve(
    lb: Balancer, version: int, mode: str, tags: Tags, *, ifindex: int = balancer.LOOPBACK
) -> None:
    service = lb.add_service(VIP[version], 80, mode=mode)
    hop = lb.add_nexthop("10.0.0.254" if version == 4 else "fd00::fe", ifindex=ifindex)
    lb.map("nexthops").mapped()[hop]["tags"] = word(tags)
    service.set_slots(lb.add_backend(service.id, BACKENDS[version], nexthop=hop))


@versions
@tags_of_both
@pytest.mark.parametrize("mode", ["dsr-ipip", "dsr-l2", "dsr-geneve", "nat"])
def test_sent_on_in_the_vlan_of_the_next_hop(
    version: int, tags: Tags, mode: str, lb: Balancer
) -> None:
    serve(lb, version, mode, tags)
    plain = lb.run(tcp(CLIENT[version], VIP[version]))
    out = lb.run(tagged(tcp(CLIENT[version], VIP[version]), tags))
    assert out.said == (XDP_TX, {Reason.SENT_TO_BACKEND: 1})
    found, frame = untag(out.data)
    assert found == list(tags)  # with the priorities it came with
    assert (frame.dst, frame.src) == (BACKEND_MAC, OWN_MAC)
    numbers, without = untag(plain.data)
    assert [(p, n) for p, _, n in numbers] == [(p, n) for p, _, n in tags]
    assert network(without).dst == network(frame).dst


@versions
def test_from_a_vlan_to_none_and_to_another(version: int, lb: Balancer) -> None:
    serve(lb, version, "dsr-l2", [])
    packet = tcp(CLIENT[version], VIP[version])
    found, frame = untag(lb.run(tagged(packet, ONE)).data)
    assert (found, bytes(frame)) == ([], bytes(untag(lb.run(packet).data)[1]))
    lb.map("nexthops").mapped()[1]["tags"] = word([(False, 0, 9)])
    assert untag(lb.run(tagged(packet, TWO)).data)[0] == [(False, 3, 9)]


@versions
def test_out_of_another_interface(version: int, lb: Balancer) -> None:
    serve(lb, version, "dsr-ipip", ONE, ifindex=balancer.ELSEWHERE)
    out = lb.run(tcp(CLIENT[version], VIP[version]))
    assert out.said == (XDP_REDIRECT, {Reason.SENT_TO_BACKEND: 1})
    assert untag(out.data)[0] == [(False, 0, 100)]


@versions
@tags_of_both
def test_translated_replies_go_back_in_the_clients_vlan(
    version: int, tags: Tags, lb: Balancer
) -> None:
    serve(lb, version, "nat", [])
    sent = network(untag(lb.run(tagged(tcp(CLIENT[version], VIP[version]), tags)).data)[1])
    out = lb.run(tcp(sent.dst, sent.src, "SA", sport=80, dport=sent[TCP].sport))
    assert out.said == (XDP_TX, {Reason.SENT_TO_CLIENT: 1})
    found, frame = untag(out.data)
    assert [(p, n) for p, _, n in found] == [(p, n) for p, _, n in tags]
    assert frame.dst == ROUTER_MAC
    (_, reverse), *_ = lb.entries("nat_rev")
    assert reverse["back"]["tags"] == word(tags)  # no priority: it would change with packets


@versions
@tags_of_both
def test_answers_have_the_tags_of_the_question(version: int, tags: Tags, lb: Balancer) -> None:
    lb.add_service(VIP[version], 80)
    lb.add_service(VIP[version], 80, balancer.UDP)

    def answered(out: Out, reason: int) -> None:
        assert out.said == (XDP_TX, {reason: 1})
        found, frame = untag(out.data)
        assert found == list(tags)
        assert (frame.dst, network(frame).src) == (ROUTER_MAC, VIP[version])

    ends = CLIENT[version], VIP[version]
    answered(lb.run(tagged(tcp(*ends), tags)), Reason.SENT_RST_NO_BACKEND)
    answered(lb.run(tagged(udp(*ends), tags)), Reason.SENT_UNREACHABLE)
    answered(pinged(lb, tagged(ping(version, *ends), tags)), Reason.SENT_ECHO_REPLY)
    serve(lb, version, "dsr-ipip", tags)
    large = tcp(*ends, payload=bytes(1460))
    answered(lb.run(tagged(large, tags)), Reason.SENT_TOO_BIG)


@versions
def test_errors_too(version: int, lb: Balancer) -> None:
    serve(lb, version, "dsr-l2", ONE)
    quote = network(tcp(VIP[version], CLIENT[version], "SA", sport=80, dport=40000))
    out = lb.run(tagged(error(version, VIP[version], quote), ONE))
    assert out.said == (XDP_TX, {Reason.SENT_ERROR_TO_BACKEND: 1})
    assert untag(out.data)[0] == list(ONE)


@versions
@pytest.mark.parametrize("hop", [ONE, TWO, []], ids=["the same", "two", "none"])
@pytest.mark.parametrize("mode", ["dsr-ipip", "dsr-l2", "dsr-geneve", "nat"])
def test_fragments_too(version: int, mode: str, hop: Tags, lb: Balancer) -> None:
    """The first one, and what follows it by the numbers that stand behind the tags."""
    serve(lb, version, mode, hop)
    whole = tcp(CLIENT[version], VIP[version], payload=bytes(3000))
    parts = fragments_of(whole, size=1200)
    early = lb.run(tagged(parts[1], ONE))
    assert early.said == (XDP_PASS, {Reason.PASS_FRAGMENT: 1})
    assert early.data == bytes(tagged(parts[1], ONE))
    outs = [lb.run(tagged(part, ONE)) for part in parts]
    plain = [lb.run(part) for part in parts]
    for out, other in zip(outs, plain, strict=True):
        assert out.said == other.said == (XDP_TX, {Reason.SENT_TO_BACKEND: 1})
        tags, frame = tags_of(out.data)
        assert tags == [(provider, 5, number) for provider, _, number in hop]
        assert frame == tags_of(other.data)[1]


@versions
@tags_of_both
def test_what_is_the_stacks_reaches_it_as_it_came(version: int, tags: Tags, lb: Balancer) -> None:
    serve(lb, version, "dsr-l2", tags)
    for packet, reason in (
        (either(balancer.UDP, CLIENT[version], VIP[version]), Reason.PASS_NOT_OURS),
        (ping(version, CLIENT[version], VIP[version]), Reason.PASS_NOT_OURS),
        (Ether(src=ROUTER_MAC, dst=OWN_MAC) / ARP(), Reason.PASS_NOT_IP),
        (Ether(src=ROUTER_MAC, dst=OWN_MAC) / Dot1Q(vlan=1) / ARP(), Reason.PASS_NOT_IP),
    ):
        frame = bytearray(bytes(tagged(packet, tags)))
        frame[14] |= 0x10  # drop eligible, which no table holds
        out = lb.run(bytes(frame))
        assert out.said == (XDP_PASS, {reason: 1})
        assert out.data == bytes(frame)


@versions
@tags_of_both
def test_cut_anywhere_it_harms_nobody(version: int, tags: Tags, lb: Balancer) -> None:
    serve(lb, version, "dsr-l2", tags)
    whole = bytes(tagged(tcp(CLIENT[version], VIP[version]), tags))
    for size in range(14, len(whole)):
        out = lb.run(whole[:size])
        assert out.verdict == XDP_PASS
        assert out.data == whole[:size]


def test_the_wrapped_for_the_stack_keep_theirs(lb: Balancer) -> None:
    service = lb.add_service(VIP[4], 80, balancer.UDP)
    service.set_slots(lb.add_backend(service.id, BACKENDS[4]))
    packet = udp(CLIENT[4], VIP[4], flags="", payload=bytes(1460))
    out = lb.run(tagged(packet, ONE))
    assert out.said == (XDP_PASS, {Reason.PASS_TO_FRAGMENT: 1})
    found, frame = untag(out.data)
    assert found == list(ONE)
    assert network(frame).dst == BACKENDS[4]
    assert Raw not in frame or bytes(frame).endswith(bytes(packet)[14:])
