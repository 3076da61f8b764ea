# SPDX-License-Identifier: Apache-2.0
"""The real TC programs, loaded, with tables that a test writes by hand; see balancer.py."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from scapy.packet import Packet

from shunt.kern.libbpf import TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC
from shunt.kern.objects import Object
from shunt.kern.testrun import run_tc
from tests.packets.balancer import TCP, UDP, Balancer, Out, Reason, Service
from tests.packets.frames import either, network, transport, verify

OBJECT = Path(__file__).resolve().parents[2] / "tc/translate.bpf.o"
NEXT, SHOT, REDIRECT = TC_ACT_UNSPEC, TC_ACT_SHOT, TC_ACT_REDIRECT

with Object(OBJECT) as _object:
    Track: Any = _object.btf.enum("nat_track", "NAT_")

# By IP version: the client, the VIP, and backends here and elsewhere.
CLIENT = {4: "192.0.2.1", 6: "2001:db8:c::1"}
VIP = {4: "203.0.113.1", 6: "2001:db8:a::1"}
BACKENDS = {4: ("10.0.0.1", "10.0.0.2"), 6: ("fd00::1", "fd00::2")}
# By mode: what becomes of a translated packet, to a backend on this node or to another.
WAY = {"local": NEXT, "nat": REDIRECT}

FAMILIES = pytest.mark.parametrize("ip", [4, 6])
MODES = pytest.mark.parametrize("mode", list(WAY))
PROTOS = pytest.mark.parametrize("proto", [TCP, UDP], ids=["tcp", "udp"])


class Translator(Balancer):
    """`run` is a packet's way in, `leave` its way out."""

    path = OBJECT

    def run(self, packet: Packet | bytes, program: int = -1, mark: int = 0) -> Out:
        """One packet through the program of the way in (or another)."""
        fd = program if program >= 0 else self.object.programs["shunt_ingress"].fd
        return self._counting(lambda: run_tc(fd, bytes(packet), mark))

    def leave(self, packet: Packet | bytes, mark: int = 0) -> Out:
        """One packet on its way out."""
        return self.run(packet, self.object.programs["shunt_egress"].fd, mark)

    def add_veth(self, ifindex: int) -> None:
        """A device whose other end, in another namespace, may be handed packets."""
        sets = self.map("veth_sets").mapped()["ifindex"]
        sets[ifindex % len(sets), 0] = ifindex

    def add_service(
        self,
        vip: str,
        port: int = 80,
        proto: int = TCP,
        mode: str = "local",
        backends: Sequence[str] = (),
        **options: Any,
    ) -> Service:
        """As in the balancer; replies of backends here are looked for, too."""
        service = super().add_service(vip, port, proto, mode, backends, **options)
        self.open_port(proto, options.get("backend_port") or port)
        return service


def answer(sent: Out, flags: str = "SA", payload: bytes = b"", proto: int = TCP) -> Packet:
    """What the backend says to a packet that it got."""
    ip, header = network(sent.packet), transport(sent.packet)
    fields: dict[str, Any] = {"sport": header.dport, "dport": header.sport, "payload": payload}
    if proto == TCP:
        fields["flags"] = flags
    return either(proto, ip.dst, ip.src, **fields)


def returned(program: Balancer, mode: str, reply: Packet | bytes) -> Out:
    """A backend's answer, by its way: of mode local it leaves this node, else it comes in."""
    if isinstance(program, Translator) and mode == "local":
        return program.leave(reply)
    return program.run(reply)


def tuple_of(packet: Packet) -> tuple[str, int, str, int]:
    """Source and destination."""
    ip, header = network(packet), transport(packet)
    return ip.src, header.sport, ip.dst, header.dport


@cache
def tuple_in(frame: bytes) -> tuple[str, int, str, int]:
    """The same of a frame, which must be right: for who sees it often."""
    return tuple_of(verify(frame))


def expect(out: Out, verdict: int, reason: str) -> None:
    """A verdict and the one reason that was counted."""
    assert (out.verdict, out.reasons) == (verdict, {Reason[reason]: 1})
