# SPDX-License-Identifier: Apache-2.0
"""A backend's programs, loaded: for what comes in and for answers, on the same maps."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Any, Self

from scapy.contrib.geneve import GENEVE, GeneveOptions
from scapy.layers.inet import UDP
from scapy.layers.inet6 import IPv6ExtHdrFragment
from scapy.packet import Packet, Raw

from shunt.kern.libbpf import XDP_DROP, XDP_PASS
from shunt.kern.objects import Object
from shunt.kern.testrun import run_tc, run_xdp
from shunt.xdp import decap, decap_config
from tests.packets.balancer import TCP, mapped
from tests.packets.frames import ETH, either, ether, ip, udp, verify

with Object(decap.OBJECT) as _object:
    Reason: Any = _object.btf.enum("decap_reason", "DECAP_")
    Way: Any = _object.btf.enum("way_flag", "WAY_")

TC_ACT_UNSPEC, TC_ACT_SHOT = -1, 2
S = 1_000_000_000
OWN = {4: "10.9.0.254", 6: "fd09::fe"}
SOURCE = {4: "198.18.77.88", 6: "100::dead:beef"}
VIP = {4: "203.0.113.1", 6: "2001:db8:a::1"}
OTHER_VIP = {4: "203.0.113.2", 6: "2001:db8:a::2"}
CLIENT = {4: "192.0.2.1", 6: "2001:db8:c::1"}
PORT, OWN_PORT = 80, 8080
ETHERTYPE = {4: 0x0800, 6: 0x86DD}
OUTER_BYTES = {4: 20 + 8 + 8 + 24, 6: 40 + 8 + 8 + 24}


@dataclass(frozen=True)
class Out:
    """What became of a frame, and what it added to the counters."""

    verdict: int
    data: bytes
    reasons: dict[Any, int]

    @property
    def packet(self) -> Packet:
        """Every length and checksum in it verified."""
        return verify(self.data)


class BackendNode:
    """`lives`: seconds, by the fields of struct way_lives."""

    def __init__(
        self,
        addresses: Sequence[str] = tuple(OWN.values()),
        flows: int = 1024,
        **lives: float,
    ) -> None:
        sources = tuple(map(ip_network, decap_config.default_sources()))
        own = tuple(map(ip_address, addresses))
        self.object, self.answers = Object(decap.OBJECT), Object(decap.ANSWER_OBJECT)
        for each in (self.object, self.answers):
            config = each.variable(".rodata", "config")
            decap_config.configure(config, sources, own)
            for name, seconds in lives.items():
                config["lives"][f"{name}_ns"] = int(seconds * S)
        decap.load(self.object, self.answers, "a test's node", None, flows)

    def empty(self) -> None:
        """As it was when it was loaded, which takes a hundred times as long."""
        maps = {**self.object.maps, **self.answers.maps}
        for name in (*decap.KEPT, "answers"):
            maps[name].delete_many(maps[name].items()[0])

    def close(self) -> None:
        self.answers.close()
        self.object.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _counts(self) -> Any:
        return self.object.maps[decap.COUNTERS].totals()["packets"]

    def _out(self, before: Any, verdict: int, data: bytes) -> Out:
        added = self._counts() - before
        return Out(verdict, data, {Reason(i): int(n) for i, n in enumerate(added) if n})

    def receive(self, packet: Packet | bytes) -> Out:
        """One frame from the network."""
        before = self._counts()
        ran = run_xdp(self.object.programs[decap.PROGRAM].fd, bytes(packet))
        return self._out(before, ran.verdict, ran.data)

    def send(self, packet: Packet | bytes) -> Out:
        """One frame on its way to the network."""
        before = self._counts()
        ran = run_tc(self.answers.programs[decap.ANSWER_PROGRAM].fd, bytes(packet))
        return self._out(before, ran.verdict, ran.data)

    def opened(self, packet: Packet | bytes) -> bytes:
        """What the stack gets."""
        out = self.receive(packet)
        assert (out.verdict, out.reasons) == (XDP_PASS, {Reason.UNWRAPPED: 1})
        verify(out.data)
        return out.data[ETH:]

    def ways(self) -> list[Any]:
        """What is remembered. Shape: values, struct way_val."""
        decap.sweep(os.dup(self.object.programs[decap.SWEEP_PROGRAM].fd))
        return list(self.object.maps[decap.FLOWS].items()[1])

    def forgets(self, flows: int, within_s: float = 30) -> bool:
        """Whether so many flows are left, soon or later."""
        deadline = time.monotonic() + within_s
        while len(self.ways()) != flows:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True


def geneve(
    outer: int,
    frame: Packet,
    vip: str,
    port: int = PORT,
    *,
    src: str = "",
    dst: str = "",
    tos: int = 0,
    option: dict[str, Any] | None = None,
    header: dict[str, Any] | None = None,
    datagram: dict[str, Any] | None = None,
    **envelope: Any,
) -> Packet:
    """As a balancer sends it, around what `frame` has. The rest are scapy's own fields."""
    inner = bytes(frame)[ETH:]
    data = mapped(vip).tobytes() + port.to_bytes(2, "big") + bytes(2)
    fields: dict[str, Any] = {"classid": 0xFF53, "type": 0x81, "length": 5, "data": data}
    options = GeneveOptions(**{**fields, **(option or {})})
    ethertype = ETHERTYPE[inner[0] >> 4] if inner else 0x0800
    fields = {"critical": 1, "proto": ethertype, "options": [options]}
    tunnel = GENEVE(**{**fields, **(header or {})})
    fields = {"sport": 50000, "dport": 6081, "chksum": 0}
    port_header = UDP(**{**fields, **(datagram or {})})
    envelope.setdefault("proto" if outer == 4 else "nh", 17)
    around = ip(src or SOURCE[outer], dst or OWN[outer], tos=tos, **envelope)
    return ether(around / port_header / tunnel / Raw(inner))


def sent(inner: int, outer: int = 0, proto: int = TCP, vip: str = "", **fields: Any) -> Packet:
    """A client's packet as the balancer sends it on."""
    outer, vip = outer or inner, vip or VIP[inner]
    to = OWN[inner] if inner == outer else vip
    fields.setdefault("dport", OWN_PORT)
    return geneve(outer, either(proto, CLIENT[inner], to, **fields), vip)


def reply(version: int, proto: int = TCP, **fields: Any) -> Packet:
    fields = {"sport": OWN_PORT, "dport": 40000, **fields}
    if proto == TCP:
        fields.setdefault("flags", "SA")
    return either(proto, OWN[version], CLIENT[version], **fields)


def answered(out: Out) -> Packet:
    assert (out.verdict, out.reasons) == (TC_ACT_UNSPEC, {Reason.ANSWERED: 1})
    return out.packet


def fragment(
    version: int, src: str, dst: str, sport: int, dport: int, start: int, more: bool
) -> Packet:
    """Of one datagram of 800 bytes, two halves; its checksum is right for these addresses."""
    whole = udp(src, dst, sport=sport, dport=dport, payload=b"q" * 792)
    body = bytes(whole)[ETH + (20 if version == 4 else 40) :][start : start + 400]
    if version == 4:
        header = ip(src, dst, proto=17, flags="MF" if more else "", frag=start // 8, id=9)
    else:
        header = ip(src, dst) / IPv6ExtHdrFragment(nh=17, offset=start // 8, m=int(more), id=9)
    return ether(header / Raw(body))


def refused(out: Out, reason: Any) -> None:
    assert (out.verdict, out.reasons) == (XDP_DROP, {reason: 1})


def passed(node: BackendNode, packet: Packet | bytes) -> Any:
    out = node.receive(packet)
    assert (out.verdict, out.data) == (XDP_PASS, bytes(packet))
    (reason,) = out.reasons
    return reason


def leaves_alone(node: BackendNode, packet: Packet) -> None:
    out = node.send(packet)
    assert (out.verdict, out.data, out.reasons) == (TC_ACT_UNSPEC, bytes(packet), {})
