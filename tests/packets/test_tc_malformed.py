# SPDX-License-Identifier: Apache-2.0
"""Packets whose headers cannot be read: none that is to be translated goes on as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, PadN
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from tests.packets.balancer import SCTP, TCP, UDP, Balancer, Reason
from tests.packets.frames import ETH, either, ether, network, transport
from tests.packets.test_echo import know_vip
from tests.packets.test_tc_masquerade import NEAR, OWN, POD, WORLD, Masquerader
from tests.packets.translator import (
    BACKENDS,
    CLIENT,
    FAMILIES,
    NEXT,
    SHOT,
    VIP,
    Translator,
    answer,
    expect,
    tuple_of,
)

PROTOS = pytest.mark.parametrize("proto", [TCP, UDP, SCTP], ids=["tcp", "udp", "sctp"])
# How many bytes there are of a transport header that has more.
SHORT = {TCP: (4, 8, 19), UDP: (4, 7), SCTP: (4, 12, 15)}
WITHOUT_PORTS = (0, 1, 3)
ELSEWHERE = {4: "198.18.0.7", 6: "2001:db8:9::7"}


def cut(frame: Packet, count: int, padded: bool = False) -> bytes:
    """With so many bytes behind the IP header, which says so; `padded` as an Ethernet frame is."""
    packet = Ether(bytes(frame))
    header = network(packet)
    header.remove_payload()
    if header.version == 4:
        header.len, header.chksum = 20 + count, None
    else:
        header.plen = count
    start = ETH + (20 if header.version == 4 else 40)
    raw = bytes(packet) + bytes(frame)[start : start + count]
    return raw.ljust(60, b"\0") if padded else raw


def damaged(proto: int, src: str, dst: str, **fields: Any) -> Iterator[bytes]:
    """Packets of a flow whose ports can be read, and not much more."""
    whole = either(proto, src, dst, **fields)
    for count in SHORT[proto]:
        yield cut(whole, count)
        yield cut(whole, count, padded=True)
    if proto == TCP:
        for words in (0, 4, 15):  # less than a header, and more than there is
            bent = whole.copy()
            transport(bent).dataofs = words
            yield bytes(bent)


def without_ports(proto: int, src: str, dst: str) -> Iterator[bytes]:
    for count in WITHOUT_PORTS:
        yield cut(either(proto, src, dst), count)
        yield cut(either(proto, src, dst), count, padded=True)


@pytest.fixture(scope="module")
def translator() -> Iterator[Translator]:
    with Translator(inserts_per_s=10**6) as found:
        yield found


@PROTOS
@FAMILIES
@pytest.mark.parametrize("mode", ["local", "nat"])
def test_to_a_frontend(tc: Translator, ip: int, proto: int, mode: str) -> None:
    tc.add_service(VIP[ip], 80, proto, mode, BACKENDS[ip])
    for frame in damaged(proto, CLIENT[ip], VIP[ip]):
        expect(tc.run(frame), SHOT, "DROP_NAT_MALFORMED")
    assert tc.entries("nat_fwd") == []
    # A connection that there is goes on.
    sent = tc.run(either(proto, CLIENT[ip], VIP[ip]))
    for frame in damaged(proto, CLIENT[ip], VIP[ip]):
        expect(tc.run(frame), SHOT, "DROP_NAT_MALFORMED")
    again = tc.run(either(proto, CLIENT[ip], VIP[ip]))
    assert tuple_of(again.packet) == tuple_of(sent.packet)


@PROTOS
@FAMILIES
def test_to_a_frontend_that_has_every_port(tc: Translator, ip: int, proto: int) -> None:
    tc.add_service(VIP[ip], 0, proto, backends=BACKENDS[ip])
    for frame in damaged(proto, CLIENT[ip], VIP[ip], dport=9999):
        expect(tc.run(frame), SHOT, "DROP_NAT_MALFORMED")


@PROTOS
@FAMILIES
def test_a_reply_of_a_backend_here(tc: Translator, ip: int, proto: int) -> None:
    """It must not leave with the backend's own address."""
    tc.add_service(VIP[ip], 80, proto, backends=BACKENDS[ip], backend_port=0)
    source, sport, backend, port = tuple_of(tc.run(either(proto, CLIENT[ip], VIP[ip])).packet)
    for frame in damaged(proto, backend, source, sport=port, dport=sport):
        expect(tc.leave(frame), SHOT, "DROP_NAT_MALFORMED")
    for frame in damaged(proto, backend, source, sport=port, dport=sport + 1):
        assert tc.leave(frame).said == (NEXT, {})


@pytest.mark.parametrize("proto", [TCP, UDP], ids=["tcp", "udp"])
@FAMILIES
def test_a_reply_of_a_backend_elsewhere(tc: Translator, ip: int, proto: int) -> None:
    tc.add_service(VIP[ip], 80, proto, "nat", BACKENDS[ip])
    own, sport, backend, port = tuple_of(tc.run(either(proto, CLIENT[ip], VIP[ip])).packet)
    for frame in damaged(proto, backend, own, sport=port, dport=sport):
        expect(tc.run(frame), SHOT, "DROP_NAT_MALFORMED")


@PROTOS
@FAMILIES
def test_what_is_masqueraded(ip: int, proto: int) -> None:
    with Masquerader() as tc:
        for frame in (
            *damaged(proto, POD[ip], WORLD[ip], dport=443),
            *without_ports(proto, POD[ip], WORLD[ip]),
        ):
            expect(tc.leave(frame), SHOT, "DROP_NAT_MALFORMED")
        for frame in damaged(proto, POD[ip], NEAR[ip], dport=443):
            assert tc.leave(frame).said == (NEXT, {})
        sent = tc.leave(either(proto, POD[ip], WORLD[ip], dport=443))
        expect(sent, NEXT, "SENT_MASQUERADED")
        port = tuple_of(sent.packet)[1]
        for frame in damaged(proto, WORLD[ip], OWN[ip], sport=443, dport=port):
            expect(tc.run(frame), SHOT, "DROP_NAT_MALFORMED")
        assert len(tc.entries("nat_fwd")) == len(tc.entries("nat_rev")) == 1


@PROTOS
@FAMILIES
def test_whose_a_packet_without_ports_is_cannot_be_told(
    tc: Translator, ip: int, proto: int
) -> None:
    """Nor can anybody take it: it goes nowhere, at either hook."""
    tc.add_service(VIP[ip], 80, proto, backends=BACKENDS[ip])
    for frame in without_ports(proto, CLIENT[ip], VIP[ip]):
        expect(tc.run(frame), SHOT, "DROP_NAT_MALFORMED")
    for frame in without_ports(proto, BACKENDS[ip][0], CLIENT[ip]):
        expect(tc.leave(frame), SHOT, "DROP_NAT_MALFORMED")


@PROTOS
@FAMILIES
def test_what_is_none_of_ours_goes_on(tc: Translator, ip: int, proto: int) -> None:
    tc.add_service(VIP[ip], 80, proto, backends=BACKENDS[ip])
    for to, port in ((ELSEWHERE[ip], 80), (VIP[ip], 81)):
        for frame in damaged(proto, CLIENT[ip], to, dport=port):
            for hook in (tc.run, tc.leave):
                out = hook(frame)
                assert (out.verdict, out.reasons, out.data) == (NEXT, {}, frame)


def test_extension_headers_without_an_end(tc: Translator) -> None:
    """Nothing says what they lead to: to a VIP they are ours, and others' are not looked at."""
    service = tc.add_service(VIP[6], 80, TCP, backends=BACKENDS[6])
    know_vip(tc, VIP[6], service.id)
    for to in (VIP[6], ELSEWHERE[6]):
        options = IPv6ExtHdrDestOpt(nh=60, len=30, options=[PadN(optdata=bytes(240))])
        frame = bytes(ether(IPv6(src=CLIENT[6], dst=to) / options))[: ETH + 60]
        if to == VIP[6]:
            expect(tc.run(frame), SHOT, "DROP_NAT_MALFORMED")
        else:
            assert tc.run(frame).said == (NEXT, {})


@FAMILIES
def test_xdp_leaves_them_to_tc(ip: int) -> None:
    with Translator() as tc:
        tc.add_service(VIP[ip], 80, TCP, "nat", BACKENDS[ip])
        xdp = Balancer(maps=tc.object.maps)
        try:
            for frame in damaged(TCP, CLIENT[ip], VIP[ip]):
                out = xdp.run(frame)
                assert (out.data, out.reasons) == (frame, {Reason.PASS_MALFORMED: 1})
                expect(tc.run(out.data), SHOT, "DROP_NAT_MALFORMED")
        finally:
            xdp.close()


@FAMILIES
def test_that_the_check_can_fail(tc: Translator, ip: int) -> None:
    tc.add_service(VIP[ip], 80, TCP, backends=BACKENDS[ip])
    whole = either(TCP, CLIENT[ip], VIP[ip])
    assert cut(whole, 20) == bytes(whole)
    sent = tc.run(cut(whole, 20))
    expect(sent, NEXT, "SENT_TO_BACKEND")
    expect(tc.leave(bytes(answer(sent))), NEXT, "SENT_TO_CLIENT")
    assert IP in sent.packet or IPv6 in sent.packet
