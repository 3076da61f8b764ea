# SPDX-License-Identifier: Apache-2.0
"""Whole frames for TC: clients', pods' on their way out, backends' answers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from ipaddress import ip_address
from typing import Any

from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrFragment,
)
from scapy.packet import Packet, Raw

from tests.fuzz import headers, seeds
from tests.fuzz.served import CLIENTS, PORT, Served, services
from tests.fuzz.target import Step
from tests.packets.frames import CHUNKS, either, ether, sctp, tcp, udp
from tests.packets.test_tc_masquerade import POD, SOURCES, WORLD

TAGS = headers.TAGS
INGRESS, EGRESS = 0, 1
MODES = ("local", "nat", "nat46")
PROTOS = (headers.TCP, headers.UDP, headers.SCTP)
TRACED = {"settled", "moving"}  # whose replies are among the seeds


def is_pod(address: bytes) -> bool:
    """Whether who has it is masqueraded."""
    found = ip_address(address)
    return any(found.version == net.version and found in net for net in SOURCES)


@cache
def translator() -> tuple[Step, ...]:
    """For both hooks."""
    return tuple((hook, bytes(frame)) for hook, frame in _translator())


def _translator() -> Iterator[tuple[int, Packet]]:
    yield from ((INGRESS, frame) for frame in seeds.many(seeds.MOVING_VIP))
    for served in services(MODES, PROTOS):
        yield from ((INGRESS, frame) for frame in seeds.for_service(served))
        if served.state in TRACED and served.mode == "local":
            for address in served.addresses:
                yield from ((EGRESS, frame) for frame in replies(served, address))
                yield from to_a_backend(served, address)
    for version in (4, 6):
        for proto in PROTOS:
            yield from ((EGRESS, frame) for frame in from_a_pod(version, proto))
        yield from ((EGRESS, frame) for frame in odd_from_a_pod(version))


def replies(served: Served, backend: str) -> Iterator[Packet]:
    """To the client's packets, by the way that a local backend's take."""
    client = CLIENTS[served.version][0]
    ends: dict[str, Any] = {"sport": PORT, "dport": 40000}
    if served.proto == headers.TCP:
        for flags in ("SA", "A", "FA", "R"):
            yield tcp(backend, client, flags, **ends)
    elif served.proto == headers.UDP:
        yield udp(backend, client, payload=b"answer", **ends)
    else:
        for chunks in CHUNKS:
            yield sctp(backend, client, chunks, **ends)
    quoted = bytes(either(served.proto, client, backend, sport=40000, dport=PORT))[14:]
    for source in (backend, seeds.ROUTER[served.version]):
        if served.version == 4:
            yield ether(IP(src=source, dst=client) / ICMP(type=3, code=3) / Raw(quoted))
        else:
            yield ether(IPv6(src=source, dst=client) / ICMPv6DestUnreach() / Raw(quoted))


def to_a_backend(served: Served, backend: str) -> Iterator[tuple[int, Packet]]:
    """A client's packet as it leaves for one elsewhere; the client's own to the backend itself; and
    the backend's, to its service."""
    client = CLIENTS[served.version][0]
    direct = either(served.proto, client, backend, sport=40000, dport=PORT)
    yield EGRESS, direct
    yield INGRESS, direct
    yield INGRESS, either(served.proto, backend, served.vip, sport=40007, dport=PORT)
    back = either(served.proto, backend, served.vip, sport=PORT, dport=40007)
    yield INGRESS, back


def from_a_pod(version: int, proto: int) -> Iterator[Packet]:
    """To the world."""
    pod, world = POD[version], WORLD[version]
    for port in (40000, 40001):
        yield either(proto, pod, world, sport=port, dport=443)
    if proto == headers.TCP:
        for flags in ("A", "FA", "R"):
            yield tcp(pod, world, flags, dport=443)
    elif proto == headers.SCTP:
        for chunks in CHUNKS:
            yield sctp(pod, world, chunks, dport=443)
    yield either(proto, pod, seeds.ROUTER[version], dport=10001)


def odd_from_a_pod(version: int) -> Iterator[Packet]:
    """Echo requests, fragments, errors."""
    pod, world = POD[version], WORLD[version]
    whole, half = Raw(bytes(64)), UDP(sport=1, dport=443, len=400)
    if version == 4:
        yield ether(IP(src=pod, dst=world) / ICMP(id=7) / Raw(b"ping"))
        yield ether(IP(src=pod, dst=world, flags="MF", id=9) / half / whole)
        yield ether(IP(src=pod, dst=world, frag=9, id=9, proto=17) / whole)
        yield ether(IP(src=pod, dst=world, frag=9, id=10, proto=17) / whole)
        inner = IP(src=world, dst=pod) / UDP(sport=443, dport=1)
        yield ether(IP(src=pod, dst=world) / ICMP(type=3, code=3) / inner)
    else:
        yield ether(IPv6(src=pod, dst=world) / ICMPv6EchoRequest(id=7, data=b"ping"))
        yield ether(IPv6(src=pod, dst=world) / IPv6ExtHdrFragment(id=9, m=1) / half / whole)
        for number in (9, 10):
            later = IPv6ExtHdrFragment(id=number, offset=9, nh=17)
            yield ether(IPv6(src=pod, dst=world) / later / whole)
        inner6 = IPv6(src=world, dst=pod) / UDP(sport=443, dport=1)
        yield ether(IPv6(src=pod, dst=world) / ICMPv6TimeExceeded() / inner6)
