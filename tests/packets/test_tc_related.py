# SPDX-License-Identifier: Apache-2.0
"""TC: ICMP errors and fragments go the way of their flow, translated.

backends here     way in:  client -> VIP          way out:  backend -> client
others (nat),     way in:  client -> VIP, and     backend -> own
and hairpins
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from scapy.layers.inet import ICMP, TCP, IPOption_NOP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from tests.packets import balancer
from tests.packets.balancer import BACKEND_MAC, Event, Out, Reason
from tests.packets.frames import (
    ETH,
    OWN_MAC,
    ROUTER_MAC,
    either,
    ether,
    ip,
    network,
    tcp,
    udp,
)
from tests.packets.test_echo import know_vip, ping
from tests.packets.test_fragments import fragments_of, reassemble
from tests.packets.test_icmp import (
    ROUTER,
    checksums_hold,
    error,
    protos,
    quote_of,
    versions,
)
from tests.packets.test_icmp import tuple_of as quoted_tuple
from tests.packets.translator import (
    BACKENDS,
    CLIENT,
    NEXT,
    REDIRECT,
    SHOT,
    VIP,
    Translator,
    expect,
)

HEADER = {4: 20, 6: 40}
kinds = pytest.mark.parametrize("kind", ["too-big", "unreachable", "ttl"])
sizes = pytest.mark.parametrize("size", [0, 8])


def serve(tc: Translator, version: int, proto: int, mode: str = "local") -> Packet:
    """A flow's first packet, as it went to its backend, whose port is another than the VIP's."""
    tc.add_service(VIP[version], 80, proto, mode, BACKENDS[version][:1], backend_port=8080)
    sent = tc.run(either(proto, CLIENT[version], VIP[version], payload=b"y" * 50))
    assert sent.reasons == {Reason.SENT_TO_BACKEND: 1}
    return sent.packet


def of_the_vip(version: int, proto: int, dport: int = 40000) -> Packet:
    """A reply as the client's network sees it."""
    frame = either(proto, VIP[version], CLIENT[version], sport=80, dport=dport, payload=b"x" * 99)
    return network(frame.__class__(bytes(frame)))


def ends(packet: Packet) -> tuple[str, str]:
    header = network(packet)
    return header.src, header.dst


def quoted(version: int, size: int) -> int:
    """Bytes of a quote with so many of the transport header; 0 is all of it."""
    return HEADER[version] + size if size else 0


# Errors -------------------------------------------------------------------------------------


@versions
@protos
@sizes
@kinds
def test_an_error_about_a_reply_reaches_the_backend_here(
    tc: Translator, version: int, proto: int, size: int, kind: str
) -> None:
    serve(tc, version, proto)
    quote = of_the_vip(version, proto)
    out = tc.run(error(version, VIP[version], quote, quoted(version, size), kind))
    expect(out, NEXT, "SENT_ERROR_TO_BACKEND")
    # Who says so is left as it was: the client's address is kept in this mode.
    assert ends(out.packet) == (ROUTER[version], BACKENDS[version][0])
    inner = quote_of(out.packet, version)
    assert quoted_tuple(inner) == (BACKENDS[version][0], 8080, CLIENT[version], 40000)
    checksums_hold(inner, whole=not size)


@versions
@protos
@sizes
@kinds
def test_an_error_about_a_packet_to_a_backend_here_reaches_the_client(
    tc: Translator, version: int, proto: int, size: int, kind: str
) -> None:
    """From the backend, or from who is before it: the client has heard of neither."""
    sent = network(serve(tc, version, proto))
    # As an error quotes it, with a whole packet's checksums.
    packet = error(version, CLIENT[version], sent, quoted(version, size), kind)
    for source in (ROUTER[version], BACKENDS[version][0]):
        network(packet).src = source
        out = tc.leave(packet)
        expect(out, NEXT, "SENT_ERROR_TO_CLIENT")
        assert ends(out.packet) == (VIP[version], CLIENT[version])
        inner = quote_of(out.packet, version)
        assert quoted_tuple(inner) == (CLIENT[version], 40000, VIP[version], 80)
        checksums_hold(inner, whole=not size)


@versions
@protos
@sizes
def test_errors_of_flows_to_other_hosts(
    tc: Translator, version: int, proto: int, size: int
) -> None:
    sent = network(serve(tc, version, proto, "nat"))
    source, port, backend, backend_port = quoted_tuple(sent)
    bytes_quoted = quoted(version, size)
    out = tc.run(error(version, VIP[version], of_the_vip(version, proto), bytes_quoted))
    expect(out, REDIRECT, "SENT_ERROR_TO_BACKEND")
    assert (out.packet.src, out.packet.dst) == (OWN_MAC, BACKEND_MAC)
    assert ends(out.packet) == (source, backend)
    inner = quote_of(out.packet, version)
    assert quoted_tuple(inner) == (backend, backend_port, source, port)
    checksums_hold(inner, whole=not size)

    out = tc.run(error(version, source, sent, bytes_quoted))
    expect(out, REDIRECT, "SENT_ERROR_TO_CLIENT")
    assert (out.packet.src, out.packet.dst) == (OWN_MAC, ROUTER_MAC)
    assert ends(out.packet) == (VIP[version], CLIENT[version])
    inner = quote_of(out.packet, version)
    assert quoted_tuple(inner) == (CLIENT[version], 40000, VIP[version], 80)
    checksums_hold(inner, whole=not size)


@versions
@protos
@pytest.mark.parametrize("mode", ["local", "nat"])
def test_the_quote_of_many_flows_is_undone_exactly(
    tc: Translator, version: int, proto: int, mode: str
) -> None:
    """Of any flow, an error at any end quotes what that end has sent."""
    tc.add_service(VIP[version], 80, proto, mode, BACKENDS[version], backend_port=8080)
    for port in range(40000, 40040):
        first = either(proto, CLIENT[version], VIP[version], sport=port, payload=bytes(port % 7))
        sent = tc.run(first).packet
        about = error(version, network(sent).src, network(sent))
        out = tc.leave(about) if mode == "local" else tc.run(about)
        assert out.reasons == {Reason.SENT_ERROR_TO_CLIENT: 1}
        inner, was = quote_of(out.packet, version), network(Ether(bytes(first)))
        hops = 0 if mode == "local" else 1  # it had gone one on
        if version == 4:
            assert (inner.ttl, inner.id) == (was.ttl - hops, was.id)
            inner.ttl, inner.chksum = was.ttl, was.chksum
        else:
            assert inner.hlim == was.hlim - hops
            inner.hlim = was.hlim
        assert bytes(inner) == bytes(was)


@versions
def test_errors_that_concern_nobody_are_the_stacks(tc: Translator, version: int) -> None:
    sent = network(serve(tc, version, balancer.TCP))
    tc.open_port(balancer.UDP, 80, 8080)
    for packet in (
        error(version, VIP[version], of_the_vip(version, balancer.UDP)),
        error(version, CLIENT[version], of_the_vip(version, balancer.TCP)),  # another's quote
        ping(version, CLIENT[version], VIP[version]),
    ):
        for out in (tc.run(packet), tc.leave(packet)):
            assert (out.verdict, out.reasons, out.data) == (NEXT, {}, bytes(packet))
    # Each is looked at on its own way only.
    about = error(version, CLIENT[version], sent)
    assert tc.run(about).said == (NEXT, {})
    about = error(version, VIP[version], of_the_vip(version, balancer.TCP))
    assert tc.leave(about).said == (NEXT, {})


@versions
def test_modes_of_xdp_are_left_to_it(tc: Translator, version: int) -> None:
    tc.add_service(VIP[version], 80, balancer.UDP, "dsr-l2", BACKENDS[version])
    packet = error(version, VIP[version], of_the_vip(version, balancer.UDP))
    parts = fragments_of(udp(CLIENT[version], VIP[version], payload=bytes(3000)))
    for frame in (packet, *parts):
        assert tc.run(frame).said == (NEXT, {})


@versions
@pytest.mark.parametrize("mode", ["local", "nat"])
def test_an_error_about_no_known_flow_is_dropped(tc: Translator, version: int, mode: str) -> None:
    """Untranslated it would be the stack's, which has no such connection."""
    serve(tc, version, balancer.TCP, mode)
    quote = of_the_vip(version, balancer.TCP, dport=41000)
    expect(tc.run(error(version, VIP[version], quote)), SHOT, "DROP_NAT_NO_FLOW")


@versions
@pytest.mark.parametrize("mode", ["local", "nat"])
def test_a_quote_changes_nothing_that_is_known(tc: Translator, version: int, mode: str) -> None:
    serve(tc, version, balancer.TCP, mode)
    before = [(bytes(k), bytes(v)) for n in ("nat_fwd", "nat_rev") for k, v in tc.entries(n)]
    for flags in ("SA", "R", "FA"):
        frame = tcp(VIP[version], CLIENT[version], flags, sport=80, dport=40000)
        out = tc.run(error(version, VIP[version], network(frame.__class__(bytes(frame)))))
        assert out.reasons == {Reason.SENT_ERROR_TO_BACKEND: 1}
    after = [(bytes(k), bytes(v)) for n in ("nat_fwd", "nat_rev") for k, v in tc.entries(n)]
    assert before == after


@versions
@protos
def test_cut_anywhere_an_error_harms_nobody(tc: Translator, version: int, proto: int) -> None:
    serve(tc, version, proto)
    whole = bytes(error(version, VIP[version], of_the_vip(version, proto)))
    for size in range(ETH + HEADER[version], len(whole)):
        out = tc.run(whole[:size])
        assert (out.verdict, out.data) == (NEXT, whole[:size])


def test_options_in_both_headers_of_an_error(tc: Translator) -> None:
    serve(tc, 4, balancer.TCP)
    options = [IPOption_NOP()] * 40
    body = TCP(sport=80, dport=40000) / Raw(bytes(200))
    quote = ip(VIP[4], CLIENT[4], options=options) / body
    packet = ether(ip(ROUTER[4], VIP[4], options=options) / ICMP(type=3, code=1) / quote)
    out = tc.run(packet)
    expect(out, NEXT, "SENT_ERROR_TO_BACKEND")
    inner = network(packet).__class__(out.data[ETH + 60 + 8 :])
    assert (inner.src, inner.dst, inner[TCP].sport) == (BACKENDS[4][0], CLIENT[4], 8080)
    checksums_hold(inner, whole=True)


# Fragments ----------------------------------------------------------------------------------


def parts_sent(outs: Sequence[Out], verdict: int, reason: int) -> list[Packet]:
    for out in outs:
        assert out.said == (verdict, {reason: 1})
    return [network(Ether(out.data)) for out in outs]


@versions
@protos
def test_fragments_to_a_backend_here_and_back(tc: Translator, version: int, proto: int) -> None:
    tc.add_service(VIP[version], 80, proto, "local", BACKENDS[version], backend_port=8080)
    payload = bytes(range(250)) * 40
    frame = either(proto, CLIENT[version], VIP[version], payload=payload)
    outs = [tc.run(part) for part in fragments_of(frame)]
    assert outs[0].events[Event.FRAGMENT_FIRST] == 1
    whole = reassemble(parts_sent(outs, NEXT, Reason.SENT_TO_BACKEND))
    assert whole.src == CLIENT[version]
    assert whole.dst in BACKENDS[version]
    assert (whole.payload.sport, whole.payload.dport) == (40000, 8080)
    assert bytes(whole.payload.payload) == payload

    fields = {"flags": "SA"} if proto == balancer.TCP else {}
    back = either(
        proto, whole.dst, CLIENT[version], sport=8080, dport=40000, payload=payload, **fields
    )
    outs = [tc.leave(part) for part in fragments_of(back)]
    whole = reassemble(parts_sent(outs, NEXT, Reason.SENT_TO_CLIENT))
    assert (whole.src, whole.dst) == (VIP[version], CLIENT[version])
    assert (whole.payload.sport, whole.payload.dport) == (80, 40000)
    assert bytes(whole.payload.payload) == payload


@versions
@protos
def test_fragments_to_another_host_and_back(tc: Translator, version: int, proto: int) -> None:
    tc.add_service(VIP[version], 80, proto, "nat", BACKENDS[version], backend_port=8080)
    payload = bytes(range(250)) * 40
    frame = either(proto, CLIENT[version], VIP[version], payload=payload, ttl=9)
    outs = [tc.run(part) for part in fragments_of(frame)]
    whole = reassemble(parts_sent(outs, REDIRECT, Reason.SENT_TO_BACKEND))
    assert whole.dst in BACKENDS[version]
    port = whole.payload.sport
    assert port in tc.nat_ports
    assert {Ether(out.data).dst for out in outs} == {BACKEND_MAC}

    fields = {"flags": "SA"} if proto == balancer.TCP else {}
    back = either(proto, whole.dst, whole.src, sport=8080, dport=port, payload=payload, **fields)
    outs = [tc.run(part) for part in fragments_of(back)]
    whole = reassemble(parts_sent(outs, REDIRECT, Reason.SENT_TO_CLIENT))
    assert (whole.src, whole.dst) == (VIP[version], CLIENT[version])
    assert (whole.payload.sport, whole.payload.dport) == (80, 40000)
    assert {Ether(out.data).dst for out in outs} == {ROUTER_MAC}


@versions
def test_a_fragment_before_its_first_or_long_after_is_the_stacks(
    tc: Translator, version: int
) -> None:
    tc.add_service(VIP[version], 80, balancer.UDP, backends=BACKENDS[version])
    first, second, *_ = fragments_of(udp(CLIENT[version], VIP[version], payload=bytes(5000)))
    out = tc.run(second)
    assert (out.verdict, out.reasons, out.data) == (NEXT, {}, bytes(second))
    expect(tc.run(first), NEXT, "SENT_TO_BACKEND")
    expect(tc.run(second), NEXT, "SENT_TO_BACKEND")
    tc.advance(30.1)
    assert tc.run(second).said == (NEXT, {})


@versions
@pytest.mark.parametrize("at_tc", [True, False])
def test_what_came_before_its_first_is_counted_where_it_would_be_followed(
    tc: Translator, version: int, at_tc: bool
) -> None:
    """And never on its way out: what leaves is for no VIP of this node."""
    tc.add_service(VIP[version], 80, balancer.UDP, backends=BACKENDS[version])
    know_vip(tc, VIP[version], at_tc=at_tc)
    _, second, *_ = fragments_of(udp(CLIENT[version], VIP[version], payload=bytes(5000)))
    assert tc.run(second).events == ({Event.FRAGMENT_EARLY: 1} if at_tc else {})
    assert tc.leave(second).events == {}
    to_host = fragments_of(udp(CLIENT[version], ROUTER[version], payload=bytes(5000)))
    assert tc.run(to_host[1]).events == {}


@versions
def test_each_hook_follows_its_own_first_fragments(tc: Translator, version: int) -> None:
    """A reply on its way to where it is translated is left alone by the way in, and by XDP, whose
    map it is too."""
    serve(tc, version, balancer.UDP)
    backend = BACKENDS[version][0]
    reply = udp(backend, CLIENT[version], sport=8080, dport=40000, payload=bytes(5000))
    first, second, *_ = fragments_of(reply)
    expect(tc.leave(first), NEXT, "SENT_TO_CLIENT")
    assert tc.run(second).said == (NEXT, {})
    expect(tc.leave(second), NEXT, "SENT_TO_CLIENT")
    there = fragments_of(udp(CLIENT[version], VIP[version], payload=bytes(5000)))
    expect(tc.run(there[0]), NEXT, "SENT_TO_BACKEND")
    with balancer.Balancer(maps=tc.object.maps) as xdp:
        for part in (second, there[1]):
            out = xdp.run(part)
            assert (out.reasons, out.data) == ({Reason.PASS_FRAGMENT: 1}, bytes(part))


@versions
def test_later_fragments_of_a_flow_that_is_gone_are_dropped(tc: Translator, version: int) -> None:
    serve(tc, version, balancer.UDP)
    first, second, *_ = fragments_of(udp(CLIENT[version], VIP[version], payload=bytes(5000)))
    tc.run(first)
    for name in ("nat_fwd", "nat_rev"):
        tc.map(name).delete_many(tc.map(name).items()[0])
    expect(tc.run(second), SHOT, "DROP_NAT_NO_FLOW")


def test_an_atomic_fragment_is_a_whole_packet(tc: Translator) -> None:
    tc.add_service(VIP[6], 80, balancer.UDP, backends=BACKENDS[6])
    whole = network(udp(CLIENT[6], VIP[6]))
    packet = IPv6(src=CLIENT[6], dst=VIP[6]) / IPv6ExtHdrFragment(nh=17, id=9) / whole.payload
    expect(tc.run(ether(packet)), NEXT, "SENT_TO_BACKEND")
    assert not tc.entries("fragments")
