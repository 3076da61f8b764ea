# SPDX-License-Identifier: Apache-2.0
"""Mode nat: what leaves towards the backend, and what the client gets back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from scapy.layers import inet
from scapy.packet import Packet

from shunt.kern.libbpf import XDP_DROP, XDP_PASS, XDP_TX
from tests.packets.balancer import (
    BACKEND_MAC,
    ELSEWHERE,
    OWN4,
    OWN6,
    TCP,
    UDP,
    Balancer,
    Event,
    Out,
    Reason,
)
from tests.packets.frames import (
    OWN_MAC,
    ROUTER_MAC,
    either,
    ether,
    ip,
    network,
    tcp,
    transport,
    udp,
)

ENDS = {4: ("192.0.2.1", "203.0.113.1"), 6: ("2001:db8:c::1", "2001:db8:a::1")}
BACKENDS = {4: ("10.0.0.1", "10.0.0.2"), 6: ("fd00::1", "fd00::2")}
OWN = {4: OWN4, 6: OWN6}

versions = pytest.mark.parametrize("version", [4, 6])
protocols = pytest.mark.parametrize("proto", [TCP, UDP], ids=["tcp", "udp"])


def forwarded(out: Out) -> Packet:
    assert out.said == (XDP_TX, {Reason.SENT_TO_BACKEND: 1})
    return out.packet


def returned(out: Out) -> Packet:
    assert out.said == (XDP_TX, {Reason.SENT_TO_CLIENT: 1})
    return out.packet


def answer_to(sent: Packet, **fields: Any) -> Packet:
    """What the backend answers to a translated packet."""
    proto = TCP if "TCP" in sent else UDP
    ends = {"sport": transport(sent).dport, "dport": transport(sent).sport}
    if proto == TCP:
        fields.setdefault("flags", "SA")
    packet = either(proto, network(sent).dst, network(sent).src, **ends, **fields)
    packet.src = BACKEND_MAC
    return packet


@protocols
@versions
@pytest.mark.parametrize("port", [0, 8080])
@pytest.mark.parametrize("payload", [b"", b"x", b"hello, backend"])
def test_round_trip(version: int, proto: int, port: int, payload: bytes, lb: Balancer) -> None:
    """Both frames are exact: only addresses, ports, TTL and checksums differ, and the MACs."""
    backend = BACKENDS[version][0]
    lb.add_service(ENDS[version][1], proto=proto, mode="nat", backends=[backend], backend_port=port)
    out = lb.run(either(proto, *ENDS[version], sport=5555, payload=payload, ttl=33, tos=0x2E))
    sent = forwarded(out)
    assert out.events == {Event.NAT_CREATED: 1}
    assert transport(sent).sport in lb.nat_ports
    ends: dict[str, Any] = {"sport": transport(sent).sport, "dport": port or 80}
    want = either(proto, OWN[version], backend, **ends, payload=payload, ttl=32, tos=0x2E)
    want.src, want.dst = OWN_MAC, BACKEND_MAC
    assert out.data == bytes(want)

    back = lb.run(answer_to(sent, payload=payload[::-1], ttl=60, tos=0x03))
    returned(back)
    ends = {"sport": 80, "dport": 5555, "payload": payload[::-1], "ttl": 59, "tos": 0x03}
    if proto == TCP:
        ends["flags"] = "SA"
    want = either(proto, *ENDS[version][::-1], **ends)
    want.src, want.dst = OWN_MAC, ROUTER_MAC
    assert back.data == bytes(want)


@protocols
@versions
def test_a_flow_keeps_its_port_whatever_becomes_of_its_slot(
    version: int, proto: int, lb: Balancer
) -> None:
    service = lb.add_service(ENDS[version][1], proto=proto, mode="nat", backends=BACKENDS[version])
    service.set_slots(service.backends[0])
    first = forwarded(lb.run(either(proto, *ENDS[version])))
    service.set_slots(service.backends[1])
    out = lb.run(either(proto, *ENDS[version], payload=b"later"))
    assert out.events == {}
    later = forwarded(out)
    assert network(later).dst == network(first).dst == BACKENDS[version][0]
    assert transport(later).sport == transport(first).sport
    assert (
        network(forwarded(lb.run(either(proto, *ENDS[version], sport=1)))).dst
        == (BACKENDS[version][1])
    )


def without_checksum(packet: Packet) -> Packet:
    packet[inet.UDP].chksum = 0
    return packet


@versions
def test_a_datagram_without_a_checksum_keeps_none(version: int, lb: Balancer) -> None:
    """RFC 768; with IPv6 only tunnels may (RFC 6935), and a half-filled one would kill theirs."""
    lb.add_service(ENDS[version][1], proto=UDP, mode="nat", backends=[BACKENDS[version][0]])
    sent = forwarded(lb.run(udp(*ENDS[version], payload=b"x")))
    out = lb.run(without_checksum(udp(*ENDS[version], payload=b"x")))
    assert out.reasons == {Reason.SENT_TO_BACKEND: 1}
    header = out.data[-9:]
    assert header[6:8] == b"\0\0"
    out = lb.run(without_checksum(answer_to(sent, payload=b"x")))
    assert out.reasons == {Reason.SENT_TO_CLIENT: 1}
    assert out.data[-9:][6:8] == b"\0\0"


@protocols
@versions
def test_a_checksum_that_comes_out_as_zero(version: int, proto: int, lb: Balancer) -> None:
    """UDP writes 0xffff then, since zero means none (RFC 768); TCP writes zero."""
    lb.add_service(ENDS[version][1], proto=proto, mode="nat", backends=[BACKENDS[version][0]])
    want = 0 if proto == TCP else 0xFFFF

    sent = forwarded(lb.run(either(proto, *ENDS[version], payload=b"\0\0")))
    # The word that brings the sum to all ones is the checksum with that word zero.
    word = transport(sent).chksum.to_bytes(2, "big")
    assert transport(forwarded(lb.run(either(proto, *ENDS[version], payload=word)))).chksum == want

    back = returned(lb.run(answer_to(sent, payload=b"\0\0")))
    word = transport(back).chksum.to_bytes(2, "big")
    assert transport(returned(lb.run(answer_to(sent, payload=word)))).chksum == want


@versions
@protocols
def test_checksums_hold_for_any_payload(version: int, proto: int, lb: Balancer) -> None:
    lb.add_service(ENDS[version][1], proto=proto, mode="nat", backends=[BACKENDS[version][0]])
    for word in range(0, 65536, 331):
        payload = word.to_bytes(2, "big") * 3
        sent = forwarded(lb.run(either(proto, *ENDS[version], payload=payload)))
        returned(lb.run(answer_to(sent, payload=payload)))


@versions
def test_replies_go_back_the_way_the_client_comes(version: int, lb: Balancer) -> None:
    lb.add_service(ENDS[version][1], mode="nat", backends=[BACKENDS[version][0]])
    sent = forwarded(lb.run(tcp(*ENDS[version])))
    assert returned(lb.run(answer_to(sent))).dst == ROUTER_MAC
    assert lb.entries("nat_rev")[0][1]["back"]["ifindex"] == 1

    other_router = "02:00:00:00:00:09"
    moved = tcp(*ENDS[version], "A")
    moved.src = other_router
    forwarded(lb.run(moved))
    back = returned(lb.run(answer_to(sent)))
    assert (back.dst, back.src) == (other_router, OWN_MAC)
    assert lb.run(tcp(*ENDS[version], "A")).events == {}
    assert returned(lb.run(answer_to(sent))).dst == ROUTER_MAC


@versions
def test_replies_leave_by_the_bond_and_not_by_the_part_a_packet_came_in_by(
    version: int, make_lb: Callable[..., Balancer]
) -> None:
    lb = make_lb(bond=ELSEWHERE)
    service = lb.add_service(ENDS[version][1], mode="nat")
    hop = lb.add_nexthop(OWN6 if version == 6 else OWN4, ifindex=ELSEWHERE)
    service.set_slots(lb.add_backend(service.id, BACKENDS[version][0], nexthop=hop))
    sent = forwarded(lb.run(tcp(*ENDS[version])))
    assert lb.entries("nat_rev")[0][1]["back"]["ifindex"] == ELSEWHERE
    returned(lb.run(answer_to(sent)))


@versions
def test_several_frontends_and_clients_do_not_mix(version: int, lb: Balancer) -> None:
    lb.add_service(ENDS[version][1], 80, mode="nat", backends=[BACKENDS[version][0]])
    lb.add_service(ENDS[version][1], 443, mode="nat", backends=[BACKENDS[version][0]])
    client, vip = ENDS[version]
    flows = [(f"{client[:-1]}{host}", sport, dport) for host in range(1, 6)
             for sport in range(2000, 2010) for dport in (80, 443)]  # fmt: skip
    sent = [forwarded(lb.run(tcp(c, vip, sport=s, dport=d))) for c, s, d in flows]
    taken = {(network(p).dst, transport(p).dport, transport(p).sport) for p in sent}
    assert len(taken) == len(flows), "two flows share a port towards one backend"
    for (host, sport, dport), packet in zip(flows, sent, strict=True):
        back = returned(lb.run(answer_to(packet)))
        assert (network(back).dst, transport(back).dport) == (host, sport)
        assert (network(back).src, transport(back).sport) == (vip, dport)


@versions
@pytest.mark.parametrize("flags", ["A", "PA", "FA", "F", "SA", ""])
def test_a_segment_of_no_known_flow_is_reset(version: int, flags: str, lb: Balancer) -> None:
    lb.add_service(ENDS[version][1], mode="nat", backends=[BACKENDS[version][0]])
    out = lb.run(tcp(*ENDS[version], flags, seq=7, ack=99))
    assert out.said == (XDP_TX, {Reason.SENT_RST_NO_FLOW: 1})
    reply = transport(out.packet)
    if "A" in flags:
        assert (str(reply.flags), reply.seq) == ("R", 99)
    else:
        assert (str(reply.flags), reply.seq, reply.ack) == ("RA", 0, 7 + ("F" in flags))
    assert lb.entries("nat_fwd") == lb.entries("nat_rev") == []


@versions
def test_without_backends_a_new_flow_is_refused(version: int, lb: Balancer) -> None:
    lb.add_service(ENDS[version][1], mode="nat")
    lb.add_service(ENDS[version][1], proto=UDP, mode="nat")
    assert lb.run(tcp(*ENDS[version])).reasons == {Reason.SENT_RST_NO_BACKEND: 1}
    assert lb.run(udp(*ENDS[version])).reasons == {Reason.SENT_UNREACHABLE: 1}
    assert lb.run(tcp(*ENDS[version], "A")).reasons == {Reason.SENT_RST_NO_FLOW: 1}


@protocols
@versions
def test_strangers_at_nats_ports_go_to_the_stack(version: int, proto: int, lb: Balancer) -> None:
    """The wrong port, the wrong backend, or the wrong port of the right backend."""
    lb.add_service(ENDS[version][1], proto=proto, mode="nat", backends=[BACKENDS[version][0]])
    sent = forwarded(lb.run(either(proto, *ENDS[version])))
    source, port = network(sent).src, transport(sent).sport
    for src, sport, dport in (
        (BACKENDS[version][0], 80, port + 1),
        (BACKENDS[version][1], 80, port),
        (BACKENDS[version][0], 81, port),
    ):
        out = lb.run(either(proto, src, source, sport=sport, dport=dport))
        assert out.said == (XDP_PASS, {Reason.PASS_NOT_OURS: 1})


@versions
def test_ttl_of_a_reply_expires_here_too(version: int, lb: Balancer) -> None:
    lb.add_service(ENDS[version][1], mode="nat", backends=[BACKENDS[version][0]])
    sent = forwarded(lb.run(tcp(*ENDS[version])))
    out = lb.run(answer_to(sent, ttl=1))
    assert out.said == (XDP_DROP, {Reason.DROP_TTL_EXPIRED: 1})


def test_a_source_address_that_ends_in_zeros_is_one(lb: Balancer) -> None:
    service = lb.add_service(ENDS[6][1], mode="nat")
    hop = lb.add_nexthop("fd00::1:0:0")
    service.set_slots(lb.add_backend(service.id, BACKENDS[6][0], nexthop=hop))
    assert network(forwarded(lb.run(tcp(*ENDS[6])))).src == "fd00::1:0:0"


def test_a_next_hop_with_a_source_but_no_neighbour(lb: Balancer) -> None:
    service = lb.add_service(ENDS[4][1], mode="nat")
    hop = lb.add_nexthop(dmac="00:00:00:00:00:00")
    service.set_slots(lb.add_backend(service.id, BACKENDS[4][0], nexthop=hop))
    assert lb.run(tcp(*ENDS[4])).said == (XDP_DROP, {Reason.DROP_NO_NEXTHOP: 1})


@pytest.mark.parametrize("size", [4, 5])
def test_a_reply_with_options_or_odd_length(size: int, lb: Balancer) -> None:
    lb.add_service(ENDS[4][1], mode="nat", backends=[BACKENDS[4][0]])
    sent = forwarded(lb.run(tcp(*ENDS[4])))
    reply = answer_to(sent, payload=b"z" * size)
    options = ether(ip(network(reply).src, network(reply).dst, options=[]) / transport(reply))
    assert returned(lb.run(options))


def test_the_same_tuple_over_tcp_and_udp_is_two_flows(
    make_lb: Callable[..., Balancer],
) -> None:
    lb = make_lb(nat_port_count=1)
    for proto in (TCP, UDP):
        lb.add_service(ENDS[4][1], proto=proto, mode="nat", backends=[BACKENDS[4][0]])
        sent = forwarded(lb.run(either(proto, *ENDS[4])))
        assert transport(sent).sport == 10000
    assert len(lb.entries("nat_rev")) == 2
