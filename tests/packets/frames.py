# SPDX-License-Identifier: Apache-2.0
"""Packets built by scapy, and checked by it: it knows nothing of the programs under test."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from ipaddress import ip_address
from typing import Any

from scapy.layers.inet import IP, TCP, UDP, in4_chksum
from scapy.layers.inet6 import IPv6, in6_chksum
from scapy.layers.l2 import Ether
from scapy.layers.sctp import (
    SCTP,
    SCTPChunkAbort,
    SCTPChunkCookieAck,
    SCTPChunkCookieEcho,
    SCTPChunkData,
    SCTPChunkError,
    SCTPChunkHeartbeatAck,
    SCTPChunkHeartbeatReq,
    SCTPChunkInit,
    SCTPChunkInitAck,
    SCTPChunkSACK,
    SCTPChunkShutdown,
    SCTPChunkShutdownAck,
    SCTPChunkShutdownComplete,
    crc32c,
)
from scapy.packet import Packet, Raw
from scapy.utils import checksum

ROUTER_MAC = "02:00:00:00:00:01"  # who sends us the clients' packets
OWN_MAC = "02:00:00:00:00:02"
ETH = 14

# Extension headers of IPv6 that a transport header may follow.
_EXTENSIONS = {0, 43, 60}
_IPV4, _TCP, _UDP, _IPV6, _ICMP, _ICMPV6, _SCTP = 4, 6, 17, 41, 1, 58, 132
_GENEVE = (6081).to_bytes(2, "big")  # the port

CHUNKS: dict[str, Callable[[], Packet]] = {
    "INIT": lambda: SCTPChunkInit(init_tag=7, a_rwnd=65536),
    "INIT ACK": lambda: SCTPChunkInitAck(init_tag=8, a_rwnd=65536),
    "COOKIE ECHO": lambda: SCTPChunkCookieEcho(cookie=b"cookie"),
    "COOKIE ACK": SCTPChunkCookieAck,
    "DATA": lambda: SCTPChunkData(data=b"odd"),
    "SACK": SCTPChunkSACK,
    "HEARTBEAT": SCTPChunkHeartbeatReq,
    "HEARTBEAT ACK": SCTPChunkHeartbeatAck,
    "SHUTDOWN": SCTPChunkShutdown,
    "SHUTDOWN ACK": SCTPChunkShutdownAck,
    "SHUTDOWN COMPLETE": SCTPChunkShutdownComplete,
    "ABORT": SCTPChunkAbort,
    "ERROR": SCTPChunkError,
}


def ip(src: str, dst: str, **fields: Any) -> Packet:
    """An IP header of the addresses' family; ttl is the hop limit, tos the traffic class too.

    DF is set unless `flags` says otherwise, as stacks set it for all that fits their own link.
    """
    if ip_address(src).version == 4:
        fields.setdefault("flags", "DF")
        return IP(src=src, dst=dst, **fields)
    for ours, theirs in (("ttl", "hlim"), ("tos", "tc")):
        if ours in fields:
            fields[theirs] = fields.pop(ours)
    return IPv6(src=src, dst=dst, **fields)


def ether(payload: Packet, src: str = ROUTER_MAC) -> Packet:
    """A frame as the router sends it to us."""
    return Ether(src=src, dst=OWN_MAC) / payload


def tcp(
    src: str,
    dst: str,
    flags: str = "S",
    *,
    sport: int = 40000,
    dport: int = 80,
    seq: int = 1000,
    ack: int = 0,
    payload: bytes = b"",
    **fields: Any,
) -> Packet:
    """A TCP frame; `fields` are the IP header's."""
    segment = TCP(sport=sport, dport=dport, flags=flags, seq=seq, ack=ack)
    return ether(ip(src, dst, **fields) / segment / Raw(payload))


def udp(
    src: str,
    dst: str,
    *,
    sport: int = 40000,
    dport: int = 80,
    payload: bytes = b"",
    **fields: Any,
) -> Packet:
    """A UDP frame; `fields` are the IP header's."""
    return ether(ip(src, dst, **fields) / UDP(sport=sport, dport=dport) / Raw(payload))


def sctp(
    src: str,
    dst: str,
    chunks: str = "INIT",
    *,
    sport: int = 40000,
    dport: int = 80,
    tag: int | None = None,
    payload: bytes = b"",
    **fields: Any,
) -> Packet:
    """A frame of SCTP: `chunks` are names of CHUNKS with + between; a payload is DATA after them.

    The tag is what such a packet has. `fields` are the IP header's.
    """
    tag = tag if tag is not None else 0 if chunks == "INIT" else 0x5EED
    packet = ether(ip(src, dst, **fields) / SCTP(sport=sport, dport=dport, tag=tag))
    for name in chunks.split("+"):
        packet = packet / CHUNKS[name]()
    return packet / SCTPChunkData(data=payload) if payload else packet


def either(proto: int, src: str, dst: str, **fields: Any) -> Packet:
    """The first frame of a flow: a SYN, an INIT, or a datagram."""
    if proto == _SCTP:
        return sctp(src, dst, **fields)
    return tcp(src, dst, **fields) if proto == _TCP else udp(src, dst, **fields)


@cache
def packed(
    proto: int, src: str, dst: str, flags: str, sport: int, dport: int, payload: bytes = b""
) -> bytes:
    """A frame's bytes, for who sends it often. `flags` are TCP's, or SCTP's chunks."""
    fields: dict[str, Any] = {"sport": sport, "dport": dport, "payload": payload}
    if proto == _UDP:
        return bytes(udp(src, dst, **fields))
    return bytes((tcp if proto == _TCP else sctp)(src, dst, flags, **fields))


def verify(frame: bytes) -> Packet:
    """Parse a frame; every length and checksum in it must be right, also of what is inside."""
    packet = Ether(frame)
    assert packet.type in {0x0800, 0x86DD}
    _verify_ip(frame[ETH:], 4 if packet.type == 0x0800 else 6)
    return packet


def _verify_ip(raw: bytes, version: int) -> None:
    assert raw[0] >> 4 == version
    header: Packet
    if version == 4:
        header = IP(raw)
        assert checksum(raw[: header.ihl * 4]) == 0, "IPv4 header checksum"
        assert header.len <= len(raw), "IPv4 total length beyond the frame"
        proto, body = header.proto, raw[header.ihl * 4 : header.len]
    else:
        header = IPv6(raw)
        assert 40 + header.plen <= len(raw), "IPv6 payload length beyond the frame"
        proto, body = header.nh, raw[40 : 40 + header.plen]
        while proto in _EXTENSIONS:
            proto, body = body[0], body[(body[1] + 1) * 8 :]
    if proto in {_IPV4, _IPV6}:
        _verify_ip(body, 4 if proto == _IPV4 else 6)
    elif proto == _ICMP:
        assert checksum(body) == 0, "ICMP checksum"
    elif proto == _UDP and body[2:4] == _GENEVE:
        assert int.from_bytes(body[4:6], "big") == len(body)
        assert body[6:8] == b"\0\0", "the tunnel's own checksum"
        _verify_geneve(body[8:])
    elif proto == _UDP and version == 4 and body[6:8] == b"\0\0":
        assert int.from_bytes(body[4:6], "big") == len(body)
    elif proto == _SCTP:
        checksum_of: Callable[[bytes], int] = crc32c
        assert checksum_of(body[:8] + bytes(4) + body[12:]) == int.from_bytes(body[8:12], "big")
    elif proto in {_TCP, _UDP, _ICMPV6}:
        total: Any = in4_chksum if version == 4 else in6_chksum
        assert total(proto, header, body) == 0, f"checksum of protocol {proto}"
        assert proto != _UDP or int.from_bytes(body[4:6], "big") == len(body)


def _verify_geneve(raw: bytes) -> None:
    assert raw[0] >> 6 == 0, "Geneve's version"
    ethertype = int.from_bytes(raw[2:4], "big")
    assert ethertype in {0x0800, 0x86DD}
    _verify_ip(raw[8 + (raw[0] & 0x3F) * 4 :], 4 if ethertype == 0x0800 else 6)


def transport(packet: Packet) -> Packet:
    """The TCP, UDP or SCTP header of a parsed packet."""
    header: Packet = next(packet[kind] for kind in (TCP, UDP, SCTP) if kind in packet)
    return header


def network(packet: Packet) -> Packet:
    """The outermost IP header of a parsed packet."""
    header: Packet = packet.payload
    return header
