# SPDX-License-Identifier: Apache-2.0
"""TC: what a sender is told instead of silence; and backends that reach themselves."""

from __future__ import annotations

import pytest
from scapy.layers.inet import TCP
from scapy.packet import Packet

from tests.packets import balancer
from tests.packets.balancer import Out, Reason
from tests.packets.frames import (
    ETH,
    OWN_MAC,
    ROUTER_MAC,
    either,
    network,
    tcp,
    transport,
    udp,
)
from tests.packets.test_echo import know_vip, ping
from tests.packets.test_fragments import fragments_of, reassemble
from tests.packets.test_icmp import (
    checksums_hold,
    error,
    protos,
    quote_of,
    versions,
)
from tests.packets.test_icmp import tuple_of as quoted_tuple
from tests.packets.test_tc_related import HEADER, ends, of_the_vip, parts_sent, serve
from tests.packets.translator import (
    BACKENDS,
    CLIENT,
    NEXT,
    REDIRECT,
    SHOT,
    VIP,
    Translator,
    answer,
    expect,
    tuple_of,
)

# Answers ------------------------------------------------------------------------------------


def told(out: Out, reason: str) -> Packet:
    """An answer: back to where the frame came from, from whom it was for."""
    expect(out, REDIRECT, reason)
    assert (out.packet.src, out.packet.dst) == (OWN_MAC, ROUTER_MAC)
    return out.packet


@versions
@pytest.mark.parametrize("mode", ["local", "nat"])
@pytest.mark.parametrize("size", [0, 1, 1400])
def test_without_backends_the_sender_is_told(
    tc: Translator, version: int, mode: str, size: int
) -> None:
    for proto in (balancer.TCP, balancer.UDP):
        tc.add_service(VIP[version], 80, proto, mode)
    reply = told(tc.run(tcp(CLIENT[version], VIP[version], payload=bytes(size))),
                 "SENT_RST_NO_BACKEND")  # fmt: skip
    assert tuple_of(reply) == (VIP[version], 80, CLIENT[version], 40000)
    assert (str(reply[TCP].flags), reply[TCP].seq, reply[TCP].ack) == ("RA", 0, 1001 + size)
    assert len(reply) == ETH + HEADER[version] + 20
    packet = udp(CLIENT[version], VIP[version], payload=bytes(size), tos=4, ttl=9)
    reply = told(tc.run(packet), "SENT_UNREACHABLE")
    assert ends(reply) == (VIP[version], CLIENT[version])
    assert bytes(reply)[ETH + HEADER[version] :][:2] == (b"\3\3" if version == 4 else b"\1\4")
    as_they_came(reply, packet, version)
    expect(tc.run(tcp(CLIENT[version], VIP[version], "R")), SHOT, "DROP_NAT_NO_FLOW")


def as_they_came(reply: Packet, packet: Packet, version: int) -> None:
    """An error quotes the IP header and eight bytes."""
    quote = HEADER[version] + 8
    assert bytes(reply)[-quote:] == bytes(packet)[ETH : ETH + quote]
    assert len(reply) == ETH + HEADER[version] + 8 + quote


@versions
@protos
@pytest.mark.parametrize("mtu", [1300, 1420])
def test_what_does_not_fit_is_told(tc: Translator, version: int, proto: int, mtu: int) -> None:
    hop = tc.add_nexthop("10.0.0.9" if version == 4 else "fd00::9", mtu=mtu)
    tc.add_service(VIP[version], 80, proto, "nat", BACKENDS[version], nexthop=hop)
    packet = either(proto, CLIENT[version], VIP[version], payload=bytes(1440))
    reply = told(tc.run(packet), "SENT_TOO_BIG")
    assert ends(reply) == (VIP[version], CLIENT[version])
    header = bytes(reply)[ETH + HEADER[version] :]
    assert header[:2] == (b"\3\4" if version == 4 else b"\2\0")
    assert int.from_bytes(header[4:8], "big") == mtu
    as_they_came(reply, packet, version)
    # A sender that does as it is told gets through.
    payload = bytes(mtu - (len(either(proto, CLIENT[version], VIP[version])) - ETH))
    out = tc.run(either(proto, CLIENT[version], VIP[version], payload=payload))
    expect(out, REDIRECT, "SENT_TO_BACKEND")


def test_what_may_be_fragmented_is_not_told(tc: Translator) -> None:
    hop = tc.add_nexthop(mtu=900)
    tc.add_service(VIP[4], mode="nat", backends=["10.0.0.1"], nexthop=hop)
    big = tcp(CLIENT[4], VIP[4], payload=bytes(1000), flags="S")
    network(big).flags = 0
    expect(tc.run(big), SHOT, "DROP_TOO_BIG")


def test_nobody_is_told_that_an_error_is_too_big(tc: Translator) -> None:
    serve(tc, 4, balancer.TCP, "nat")
    tc.map("nexthops").mapped()["mtu"] = 100
    out = tc.run(error(4, VIP[4], of_the_vip(4, balancer.TCP)))
    expect(out, SHOT, "DROP_TOO_BIG")


@versions
def test_echo_to_a_vip_is_answered(tc: Translator, version: int) -> None:
    made = tc.add_service(VIP[version], backends=BACKENDS[version])
    packet = ping(version, CLIENT[version], VIP[version], ttl=3)
    assert tc.run(packet).said == (NEXT, {})
    know_vip(tc, VIP[version], made.id)
    reply = told(tc.run(packet), "SENT_ECHO_REPLY")
    assert ends(reply) == (VIP[version], CLIENT[version])
    start = ETH + HEADER[version]
    assert bytes(reply)[start] == (0 if version == 4 else 129)
    assert bytes(reply)[start + 4 :] == bytes(packet)[start + 4 :]
    # One that leaves is this host's own.
    assert tc.leave(packet).said == (NEXT, {})


# Hairpins -----------------------------------------------------------------------------------


def serve_itself(tc: Translator, version: int, proto: int) -> str:
    """The backend's address."""
    itself = BACKENDS[version][0]
    tc.add_service(VIP[version], 80, proto, "local", [itself], backend_port=8080)
    tc.open_port(proto, *tc.nat_ports)
    return itself


@versions
@protos
def test_a_backend_reaches_itself(tc: Translator, version: int, proto: int) -> None:
    """It is given the VIP for a client: no stack takes from outside what it has sent itself."""
    itself = serve_itself(tc, version, proto)
    sent = tc.run(either(proto, itself, VIP[version], payload=b"odd"))
    expect(sent, REDIRECT, "SENT_TO_BACKEND")
    source, port, *to = tuple_of(sent.packet)
    assert (source, to) == (VIP[version], [itself, 8080])
    assert (sent.packet.src, sent.packet.dst) == (OWN_MAC, ROUTER_MAC)  # back where it came from
    assert port in tc.nat_ports
    reply = answer(sent, payload=b"x" * 7, proto=proto)
    back = tc.run(reply)
    expect(back, REDIRECT, "SENT_TO_CLIENT")
    assert tuple_of(back.packet) == (VIP[version], 80, itself, 40000)
    assert bytes(transport(back.packet).payload) == b"x" * 7
    fields = {"flags": "A"} if proto == balancer.TCP else {}
    again = tc.run(either(proto, itself, VIP[version], **fields))
    assert tuple_of(again.packet) == tuple_of(sent.packet)
    # Others keep their address, with the same backend.
    other = tc.run(either(proto, CLIENT[version], VIP[version]))
    expect(other, NEXT, "SENT_TO_BACKEND")
    assert tuple_of(other.packet)[:2] == (CLIENT[version], 40000)
    # XDP before it leaves the replies to TC, as it leaves the requests.
    with balancer.Balancer(maps=tc.object.maps) as xdp:
        assert xdp.run(reply).reasons == {Reason.PASS_NOT_OURS: 1}
        about = error(version, source, network(sent.packet))
        assert xdp.run(about).reasons == {Reason.PASS_NOT_OURS: 1}


@versions
@protos
def test_errors_and_fragments_of_a_hairpin(tc: Translator, version: int, proto: int) -> None:
    itself = serve_itself(tc, version, proto)
    frame = either(proto, itself, VIP[version], payload=bytes(range(250)) * 20)
    outs = [tc.run(part) for part in fragments_of(frame)]
    sent = reassemble(parts_sent(outs, REDIRECT, Reason.SENT_TO_BACKEND))
    assert (sent.dst, sent.payload.dport) == (itself, 8080)
    out = tc.run(error(version, sent.src, sent, HEADER[version] + 8))
    expect(out, REDIRECT, "SENT_ERROR_TO_CLIENT")
    assert ends(out.packet) == (VIP[version], itself)
    assert quoted_tuple(quote_of(out.packet, version)) == (itself, 40000, VIP[version], 80)
    reply = either(proto, VIP[version], itself, sport=80, dport=40000, payload=b"x" * 99)
    out = tc.run(error(version, VIP[version], network(reply.__class__(bytes(reply)))))
    expect(out, REDIRECT, "SENT_ERROR_TO_BACKEND")
    assert ends(out.packet) == (sent.src, itself)
    checksums_hold(quote_of(out.packet, version), whole=True)
