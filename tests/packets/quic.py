# SPDX-License-Identifier: Apache-2.0
"""QUIC datagrams, as far as a balancer looks at them; and where they belong, in plain Python."""

from __future__ import annotations

from collections.abc import Mapping

V1, V2, DRAFT = 0x00000001, 0x6B3343CF, 0xFF00001D
# The types of long headers, by version (RFC 9000, 17.2; RFC 9369, 3.2).
INITIAL = {V1: 0, V2: 1}
ZERO_RTT = {V1: 1, V2: 2}
HANDSHAKE = {V1: 2, V2: 3}


def connection_id(server: bytes, config: int = 0, nonce: bytes = b"nonce") -> bytes:
    """As a server makes one."""
    return bytes((config << 5 | len(server + nonce),)) + server + nonce


def short(dcid: bytes, rest: bytes = bytes(20)) -> bytes:
    """A packet of an established connection."""
    return b"\x40" + dcid + rest


def long(dcid: bytes, version: int = V1, kind: int = 0, rest: bytes = bytes(40)) -> bytes:
    """A packet of the handshake; `kind` is the number of its type."""
    head = bytes((0xC0 | kind << 4,)) + version.to_bytes(4, "big")
    return head + bytes((len(dcid),)) + dcid + b"\x08clientid" + rest


def named(
    payload: bytes, config: int, server_bytes: int, nonce_bytes: int, servers: Mapping[bytes, str]
) -> tuple[str | None, bool]:
    """(the backend that a datagram's connection id names, whether a server made the id)."""
    certain = False
    if len(payload) < 7:
        return None, certain
    if payload[0] < 0x80:
        dcid, certain = payload[1:], True
    else:
        version, kind = int.from_bytes(payload[1:5], "big"), payload[0] >> 4 & 3
        certain = HANDSHAKE.get(version) == kind
        dcid = payload[6 : 6 + payload[5]]
        if len(dcid) < payload[5]:
            return None, certain
    if len(dcid) < 1 + server_bytes + nonce_bytes or dcid[0] >> 5 != config:
        return None, certain
    return servers.get(dcid[1 : 1 + server_bytes]), certain
