# SPDX-License-Identifier: Apache-2.0
"""Floods: many packets of one kind through a balancer, each of another client."""

from __future__ import annotations

from pathlib import Path
from typing import Self

import numpy as np
from scapy.layers.inet6 import IPv6ExtHdrFragment
from scapy.packet import Packet, Raw

from shunt.kern.maps import Map, MapSpec
from shunt.kern.objects import Object
from shunt.kern.testrun import run_xdp
from tests.packets.balancer import UDP
from tests.packets.frames import ETH, ether, ip, tcp, udp

SOURCE = {4: "10.0.0.0", 6: "2001:db8:f::"}
SEGMENTS = {"SYN": "S", "stray ACK": "A"}
KINDS = (*SEGMENTS, "UDP", "first fragments", "later fragments")
_FRAME = 96  # bytes; as in flood.bpf.c
_PROG_ARRAY = 3
_U4 = np.dtype("<u4")
# Where a frame has the low 24 bits of its source, and its ports.
_HOST, _PORT = {4: 27, 6: 35}, {4: ETH + 20, 6: ETH + 40}


def frame_of(kind: str, version: int, vip: str, port: int) -> tuple[bytes, int, int]:
    """A frame; and where in it are the source port and the datagram's identifier (0: nowhere)."""
    source, ports, ident = SOURCE[version], _PORT[version], 0
    packet: Packet
    header: Packet
    if kind in SEGMENTS:
        packet = tcp(source, vip, SEGMENTS[kind], dport=port)
    elif kind == "UDP":
        packet = udp(source, vip, dport=port)
    else:
        first = kind == "first fragments"
        body, at = bytes(udp(source, vip, dport=port))[ports:], 0 if first else 9
        if version == 4:
            header, ident = ip(source, vip, proto=UDP, flags="MF" if first else "", frag=at), 18
        else:
            part = IPv6ExtHdrFragment(nh=UDP, m=first, offset=at)
            header, ident, ports = ip(source, vip) / part, ports + 6, ports + 8
        packet, ports = ether(header / Raw(body)), ports if first else 0
    short = _FRAME - len(packet)
    frame = bytes(packet / Raw(bytes(short)))
    assert len(frame) == _FRAME
    return frame, ports, ident


class Flooder:
    """The program that makes them, loaded."""

    def __init__(self) -> None:
        self.object = Object(Path(__file__).with_name("flood.bpf.o"))
        self.object.load()
        self._flood = self.object.variable(".bss", "flood")
        # The kernel keeps no types with an array of programs.
        spec = MapSpec("target", _PROG_ARRAY, _U4, _U4, 1, 0)
        self._target = Map(self.object.maps["target"].fd, spec)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.object.close()

    def send(
        self, fd: int, kind: str, vip: str, packets: int, *, port: int = 80, first: int = 0
    ) -> None:
        """Through a program. `first`: which client begins; equal floods are equal by packets."""
        version = 6 if ":" in vip else 4
        frame, ports, ident = frame_of(kind, version, vip, port)
        self._flood["number"], self._flood["host_at"] = first, _HOST[version]
        self._flood["port_at"], self._flood["id_at"] = ports, ident
        self._flood["frame"][: len(frame)] = np.frombuffer(frame, np.uint8)
        self._target.update(0, np.array(fd, _U4))
        ran = run_xdp(self.object.programs["shunt_flood"].fd, frame, repeat=packets)
        assert ran.verdict, "XDP_ABORTED: the frame could not be made"
