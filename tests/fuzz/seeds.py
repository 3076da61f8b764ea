# SPDX-License-Identifier: Apache-2.0
"""Whole frames of every kind that the balancer and TC tell apart: where mutations start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

from scapy.layers import inet
from scapy.layers import sctp as scapy_sctp
from scapy.layers.inet import ICMP, IP, IPOption_LSRR
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.layers.sctp import SCTPChunkData, SCTPChunkInit
from scapy.packet import Packet, Raw

from tests.fuzz.headers import SCTP, TCP, UDP
from tests.fuzz.served import ANY_PORT_VIP, CLIENTS, NUMBERS, OWN, PORT, Served, services
from tests.packets import quic
from tests.packets.frames import CHUNKS, OWN_MAC, ROUTER_MAC, either, ether, ip, sctp, tcp, udp

SERVER_ID_BYTES = 2
SERVER_IDS = [bytes((0, n)) for n in range(1, 4)]
ROUTER = {4: "198.51.100.1", 6: "2001:db8:d::1"}
HEADERS: dict[int, Callable[..., Packet]] = {TCP: inet.TCP, UDP: inet.UDP, SCTP: scapy_sctp.SCTP}
LONG = bytes(1400)
# Whose new flows all go to one backend.
MOVING_VIP = next(s.vip for s in services(["nat"], [UDP]) if s.state == "moving")


@cache
def balancer() -> tuple[bytes, ...]:
    """For the balancer."""
    return tuple(bytes(frame) for frame in _balancer())


def many(vip: str) -> Iterator[Packet]:
    """More flows to one backend than nat has ports on a small target."""
    yield from (udp(CLIENTS[4][0], vip, sport=port, dport=PORT) for port in range(50000, 50009))


def _balancer() -> Iterator[Packet]:
    yield from many(MOVING_VIP)
    yield Ether(src=ROUTER_MAC, dst=OWN_MAC) / ARP()
    for served in services(tuple(NUMBERS), (TCP, UDP, SCTP)):
        yield from for_service(served)
    yield udp(CLIENTS[4][0], ANY_PORT_VIP, dport=4711)
    for version, mapped in ((4, "::ffff:192.0.2.1"), (6, "::ffff:203.0.113.0")):
        vip = "::ffff:203.0.113.32" if version == 4 else "2001:db8:a::20"
        yield tcp(mapped, vip, "S", dport=PORT)
        for port in (10000, 10007, 29999):
            backend = f"10.4.32.{version}" if version == 4 else "fd00:6::20:1"
            yield tcp(backend, OWN[version], "SA", sport=PORT, dport=port)
            yield udp(backend, OWN[version], sport=PORT, dport=port)


def for_service(served: Served) -> Iterator[Packet]:
    """From a client, and one who is not served where it is asked whose packets they are."""
    client, denied = CLIENTS[served.version]
    yield from plain(served, client, served.vip)
    if served.state == "asks":
        yield either(served.proto, denied, served.vip)
    yield from odd(served)


def plain(served: Served, client: str, vip: str) -> Iterator[Packet]:
    """Of a connection's life, or datagrams."""
    if served.proto == TCP:
        for flags in ("S", "A", "FA", "R", "SA"):
            yield tcp(client, vip, flags, dport=PORT)
        yield tcp(client, vip, "S", dport=PORT, sport=40001)
        yield tcp(client, vip, "A", dport=PORT, sport=40001, payload=LONG + bytes(60))
    elif served.proto == SCTP:
        for chunks in (*CHUNKS, "SACK+ABORT"):
            yield sctp(client, vip, chunks, dport=PORT)
        yield sctp(client, vip, "DATA", dport=PORT, payload=LONG)
    else:
        yield udp(client, vip, dport=PORT, payload=b"question")
        if served.state == "asks":
            for payload in quic_packets():
                yield udp(client, vip, dport=PORT, payload=payload)
        yield udp(client, vip, dport=PORT, payload=LONG + bytes(72))
        if served.version == 4:
            yield udp(client, vip, dport=PORT, payload=LONG + bytes(72), flags=0)


def quic_packets() -> Iterator[bytes]:
    """Of servers that are known and one that is not, with every kind of header."""
    for server in (*SERVER_IDS, b"\xff\xff"):
        dcid = quic.connection_id(server)
        yield quic.short(dcid)
        for version in (quic.V1, quic.V2, quic.DRAFT):
            yield from (quic.long(dcid, version, kind) for kind in range(4))


def odd(served: Served) -> Iterator[Packet]:
    """Fragments, ICMP, options, tags: towards one VIP."""
    vip, client, proto = served.vip, CLIENTS[served.version][0], served.proto
    kind = HEADERS[proto]
    upper, quoted = kind(sport=1, dport=PORT), kind(sport=PORT, dport=40000)
    if proto == SCTP:
        upper, quoted = upper / SCTPChunkInit(), quoted / SCTPChunkData(data=b"odd")
    elif proto == TCP:
        upper.flags = "S"
    if served.version == 4:
        yield from _odd4(client, vip, upper, quoted, proto)
        header: Packet = IP(src=client, dst=vip)
    else:
        yield from _odd6(client, vip, upper, quoted, proto)
        header = IPv6(src=client, dst=vip)
    if served.state == "settled":
        tag = Ether(src=ROUTER_MAC, dst=OWN_MAC)
        yield tag / Dot1Q(vlan=5) / header / upper
        yield tag / Dot1AD(vlan=6) / Dot1Q(vlan=5) / header / upper
    yield ether(ip(client, vip, ttl=1) / upper)
    if served.mode == "nat46":
        yield routed(client, vip, upper)


def routed(client: str, vip: str, upper: Packet) -> Packet:
    """By way of hosts that it has not seen yet."""
    if ":" in vip:
        router = IPv6ExtHdrRouting(addresses=[ROUTER[6]], segleft=1)
        return ether(IPv6(src=client, dst=vip) / router / upper)
    options = [IPOption_LSRR(routers=[ROUTER[4]], pointer=4)]
    return ether(IP(src=client, dst=vip, options=options) / upper)


def _odd4(client: str, vip: str, upper: Packet, quoted: Packet, proto: int) -> Iterator[Packet]:
    inner = IP(src=vip, dst=client) / quoted
    yield ether(IP(src=client, dst=vip, flags="MF", id=7) / upper / Raw(bytes(64)))
    yield ether(IP(src=client, dst=vip, frag=9, id=7, proto=proto) / Raw(bytes(64)))
    yield ether(IP(src=client, dst=vip, frag=9, id=8, proto=proto) / Raw(bytes(64)))
    yield ether(IP(src=client, dst=vip, options=[b"\x94\x04\0\0"]) / upper)
    yield ether(IP(src=client, dst=vip) / ICMP() / Raw(b"ping"))
    yield ether(IP(src=ROUTER[4], dst=vip) / ICMP(type=3, code=4, nexthopmtu=1280) / inner)
    yield ether(IP(src=ROUTER[4], dst=vip) / ICMP(type=11) / inner)


def _odd6(client: str, vip: str, upper: Packet, quoted: Packet, proto: int) -> Iterator[Packet]:
    inner = IPv6(src=vip, dst=client) / quoted
    fragment = IPv6ExtHdrFragment(id=7, m=1)
    yield ether(IPv6(src=client, dst=vip) / fragment / upper / Raw(bytes(64)))
    for number in (7, 8):
        later = IPv6ExtHdrFragment(id=number, offset=9, nh=proto)
        yield ether(IPv6(src=client, dst=vip) / later / Raw(bytes(64)))
    yield ether(IPv6(src=client, dst=vip) / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / upper)
    yield ether(IPv6(src=client, dst=vip) / ICMPv6EchoRequest(data=b"ping"))
    yield ether(IPv6(src=ROUTER[6], dst=vip) / ICMPv6PacketTooBig(mtu=1280) / inner)
    yield ether(IPv6(src=ROUTER[6], dst=vip) / ICMPv6DestUnreach() / inner)
