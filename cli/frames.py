# SPDX-License-Identifier: Apache-2.0
"""Frames for `shunt explain`: made from what was asked for, or read from a capture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shunt.lb.errors import ShuntError
from shunt.lb.model import IPAddress

TCP_FLAGS = ("fin", "syn", "rst", "psh", "ack", "urg")
PROTOCOLS = ("tcp", "udp", "sctp", "icmp")
# As from a router to this host. Which MACs they are does not matter to the balancer.
_PEER, _OWN = bytes((2, 0, 0, 0, 0, 1)), bytes((2, 0, 0, 0, 0, 2))
_ETHERTYPES = {4: b"\x08\x00", 6: b"\x86\xdd"}
# https://www.tcpdump.org/linktypes.html: bytes before the ethertype, and of the whole header.
_ETHERNET = 1
_LINKS = {113: (14, 16), 276: (0, 20)}
_RAW = (12, 101, 228, 229)


def address_port(text: str, needs_port: bool) -> tuple[IPAddress, int]:
    """ADDR:PORT or [ADDR]:PORT; without a port if it needs none.

    Raises: ShuntError.
    """
    try:
        if not needs_port:
            return ip_address(text), 0
        parts = urlsplit(f"//{text}")
        if parts.port is None:
            raise ValueError("it has no port")
        return ip_address(parts.hostname or ""), parts.port
    except ValueError as e:
        form = "ADDR:PORT, or [ADDR]:PORT for IPv6" if needs_port else "an address without a port"
        raise ShuntError(f"{text} is not {form}", str(e), f"write {form}") from e


def make(
    source: tuple[IPAddress, int],
    destination: tuple[IPAddress, int],
    protocol: str,
    flags: Sequence[str] = (),
    payload: int = 0,
) -> bytes:
    """One packet; an echo request for icmp; for sctp an INIT, or DATA if there is a payload.

    Checksums are right.

    Raises: ShuntError if the families differ.
    """
    import dpkt

    (src, sport), (dst, dport) = source, destination
    if src.version != dst.version:
        raise ShuntError(
            f"{src} cannot send to {dst}",
            "they are addresses of different families",
            "give both of one family",
        )
    data: Any
    if protocol == "tcp":
        bits = sum(1 << TCP_FLAGS.index(flag) for flag in flags)
        data = dpkt.tcp.TCP(sport=sport, dport=dport, flags=bits, data=bytes(payload))
        number = 6
    elif protocol == "udp":
        data = dpkt.udp.UDP(sport=sport, dport=dport, ulen=8 + payload, data=bytes(payload))
        number = 17
    elif protocol == "sctp":
        data, number = _sctp(sport, dport, payload), 132
    elif src.version == 4:
        data = dpkt.icmp.ICMP(type=8, data=dpkt.icmp.ICMP.Echo(id=1, seq=1, data=bytes(payload)))
        number = 1
    else:
        data = dpkt.icmp6.ICMP6(type=128, data=dpkt.icmp6.ICMP6.Echo(id=1, data=bytes(payload)))
        number = 58
    ip: Any
    if src.version == 4:
        ip = dpkt.ip.IP(src=src.packed, dst=dst.packed, p=number, df=1, data=data)
    else:
        ip = dpkt.ip6.IP6(
            src=src.packed, dst=dst.packed, nxt=number, plen=len(data), hlim=64, data=data
        )
    return _OWN + _PEER + _ETHERTYPES[src.version] + bytes(ip)


def _sctp(sport: int, dport: int, payload: int) -> Any:
    import dpkt

    # INIT: tag, window, two numbers of streams, TSN. DATA: TSN, stream, number in it, protocol.
    first, kind = (bytes(12) + bytes(payload), 3) if payload else ((bytes(3) + b"\1") * 4, 0)
    length = 4 + len(first)
    packet = dpkt.sctp.SCTP(sport=sport, dport=dport, vtag=1 if payload else 0)
    number = dpkt.sctp.DATA if payload else dpkt.sctp.INIT
    chunk = dpkt.sctp.Chunk(type=number, flags=kind, len=length, data=first)
    chunk.padding, packet.chunks = bytes(-length % 4), [chunk]
    return packet


def captured(path: Path) -> Iterator[bytes]:
    """The frames of a capture (pcap, pcapng), as they came in.

    What a capture has cut off is filled up with zeros: only headers matter.

    Raises: ShuntError if it is no capture, or not of Ethernet or IP.
    """
    import dpkt

    try:
        with path.open("rb") as file:
            reader = dpkt.pcap.UniversalReader(file)
            link = reader.datalink()
            if link != _ETHERNET and link not in _LINKS and link not in _RAW:
                raise ShuntError(
                    f"{path} is not of Ethernet or IP",
                    f"its link type is {link}",
                    "capture on an Ethernet interface, or with -i any",
                )
            for _, raw in reader:
                yield whole(framed(link, bytes(raw)))
    except OSError as e:
        raise ShuntError(f"cannot read {path}", e.strerror or str(e), "name a file") from e
    except (ValueError, dpkt.Error) as e:
        raise ShuntError(
            f"{path} is no capture that can be read",
            str(e) or type(e).__name__,
            "make one with tcpdump -w FILE",
        ) from e


def framed(link: int, raw: bytes) -> bytes:
    """What was captured, with an Ethernet header."""
    if link == _ETHERNET:
        return raw
    if link in _LINKS:
        at, size = _LINKS[link]
        return _OWN + _PEER + raw[at : at + 2] + raw[size:]
    return _OWN + _PEER + _ETHERTYPES.get(raw[0] >> 4 if raw else 0, b"\0\0") + raw


def whole(frame: bytes) -> bytes:
    """A frame as long as its IP header says."""
    at = 14
    while frame[at - 2 : at] in (b"\x81\x00", b"\x88\xa8"):
        at += 4
    length = 0
    if frame[at - 2 : at] == _ETHERTYPES[4]:
        length = at + int.from_bytes(frame[at + 2 : at + 4], "big")
    elif frame[at - 2 : at] == _ETHERTYPES[6]:
        length = at + 40 + int.from_bytes(frame[at + 4 : at + 6], "big")
    return frame.ljust(max(14, length), b"\0")
