# SPDX-License-Identifier: Apache-2.0
"""What of a frame says where it may go, read by other means than the programs under test."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address

IPV4, IPV6 = b"\x08\x00", b"\x86\xdd"
TAGS = {b"\x81\x00", b"\x88\xa8"}
TCP, UDP, SCTP = 6, 17, 132
WITH_PORTS = frozenset((TCP, UDP, SCTP))
ICMPS = frozenset((1, 58))
IPIPS = {4: 4, 16: 41}  # protocol, by the length of an inner address
GENEVE_PORT, GENEVE_BYTES = 6081, 8 + 8 + 24
ROUTER = {4: ip_address("198.51.100.1").packed, 16: ip_address("2001:db8:d::1").packed}
# Where TCP's flags and SCTP's first chunk are, and what answers those of a handshake.
SAYS_AT = {TCP: 13, SCTP: 12}
NEXT = {TCP: {0x02: 0x12, 0x12: 0x10}, SCTP: {1: 2, 2: 10, 10: 11}}
_FRAGMENT = 44
_EXTENSIONS = frozenset((0, 43, _FRAGMENT, 60))
_MOST_EXTENSIONS = 4


def packed(address: str) -> bytes:
    """4 or 16 bytes."""
    return ip_address(address).packed


def mapped(address: bytes) -> bytes:
    """16 bytes, as tables and the option of Geneve have them."""
    return address if len(address) == 16 else bytes(10) + b"\xff\xff" + address


@dataclass(frozen=True, slots=True)
class Headers:
    """Of the outermost packet. Ports are -1 where there are none: in ICMP, and in what is not a
    datagram's first fragment."""

    to: bytes  # MACs
    by: bytes
    tags: bytes
    at: int  # where the IP header begins
    l4: int
    src: bytes
    dst: bytes
    proto: int
    sport: int
    dport: int


def read(frame: bytes) -> Headers | None:
    """None if it is not IP, or its header is not whole."""
    at = 14
    while frame[at - 2 : at] in TAGS and at < 22:
        at += 4
    kind = frame[at - 2 : at]
    if kind == IPV4:
        found = _read4(frame, at)
    else:
        found = _read6(frame, at) if kind == IPV6 else None
    if not found:
        return None
    src, dst, proto, l4, later = found
    sport = dport = -1
    if proto in WITH_PORTS and not later and len(frame) >= l4 + 4:
        sport = int.from_bytes(frame[l4 : l4 + 2], "big")
        dport = int.from_bytes(frame[l4 + 2 : l4 + 4], "big")
    return Headers(
        frame[:6], frame[6:12], frame[12 : at - 2], at, l4, src, dst, proto, sport, dport
    )


def _read4(frame: bytes, at: int) -> tuple[bytes, bytes, int, int, bool] | None:
    """(source, destination, protocol, where it begins, whether it is a later fragment)."""
    if len(frame) < at + 20 or frame[at] >> 4 != 4:
        return None
    later = bool(int.from_bytes(frame[at + 6 : at + 8], "big") & 0x1FFF)
    l4 = at + (frame[at] & 15) * 4
    return frame[at + 12 : at + 16], frame[at + 16 : at + 20], frame[at + 9], l4, later


def _read6(frame: bytes, at: int) -> tuple[bytes, bytes, int, int, bool] | None:
    """The same."""
    if len(frame) < at + 40 or frame[at] >> 4 != 6:
        return None
    proto, l4 = frame[at + 6], at + 40
    for _ in range(_MOST_EXTENSIONS):
        if proto not in _EXTENSIONS or len(frame) < l4 + 8:
            break
        head, proto = proto, frame[l4]
        if head != _FRAGMENT:
            l4 += (frame[l4 + 1] + 1) * 8
            continue
        if int.from_bytes(frame[l4 + 2 : l4 + 4], "big") & 0xFFF8:
            return frame[at + 8 : at + 24], frame[at + 24 : at + 40], proto, l4, True
        l4 += 8
    return frame[at + 8 : at + 24], frame[at + 24 : at + 40], proto, l4, False


def reply_to(sent: bytes) -> bytes | None:
    """What its receiver might say to a plain packet, or to an echo request; None for others."""
    h = read(sent)
    if not h or h.tags or h.l4 - h.at != (20 if len(h.src) == 4 else 40):
        return None
    addresses = h.l4 - 2 * len(h.src) if len(h.src) == 4 else h.at + 8
    middle = sent[addresses + 2 * len(h.src) : h.l4]
    body = bytearray(sent[h.l4 :])
    if h.sport >= 0:
        body[:4] = body[2:4] + body[:2]
        where = SAYS_AT.get(h.proto, len(body))
        if where < len(body):
            body[where] = NEXT[h.proto].get(body[where], body[where])
    elif h.proto in ICMPS and bytes(body[:2]) in {b"\x08\0", b"\x80\0"}:
        body[0] = 0 if h.proto == 1 else 129
    else:
        return None
    return h.by + h.to + sent[12:addresses] + h.dst + h.src + middle + bytes(body)


def error_about(sent: bytes) -> bytes | None:
    """What a router might say of a plain packet: that it is too big."""
    h = read(sent)
    if not h or h.tags or h.sport < 0:
        return None
    quoted = sent[h.at : h.l4 + 8]
    if len(h.src) == 4:
        header = b"\x45\0" + (28 + len(quoted)).to_bytes(2, "big") + b"\0\0\0\0\x40\x01\0\0"
        icmp = b"\x03\x04\0\0\0\0\x05\0"
    else:
        header = b"\x60\0\0\0" + (8 + len(quoted)).to_bytes(2, "big") + b"\x3a\x40"
        icmp = b"\x02\0\0\0\0\0\x05\0"
    return h.by + h.to + sent[12:14] + header + ROUTER[len(h.src)] + h.src + icmp + quoted
