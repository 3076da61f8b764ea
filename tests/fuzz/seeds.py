# SPDX-License-Identifier: Apache-2.0
"""Whole frames of every kind that the program tells apart: where mutations start."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_network
from itertools import product

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    ICMPv6PacketTooBig,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
)
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.layers.sctp import SCTP, SCTPChunkData, SCTPChunkInit
from scapy.packet import Packet, Raw

from tests.packets import quic
from tests.packets.frames import CHUNKS, OWN_MAC, ROUTER_MAC, ether, sctp, tcp, udp

PORT = 80
BACKENDS = {
    4: ["10.0.0.1", "10.0.0.2", "10.0.0.3"],
    6: ["fd00::1", "fd00::2", "fd00::3"],
}
MODES = ("dsr-ipip", "dsr-l2", "nat", "dsr-geneve")
STATES = ("settled", "moving", "empty", "asks")
PROTOS = (6, 17)
CLIENTS = {4: [f"192.0.2.{n}" for n in range(1, 9)], 6: [f"2001:db8:c::{n}" for n in range(1, 9)]}
DENIED = [ip_network("192.0.2.8/32"), ip_network("2001:db8:c::8/128")]
ANY_PORT_VIP = "203.0.113.250"
SERVER_ID_BYTES = 2
SERVER_IDS = [bytes((0, n)) for n in range(1, 4)]
OWN = {4: "10.0.0.254", 6: "fd00::fe"}


def services() -> Iterator[tuple[int, str, str, int, str]]:
    """(IP version, VIP, mode, protocol, state) of each service that is served."""
    for n, (version, mode, proto, state) in enumerate(product((4, 6), MODES, PROTOS, STATES)):
        vip = f"203.0.113.{n}" if version == 4 else f"2001:db8:a::{n:x}"
        yield version, vip, mode, proto, state
    for n, (version, mode, state) in enumerate(product((4, 6), MODES, STATES), 100):
        vip = f"203.0.113.{n}" if version == 4 else f"2001:db8:a::{n:x}"
        yield version, vip, mode, 132, state


def frames() -> Iterator[Packet]:
    """Each kind once and more."""
    yield Ether(src=ROUTER_MAC, dst=OWN_MAC) / ARP()
    for version, vip, _, proto, _ in services():
        for client in CLIENTS[version][::7]:
            if proto == 6:
                for flags in ("S", "A", "FA", "R", "SA"):
                    yield tcp(client, vip, flags, dport=PORT)
                yield tcp(client, vip, "A", dport=PORT, payload=bytes(1400))
            elif proto == 132:
                for chunks in (*CHUNKS, "SACK+ABORT"):
                    yield sctp(client, vip, chunks, dport=PORT)
                yield sctp(client, vip, "DATA", dport=PORT, payload=bytes(1400))
            else:
                yield udp(client, vip, dport=PORT, payload=b"question")
                for payload in quic_packets():
                    yield udp(client, vip, dport=PORT, payload=payload)
                yield udp(client, vip, dport=PORT, payload=bytes(1400))
        yield from odd(version, vip, proto)
    yield udp(CLIENTS[4][0], ANY_PORT_VIP, dport=4711)
    for version in (4, 6):
        for port in (10000, 20000, 29999):
            yield tcp(BACKENDS[version][0], OWN[version], "SA", sport=PORT, dport=port)
            yield udp(BACKENDS[version][0], OWN[version], sport=PORT, dport=port)


def quic_packets() -> Iterator[bytes]:
    """Of servers that are known and one that is not, with every kind of header."""
    for server in (*SERVER_IDS, b"\xff\xff"):
        dcid = quic.connection_id(server)
        yield quic.short(dcid)
        for version in (quic.V1, quic.V2, quic.DRAFT):
            yield from (quic.long(dcid, version, kind) for kind in range(4))


def odd(version: int, vip: str, proto: int) -> Iterator[Packet]:
    """Fragments, ICMP, options, tags: towards one VIP."""
    client = CLIENTS[version][0]
    kind = {6: TCP, 17: UDP, 132: SCTP}[proto]
    upper, quoted = kind(sport=1, dport=PORT), kind(sport=PORT, dport=1)
    if proto == 132:
        upper, quoted = upper / SCTPChunkInit(), quoted / SCTPChunkData(data=b"odd")
    if version == 4:
        inner: Packet = IP(src=vip, dst=client) / quoted
        yield ether(IP(src=client, dst=vip, flags="MF", id=7) / upper / Raw(bytes(64)))
        yield ether(IP(src=client, dst=vip, frag=9, id=7, proto=proto) / Raw(bytes(64)))
        yield ether(IP(src=client, dst=vip, options=[b"\x94\x04\0\0"]) / upper)
        yield ether(IP(src=client, dst=vip) / ICMP() / Raw(b"ping"))
        yield ether(IP(src="198.51.100.1", dst=vip) / ICMP(type=3, code=4, nexthopmtu=1280) / inner)
        yield ether(IP(src="198.51.100.1", dst=vip) / ICMP(type=11) / inner)
        header: Packet = IP(src=client, dst=vip)
    else:
        inner = IPv6(src=vip, dst=client) / quoted
        fragment = IPv6ExtHdrFragment(id=7, m=1)
        yield ether(IPv6(src=client, dst=vip) / fragment / upper / Raw(bytes(64)))
        later = IPv6ExtHdrFragment(id=7, offset=9, nh=proto)
        yield ether(IPv6(src=client, dst=vip) / later / Raw(bytes(64)))
        yield ether(IPv6(src=client, dst=vip) / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / upper)
        yield ether(IPv6(src=client, dst=vip) / ICMPv6EchoRequest(data=b"ping"))
        yield ether(IPv6(src="2001:db8:d::1", dst=vip) / ICMPv6PacketTooBig(mtu=1280) / inner)
        yield ether(IPv6(src="2001:db8:d::1", dst=vip) / ICMPv6DestUnreach() / inner)
        header = IPv6(src=client, dst=vip)
    tag = Ether(src=ROUTER_MAC, dst=OWN_MAC)
    yield tag / Dot1Q(vlan=5) / header / upper
    yield tag / Dot1AD(vlan=6) / Dot1Q(vlan=5) / header / upper
