# SPDX-License-Identifier: Apache-2.0
"""Services of mode nat whose backends are of the other family than their clients."""

from __future__ import annotations

from collections.abc import Callable

import dpkt
import pytest
from scapy.layers.inet import IP, IPOption_LSRR
from scapy.packet import Packet

from tests.packets.balancer import OWN4, OWN6, TCP, Balancer, Out, Service
from tests.packets.frames import network, tcp

CLIENT = {4: "192.0.2.1", 6: "2001:db8:c::1"}
VIP = {4: "203.0.113.1", 6: "2001:db8:a::1"}
BACKEND = {4: "10.0.0.1", 6: "fd00::1"}
OWN = {4: OWN4, 6: OWN6}
OTHER = {4: 6, 6: 4}
HEADER = {4: 20, 6: 40}
ENDS = {version: (CLIENT[version], VIP[version]) for version in (4, 6)}

clients = pytest.mark.parametrize("client", [4, 6], ids=["4to6", "6to4"])


def serve(lb: Balancer, client: int, proto: int, port: int = 0) -> Service:
    """A VIP of the client's family, and one backend of the other."""
    return lb.add_service(
        VIP[client],
        proto=proto,
        mode="nat",
        backends=[BACKEND[OTHER[client]]],
        backend_port=port,
    )


def fragment(make_lb: Callable[..., Balancer]) -> Out:
    """The first of several, for a backend of the other family."""
    lb = make_lb()
    serve(lb, 4, TCP)
    packet = tcp(*ENDS[4])
    packet.payload.flags = "MF"
    return lb.run(packet)


def source_route(make_lb: Callable[..., Balancer]) -> Out:
    """Routers that a packet has still to see."""
    lb = make_lb()
    serve(lb, 4, TCP)
    packet = tcp(*ENDS[4])
    packet.payload.options = [IPOption_LSRR(routers=["192.0.2.9"], pointer=4)]
    return lb.run(packet)


def hops(packet: Packet) -> int:
    """TTL, or hop limit."""
    header = network(packet)
    return int(header.ttl if IP in packet else header.hlim)


def rebuilt(frame: bytes) -> bytes:
    """The frame, its checksums computed anew by dpkt."""
    ethernet = dpkt.ethernet.Ethernet(frame)
    packet = ethernet.data
    if isinstance(packet, dpkt.ip.IP):
        packet.sum = 0
    packet.data.sum = 0
    return bytes(ethernet)
