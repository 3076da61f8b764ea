# SPDX-License-Identifier: Apache-2.0
"""The decap program: what it unwraps, what it leaves alone, and that it says why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from ipaddress import ip_network
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop
from scapy.layers.l2 import ARP, GRE, Ether
from scapy.packet import Packet, Raw

from shunt.kern.libbpf import XDP_DROP, XDP_PASS
from shunt.kern.objects import Object
from shunt.kern.testrun import run_xdp
from shunt.xdp import decap, decap_config
from tests.packets import balancer
from tests.packets.balancer import Balancer, Out
from tests.packets.frames import ETH, OWN_MAC, ROUTER_MAC, either, ether, ip, network, tcp, verify
from tests.packets.private import FORWARDING, in_namespace

with Object(decap.OBJECT) as _object:
    Reason: Any = _object.btf.enum("decap_reason", "DECAP_")

INNER = {4: ("192.0.2.1", "203.0.113.1"), 6: ("2001:db8:c::1", "2001:db8:a::1")}
SOURCE = {4: "198.18.77.88", 6: "100::dead:beef"}
BACKEND = {4: "10.9.0.254", 6: "fd09::fe"}
NUMBER = {4: 4, 6: 41}
ETHERTYPE = {4: 0x0800, 6: 0x86DD}

combinations = pytest.mark.parametrize(
    ("inner", "outer"), [(4, 4), (6, 6), (4, 6), (6, 4)], ids=["4in4", "6in6", "4in6", "6in4"]
)
versions = pytest.mark.parametrize("version", [4, 6])


class Decap:
    """The loaded program."""

    def __init__(self, sources: Sequence[str] = ()) -> None:
        self.object = Object(decap.OBJECT)
        accepted = tuple(map(ip_network, sources)) or decap_config.default_sources()
        decap_config.configure(self.object.variable(".rodata", "config"), accepted)
        self.object.load()

    def run(self, packet: Packet | bytes) -> Out:
        counters = self.object.maps[decap.COUNTERS]
        before = counters.totals()
        ran = run_xdp(self.object.programs[decap.PROGRAM].fd, bytes(packet))
        added = counters.totals()["packets"] - before["packets"]
        size = int((counters.totals()["bytes"] - before["bytes"]).sum())
        assert size == len(packet), "bytes are those of the frame as it came"
        return Out(ran.verdict, ran.data, {Reason(i): int(n) for i, n in enumerate(added) if n}, {})

    def unwrapped(self, packet: Packet | bytes) -> Packet:
        out = self.run(packet)
        assert out.said == (XDP_PASS, {Reason.UNWRAPPED: 1})
        return out.packet

    def passed(self, packet: Packet | bytes) -> Any:
        """The reason of a frame that must be left as it came."""
        out = self.run(packet)
        assert out.verdict == XDP_PASS
        assert out.data == bytes(packet)
        assert list(out.reasons.values()) == [1]
        return next(iter(out.reasons))


@pytest.fixture
def make() -> Iterator[Callable[..., Decap]]:
    made: list[Decap] = []

    def build(sources: Sequence[str] = ()) -> Decap:
        made.append(Decap(sources))
        return made[-1]

    yield build
    for program in made:
        program.object.close()


@pytest.fixture
def program(make: Callable[..., Decap]) -> Decap:
    return make()


def envelope(
    outer: int, inner: int, *, src: str = "", dst: str = "", tos: int = 0, **fields: Any
) -> Packet:
    """The outer header. `fields` are scapy's own."""
    number = {"proto" if outer == 4 else "nh": NUMBER[inner]}
    return ip(src or SOURCE[outer], dst or BACKEND[outer], tos=tos, **{**number, **fields})


def content(inner: int, proto: int = balancer.TCP, **fields: Any) -> Packet:
    fields.setdefault("payload", b"hello")
    return network(either(proto, *INNER[inner], **fields))


def wrapped(outer: int, inner: int, **fields: Any) -> Packet:
    return ether(envelope(outer, inner, **fields) / content(inner))


@combinations
@pytest.mark.parametrize("proto", [balancer.TCP, balancer.UDP])
@pytest.mark.parametrize("size", [0, 1, 1400])
def test_the_inner_packet_comes_out_as_it_went_in(
    inner: int, outer: int, proto: int, size: int, program: Decap
) -> None:
    body = content(inner, proto, payload=bytes(size), tos=0xB8, ttl=9)
    out = program.run(ether(envelope(outer, inner) / body))
    assert out.said == (XDP_PASS, {Reason.UNWRAPPED: 1})
    want = Ether(src=ROUTER_MAC, dst=OWN_MAC, type=ETHERTYPE[inner]) / body
    assert out.data == bytes(want)


@combinations
def test_padding_stays_behind(inner: int, outer: int, program: Decap) -> None:
    packet = bytes(wrapped(outer, inner))
    assert program.run(packet + b"\xaa" * 9).data == (program.run(packet).data + b"\xaa" * 9)


@combinations
@pytest.mark.parametrize("proto", [balancer.TCP, balancer.UDP])
def test_what_the_balancer_wraps_comes_out_again(
    inner: int, outer: int, proto: int, lb: Balancer, program: Decap
) -> None:
    lb.add_service(INNER[inner][1], proto=proto, backends=[BACKEND[outer]])
    packet = either(proto, *INNER[inner], payload=b"hello", tos=0x03)
    back = program.run(lb.run(packet).data)
    assert back.reasons == {Reason.UNWRAPPED: 1}
    assert back.data[ETH:] == bytes(packet)[ETH:]


# Which sources ----------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [4, 6])
@pytest.mark.parametrize(
    ("source", "accepted"),
    [
        ("198.17.255.255", False),
        ("198.18.0.0", True),
        ("198.18.255.255", True),
        ("198.19.0.0", False),
        ("ff::ffff:ffff:ffff:ffff", False),
        ("100::", True),
        ("100::ffff:ffff:ffff:ffff", True),
        ("100:0:0:1::", False),
        ("::ffff:198.18.0.1", False),
    ],
)
def test_default_sources_are_the_balancers(
    source: str, accepted: bool, inner: int, program: Decap
) -> None:
    outer = 6 if ":" in source else 4
    packet = wrapped(outer, inner, src=source)
    if accepted:
        program.unwrapped(packet)
    else:
        assert program.passed(packet) == Reason.PASS_SOURCE


def test_sources_of_ones_own(make: Callable[..., Decap]) -> None:
    program = make(["10.1.0.0/17", "192.0.2.7/32", "0.0.0.0/32", "2001:db8:4::/47", "fd00::1/128"])
    for source in ("10.1.127.255", "192.0.2.7", "2001:db8:4:9::1", "2001:db8:5::", "fd00::1"):
        program.unwrapped(wrapped(6 if ":" in source else 4, 4, src=source))
    for source in ("10.1.128.0", "192.0.2.8", "198.18.0.1", "2001:db8:6::", "fd00::2", "100::1"):
        packet = wrapped(6 if ":" in source else 4, 4, src=source)
        assert program.passed(packet) == Reason.PASS_SOURCE


def test_a_family_without_sources_is_left_alone(make: Callable[..., Decap]) -> None:
    assert make(["198.18.0.0/16"]).passed(wrapped(6, 4)) == Reason.PASS_SOURCE
    assert make(["100::/64"]).passed(wrapped(4, 6)) == Reason.PASS_SOURCE


@versions
def test_every_source_counts_and_anything_can_be_accepted(
    version: int, make: Callable[..., Decap]
) -> None:
    nets = [f"10.{i}.0.0/16" if version == 4 else f"fd{i:02}::/16" for i in range(8)]
    program = make(nets)
    for i in range(8):
        source = f"10.{i}.3.4" if version == 4 else f"fd{i:02}::5"
        program.unwrapped(wrapped(version, 4, src=source))
    anything = make(["0.0.0.0/0" if version == 4 else "::/0"])
    anything.unwrapped(wrapped(version, 4, src="8.8.8.8" if version == 4 else "2001:db8::8"))
    other = 10 - version
    assert anything.passed(wrapped(other, 4)) == Reason.PASS_SOURCE


# What is left alone -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "packet",
    [
        Ether(src=ROUTER_MAC, dst=OWN_MAC) / ARP(),
        tcp(*INNER[4]),
        tcp(*INNER[6]),
        tcp(SOURCE[4], BACKEND[4]),
        tcp(SOURCE[6], BACKEND[6]),
        ether(ip(SOURCE[4], BACKEND[4]) / ICMP()),
        ether(ip(SOURCE[4], BACKEND[4]) / GRE() / content(4)),
        ether(ip(*INNER[6]) / IPv6ExtHdrHopByHop() / TCP()),
        ether(ip(*INNER[6]) / IPv6ExtHdrFragment(m=1) / UDP()),
    ],
)
def test_ordinary_traffic(packet: Packet, program: Decap) -> None:
    assert program.passed(packet) == Reason.PASS_NOT_TUNNEL


@pytest.mark.parametrize("inner", [4, 6])
def test_outer_fragments_are_the_stacks(inner: int, program: Decap) -> None:
    for fields in ({"flags": "MF"}, {"frag": 100}):
        assert program.passed(wrapped(4, inner, **fields)) == Reason.PASS_FRAGMENT
    fragment = ip(SOURCE[6], BACKEND[6]) / IPv6ExtHdrFragment(m=1, nh=NUMBER[inner])
    assert program.passed(ether(fragment / content(inner))) == Reason.PASS_FRAGMENT


@pytest.mark.parametrize("inner", [4, 6])
def test_outer_options_are_the_stacks(inner: int, program: Decap) -> None:
    options = wrapped(4, inner, options=[IPOption_NOP()] * 4)
    assert program.passed(options) == Reason.PASS_OPTIONS
    # What Linux's own ip6tnl puts there: the tunnel encapsulation limit.
    limit = ip(SOURCE[6], BACKEND[6]) / IPv6ExtHdrDestOpt(nh=NUMBER[inner])
    assert program.passed(ether(limit / content(inner))) == Reason.PASS_OPTIONS


@pytest.mark.parametrize("inner", [4, 6])
def test_a_damaged_outer_header_is_the_stacks(inner: int, program: Decap) -> None:
    size = len(content(inner))
    for fields in ({"chksum": 1}, {"version": 5}, {"ihl": 4}, {"len": 21 + size}, {"len": 19}):
        assert program.passed(wrapped(4, inner, **fields)) == Reason.PASS_MALFORMED
    for fields in ({"version": 4}, {"plen": size + 1}):
        assert program.passed(wrapped(6, inner, **fields)) == Reason.PASS_MALFORMED


@versions
def test_an_inner_packet_that_is_none_is_left_wrapped(version: int, program: Decap) -> None:
    size = len(content(4))
    for wrong in (
        IP(bytes(content(4, version=6))),
        content(4, ihl=4),
        content(4, len=19),
        content(4, len=size + 1),
        content(6),
        Raw(bytes(content(4))[:19]),
        Raw(b""),
    ):
        assert program.passed(ether(envelope(version, 4) / wrong)) == Reason.PASS_INNER
    size = len(content(6))
    for wrong in (
        content(6, version=4),
        content(6, plen=size - 40 + 1),
        content(4),
        Raw(bytes(content(6))[:39]),
    ):
        assert program.passed(ether(envelope(version, 6) / wrong)) == Reason.PASS_INNER


@combinations
def test_a_frame_cut_anywhere_is_left_as_it_is(inner: int, outer: int, program: Decap) -> None:
    whole = bytes(wrapped(outer, inner))
    for length in range(ETH, len(whole)):
        assert program.passed(whole[:length]) == Reason.PASS_MALFORMED
    program.unwrapped(whole)


@combinations
def test_an_outer_length_cut_anywhere_is_noticed(inner: int, outer: int, program: Decap) -> None:
    """The frame is whole; its outer header says that the inner packet is not."""
    body = content(inner)
    for length in range(len(body)):
        total: dict[str, Any] = {"len": 20 + length} if outer == 4 else {"plen": length}
        packet = ether(envelope(outer, inner, **total) / body)
        assert program.passed(packet) == Reason.PASS_INNER


# ECN --------------------------------------------------------------------------------------------

NOT, ECT1, ECT0, CE = range(4)
# RFC 6040, figure 4: inner, outer -> forwarded, or None for drop.
MERGED = {
    **{(NOT, mark): None if mark == CE else NOT for mark in range(4)},
    **{(ECT0, mark): ECT0 if mark == NOT else mark for mark in range(4)},
    **{(ECT1, mark): CE if mark == CE else ECT1 for mark in range(4)},
    **{(CE, mark): CE for mark in range(4)},
}


@combinations
@pytest.mark.parametrize("dscp", [0, 46, 63])
def test_congestion_marks_come_through(inner: int, outer: int, dscp: int, program: Decap) -> None:
    for (own, mark), want in MERGED.items():
        body = content(inner, tos=dscp << 2 | own, payload=b"x" * own)
        out = program.run(ether(envelope(outer, inner, tos=0x48 | mark) / body))
        if want is None:
            assert out.said == (XDP_DROP, {Reason.DROP_CONGESTED: 1})
            continue
        header = network(verify(out.data))
        assert (header.tos if inner == 4 else header.tc) == dscp << 2 | want
        again = content(inner, tos=dscp << 2 | want, payload=b"x" * own)
        assert out.data[ETH:] == bytes(again)


# Whose packet -----------------------------------------------------------------------------------

NETWORK = (
    "link add name a type veth peer name b",
    "link set dev b up",
    "link set dev a up",
    "address add 10.9.0.254/24 dev a",
    "address add fd09::fe/64 dev a nodad",
    "neighbour add 10.9.0.3 lladdr 02:00:00:00:09:03 nud permanent dev a",
    "neighbour add fd09::3 lladdr 02:00:00:00:09:03 nud permanent dev a",
)


@combinations
def test_a_router_unwraps_its_own_only(inner: int, outer: int, program: Decap) -> None:
    """A backend may forward for others, to which the balancer sends packets too."""
    own = wrapped(outer, inner)
    neighbours = wrapped(outer, inner, dst="10.9.0.3" if outer == 4 else "fd09::3")
    unknown = wrapped(outer, inner, dst="10.9.0.4" if outer == 4 else "fd09::4")

    def run() -> None:
        program.unwrapped(own)
        assert program.passed(neighbours) == Reason.PASS_NOT_OURS
        assert program.passed(unknown) == Reason.PASS_NOT_OURS

    in_namespace(run, NETWORK, FORWARDING)


def test_every_reason_is_reached(program: Decap) -> None:
    packets = [
        wrapped(4, 4),
        tcp(*INNER[4]),
        wrapped(4, 4, src="192.0.2.9"),
        wrapped(4, 4, flags="MF"),
        wrapped(4, 4, options=[IPOption_NOP()] * 4),
        wrapped(4, 4, chksum=1),
        ether(envelope(4, 4) / content(6)),
        wrapped(4, 4, tos=CE),
    ]
    reached = [reason for packet in packets for reason in program.run(packet).reasons]
    other = wrapped(6, 6, dst="fd09::3")
    reached += in_namespace(lambda: list(program.run(other).reasons), NETWORK, FORWARDING)
    geneve = {r for r in Reason if r == Reason.PASS_GENEVE or r > Reason.DROP_CONGESTED}
    assert sorted(reached) == sorted(set(Reason) - geneve)


def test_inner_of_ipv6_is_ipv6_for_scapy_too(program: Decap) -> None:
    assert isinstance(network(program.unwrapped(wrapped(4, 6))), IPv6)
    assert isinstance(network(program.unwrapped(wrapped(6, 4))), IP)
