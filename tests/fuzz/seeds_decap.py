# SPDX-License-Identifier: Apache-2.0
"""Whole frames for a backend's node: wrapped in every way, bare, and its answers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

from scapy.layers import inet
from scapy.layers.inet import ICMP, IP, IPOption_NOP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
)
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw

from tests.fuzz.headers import IPIPS, TCP, UDP
from tests.fuzz.target import Step
from tests.packets.backend_node import (
    CLIENT,
    OTHER_VIP,
    OWN,
    OWN_PORT,
    SOURCE,
    VIP,
    fragment,
    geneve,
    reply,
    sent,
)
from tests.packets.frames import OWN_MAC, ROUTER_MAC, either, ether, ip, tcp

RECEIVE, ANSWER = 0, 1
NUMBER = {4: 4, 6: 41}
assert set(NUMBER.values()) == set(IPIPS.values())


@cache
def node() -> tuple[Step, ...]:
    """For both hooks."""
    received = ((RECEIVE, bytes(frame)) for frame in _received())
    return (*received, *((ANSWER, bytes(frame)) for frame in _answers()))


def _received() -> Iterator[Packet]:
    for port in range(50000, 50017):  # more than a small node remembers
        yield sent(4, sport=port)
    yield Ether(src=ROUTER_MAC, dst=OWN_MAC) / ARP()
    for inner, outer in product((4, 6), (4, 6)):
        for proto in (TCP, UDP):
            plain = either(proto, CLIENT[inner], VIP[inner], payload=b"odd")
            for tos in (0, 1, 3):
                yield wrapped(outer, plain, tos=tos)
            yield wrapped(outer, plain, src=CLIENT[outer])
            yield sent(inner, outer, proto)
            yield sent(inner, outer, proto, vip=OTHER_VIP[inner])
            yield sent(inner, outer, proto, sport=40001)
            yield geneve(outer, plain, VIP[inner], tos=3)
            yield geneve(outer, plain, VIP[inner], option={"type": 0x82})
        for flags in ("A", "FA", "R"):
            yield sent(inner, outer, flags=flags)
        yield geneve(outer, ether(ip(CLIENT[inner], OWN[inner]) / ICMP()), VIP[inner])
        yield geneve(outer, error(inner, OWN[inner]), VIP[inner])
        for start, more in ((0, True), (400, False)):
            part = fragment(inner, CLIENT[inner], OWN[inner], 40000, OWN_PORT, start, more)
            yield geneve(outer, part, VIP[inner])
    yield from _odd()


def _odd() -> Iterator[Packet]:
    """Fragments and options of the outer packet; and what is not wrapped at all."""
    plain = {v: Raw(bytes(tcp(CLIENT[v], VIP[v]))[14:]) for v in (4, 6)}
    outer: dict[str, Any] = {"src": SOURCE[4], "dst": OWN[4], "proto": 4}
    yield ether(IP(**outer, flags="MF") / plain[4])
    yield ether(IP(**outer, options=[IPOption_NOP()] * 4) / plain[4])
    six = IPv6(src=SOURCE[6], dst=OWN[6])
    yield ether(six / IPv6ExtHdrFragment(nh=41, m=1) / plain[6])
    yield ether(six / IPv6ExtHdrDestOpt(nh=41) / plain[6])
    for version in (4, 6):
        for proto in (TCP, UDP):
            for port in (40000, 40009):
                yield either(proto, CLIENT[version], OWN[version], sport=port, dport=OWN_PORT)


def wrapped(outer: int, frame: Packet, *, src: str = "", tos: int = 0) -> Packet:
    """IP in IP."""
    inner = bytes(frame)[14:]
    proto = {"proto" if outer == 4 else "nh": NUMBER[inner[0] >> 4]}
    return ether(ip(src or SOURCE[outer], OWN[outer], tos=tos, **proto) / Raw(inner))


def error(version: int, to: str) -> Packet:
    """About what the backend has sent a client."""
    router = {4: "198.51.100.1", 6: "2001:db8:d::1"}[version]
    quoted = Raw(bytes(tcp(to, CLIENT[version], "A", sport=OWN_PORT, dport=40000))[14:])
    if version == 4:
        return ether(IP(src=router, dst=to) / ICMP(type=3, code=4, nexthopmtu=1280) / quoted)
    return ether(IPv6(src=router, dst=to) / ICMPv6DestUnreach() / quoted)


def _answers() -> Iterator[Packet]:
    for version in (4, 6):
        own, client = OWN[version], CLIENT[version]
        for flags in ("SA", "A", "FA", "R"):
            yield reply(version, flags=flags)
        yield reply(version, UDP, payload=b"answer")
        yield reply(version, dport=40009)
        for source, port in ((VIP[version], 80), (own, OWN_PORT)):
            syn_ack = inet.TCP(sport=port, dport=40000, flags="SA", options=[("MSS", 1460)])
            yield ether(ip(source, client) / syn_ack)
        for start, more in ((0, True), (400, False)):
            yield fragment(version, own, client, OWN_PORT, 40000, start, more)
        quoted = Raw(bytes(tcp(client, own, sport=40000, dport=OWN_PORT))[14:])
        for source in (own, client):
            if version == 4:
                yield ether(IP(src=source, dst=client) / ICMP(type=3, code=3) / quoted)
            else:
                yield ether(IPv6(src=source, dst=client) / ICMPv6DestUnreach() / quoted)
