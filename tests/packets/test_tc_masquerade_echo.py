# SPDX-License-Identifier: Apache-2.0
"""Echo requests and fragments, masqueraded: an identifier is what a port is, and pieces follow."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from scapy.layers.inet import ICMP
from scapy.layers.inet6 import ICMPv6EchoReply, ICMPv6EchoRequest, IPv6ExtHdrFragment
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from shunt.agent.nat_expiry import NS_PER_S, judge_nat
from tests.packets.balancer import SCTP, TCP, UDP, Event, Reason
from tests.packets.frames import either, ether, ip, network, sctp, verify
from tests.packets.test_fragments import fragments_of, reassemble
from tests.packets.test_icmp import ROUTER, error, quote_of
from tests.packets.test_tc_masquerade import NEAR, OWN, POD, WORLD, Masquerader
from tests.packets.translator import NEXT, SHOT, Track, expect, tuple_of

FAMILIES = pytest.mark.parametrize("family", [4, 6])
NUMBER = {4: 1, 6: 58}


@pytest.fixture(scope="module")
def translator() -> Iterator[Masquerader]:
    with Masquerader(inserts_per_s=10**6) as found:
        yield found


def request(family: int, src: str, dst: str, ident: int, seq: int = 1, data: bytes = b"") -> Packet:
    body: Packet = ICMPv6EchoRequest(id=ident, seq=seq, data=data)
    if family == 4:
        body = ICMP(type=8, id=ident, seq=seq) / Raw(data)
    return ether(ip(src, dst) / body)


def reply(family: int, src: str, dst: str, ident: int, seq: int = 1, data: bytes = b"") -> Packet:
    body: Packet = ICMPv6EchoReply(id=ident, seq=seq, data=data)
    if family == 4:
        body = ICMP(type=0, id=ident, seq=seq) / Raw(data)
    return ether(ip(src, dst) / body)


def echo_of(packet: Packet) -> tuple[str, str, int, int, bytes]:
    """Source, destination, identifier, number and data."""
    body = network(packet).payload
    data = bytes(body.payload) if isinstance(body, ICMP) else bytes(body.data)
    return network(packet).src, network(packet).dst, body.id, body.seq, data


@FAMILIES
def test_a_pod_pings_the_world(tc: Masquerader, family: int) -> None:
    pod, world, own = POD[family], WORLD[family], OWN[family]
    idents = set()
    for seq in (1, 2):
        out = tc.leave(request(family, pod, world, 7, seq, b"odd"))
        expect(out, NEXT, "SENT_MASQUERADED")
        src, dst, ident, *rest = echo_of(out.packet)
        assert (src, dst, rest) == (own, world, [seq, b"odd"])
        assert ident in tc.nat_ports
        idents.add(ident)
        back = tc.run(reply(family, world, own, ident, seq, b"odd"))
        expect(back, NEXT, "SENT_TO_CLIENT")
        # Exactly what it would have been without this node in between.
        assert back.data == bytes(reply(family, world, pod, 7, seq, b"odd"))
    assert len(idents) == 1
    ((key, value),) = tc.entries("nat_fwd")
    assert (int(key["proto"]), int(key["sport"]), int(key["dport"])) == (NUMBER[family], 7, 0)
    assert int(value["track"]) & (Track.TRACKED | Track.MASQUERADED)


@FAMILIES
def test_pods_with_the_same_identifier_are_told_apart(tc: Masquerader, family: int) -> None:
    draw = random.Random(family)
    known: dict[tuple[str, int], int] = {}
    pods = [POD[family][:-1] + str(n) for n in range(1, 9)]
    for _ in range(300):
        asked = draw.choice(pods), draw.randrange(0, 40)
        out = tc.leave(request(family, asked[0], WORLD[family], asked[1]))
        ident = echo_of(out.packet)[2]
        assert known.setdefault(asked, ident) == ident
        back = tc.run(reply(family, WORLD[family], OWN[family], ident))
        assert echo_of(back.packet)[1:3] == asked
    assert len(set(known.values())) == len(known) > 150


@FAMILIES
def test_identifiers_are_a_secrets(family: int) -> None:
    """S82: whoever does not know the node's key cannot tell which comes next."""
    seen = []
    for key in ((1, 2), (1, 3)):
        with Masquerader(inserts_per_s=10**6, nat_key=key) as tc:
            outs = [tc.leave(request(family, POD[family], WORLD[family], n)) for n in range(200)]
            seen.append([echo_of(out.packet)[2] for out in outs])
    assert sum(a == b for a, b in zip(*seen, strict=True)) < 4
    spread = np.histogram(seen[0], bins=4, range=(10000, 30000))[0]
    assert spread.min() > 25
    assert len(set(np.diff(seen[0]).tolist())) > 150


@FAMILIES
def test_it_is_forgotten_after_half_a_minute(tc: Masquerader, family: int) -> None:
    out = tc.leave(request(family, POD[family], WORLD[family], 7))
    tc.run(reply(family, WORLD[family], OWN[family], echo_of(out.packet)[2]))
    tc.leave(request(family, POD[family], WORLD[family], 7, 2))
    ((_, fwd),), ((key, rev),) = tc.entries("nat_fwd"), tc.entries("nat_rev")
    due = int(max(fwd["seen_ns"], rev["seen_ns"])) + 30 * NS_PER_S
    no, idle = np.zeros(1, np.bool_), np.array([8000 * NS_PER_S])
    proto = np.array([key["proto"]])
    args = np.array([rev]), np.array([fwd]), no, no, idle
    assert [bool(judge_nat(*args, now, proto)[0]) for now in (due, due + 1)] == [False, True]


@FAMILIES
def test_what_leaves_and_comes_as_it_is(tc: Masquerader, family: int) -> None:
    pod, world, own = POD[family], WORLD[family], OWN[family]
    strange = request(family, pod, world, 7)
    strange.payload.payload.code = 1
    for frame in (
        request(family, pod, NEAR[family], 7),  # not to there
        request(family, own, world, 7),  # this host's own
        reply(family, pod, world, 7),  # to a ping that came past this node
        strange,
    ):
        out = tc.leave(frame)
        assert (out.verdict, out.reasons, out.data) == (NEXT, {}, bytes(frame))
    for frame in (
        reply(family, world, own, 7),  # this host's own, again
        reply(family, world, own, 12345),
        request(family, world, own, 12345),
    ):
        out = tc.run(frame)
        assert (out.verdict, out.reasons, out.data) == (NEXT, {}, bytes(frame))
    assert tc.entries("nat_rev") == []


@FAMILIES
def test_a_reply_of_somebody_else_is_not_taken(tc: Masquerader, family: int) -> None:
    out = tc.leave(request(family, POD[family], WORLD[family], 7))
    ident = echo_of(out.packet)[2]
    assert tc.run(reply(family, ROUTER[family], OWN[family], ident)).said == (NEXT, {})
    assert tc.run(reply(family, WORLD[family], OWN[family], ident ^ 1)).said == (NEXT, {})
    udp_to_it = either(UDP, WORLD[family], OWN[family], sport=0, dport=ident)
    assert tc.run(udp_to_it).said == (NEXT, {})


@FAMILIES
def test_refusals(family: int) -> None:
    with Masquerader(own=False) as nameless:
        out = nameless.leave(request(family, POD[family], WORLD[family], 7))
        expect(out, SHOT, "DROP_NAT_NO_SOURCE")
    with Masquerader(inserts_per_s=1) as poor:
        assert poor.leave(request(family, POD[family], WORLD[family], 7)).verdict == NEXT
        out = poor.leave(request(family, POD[family], WORLD[family], 8))
        expect(out, SHOT, "DROP_NAT_OVER_BUDGET")
    with Masquerader(nat_port_count=1) as narrow:
        assert narrow.leave(request(family, POD[family], WORLD[family], 7)).verdict == NEXT
        out = narrow.leave(request(family, POD[family], WORLD[family], 8))
        expect(out, SHOT, "DROP_NAT_NO_PORT")


@FAMILIES
@pytest.mark.parametrize("kind", ["too-big", "unreachable"])
def test_an_error_about_it_reaches_the_pod(tc: Masquerader, family: int, kind: str) -> None:
    """A router on the way says so: `traceroute -I` and path MTU."""
    asked = request(family, POD[family], WORLD[family], 7, 3, b"y" * 40)
    out = tc.leave(asked)
    back = tc.run(error(family, OWN[family], network(out.packet), kind=kind))
    expect(back, NEXT, "SENT_ERROR_TO_CLIENT")
    assert (network(back.packet).src, network(back.packet).dst) == (ROUTER[family], POD[family])
    whole = bytes(network(verify(bytes(asked))))
    quoted = bytes(quote_of(back.packet, family))
    assert quoted == whole[: len(quoted)]


@FAMILIES
@pytest.mark.parametrize("proto", [TCP, UDP, SCTP])
def test_fragments_follow_the_first(tc: Masquerader, family: int, proto: int) -> None:
    pod, world, own = POD[family], WORLD[family], OWN[family]
    data = bytes(range(250)) * 20
    there: dict[str, Any] = {"sport": 40000, "dport": 443}
    port = tuple_of(tc.leave(either(proto, pod, world, **there)).packet)[1]
    back: dict[str, Any] = {"sport": 443, "dport": port}
    if proto == SCTP:
        assert port == 40000
        assert tc.run(sctp(world, own, "INIT ACK", **back)).verdict == NEXT
        frame = sctp(pod, world, "COOKIE ECHO", **there, payload=data)
        answer = sctp(world, own, "COOKIE ACK", **back, payload=data)
    else:
        frame = either(proto, pod, world, **there, payload=data)
        flags = {"flags": "SA"} if proto == TCP else {}
        answer = either(proto, world, own, **back, payload=data, **flags)
    outs = [tc.leave(part) for part in fragments_of(frame)]
    assert [out.said for out in outs] == [(NEXT, {Reason.SENT_MASQUERADED: 1})] * len(outs)
    assert len(outs) > 3
    whole = reassemble([network(Ether(out.data)) for out in outs])
    assert tuple_of(ether(whole)) == (own, port, world, 443)
    outs = [tc.run(part) for part in fragments_of(answer)]
    assert [out.said for out in outs] == [(NEXT, {Reason.SENT_TO_CLIENT: 1})] * len(outs)
    whole = reassemble([network(Ether(out.data)) for out in outs])
    assert tuple_of(ether(whole)) == (world, 443, pod, 40000)


@FAMILIES
def test_large_pings_come_in_fragments(tc: Masquerader, family: int) -> None:
    data = bytes(range(250)) * 20
    asked = request(family, POD[family], WORLD[family], 7, 1, data)
    outs = [tc.leave(part) for part in fragments_of(asked)]
    assert [out.said for out in outs] == [(NEXT, {Reason.SENT_MASQUERADED: 1})] * len(outs)
    whole = reassemble([network(Ether(out.data)) for out in outs])
    src, _, ident, _, got = echo_of(ether(whole))
    assert (src, got) == (OWN[family], data)
    back = reply(family, WORLD[family], OWN[family], ident, 1, data)
    outs = [tc.run(part) for part in fragments_of(back)]
    assert [out.said for out in outs] == [(NEXT, {Reason.SENT_TO_CLIENT: 1})] * len(outs)
    whole = reassemble([network(Ether(out.data)) for out in outs])
    assert echo_of(ether(whole)) == (WORLD[family], POD[family], 7, 1, data)


@FAMILIES
def test_a_fragment_without_its_first_does_not_leave(tc: Masquerader, family: int) -> None:
    """S77: with a pod's address least of all."""
    frame = either(UDP, POD[family], WORLD[family], payload=bytes(4000))
    first, *rest = fragments_of(frame)
    for part in rest:
        expect(tc.leave(part), SHOT, "DROP_NAT_FRAGMENT")
    assert tc.leave(first).events == {Event.NAT_CREATED: 1, Event.FRAGMENT_FIRST: 1}
    expect(tc.leave(rest[0]), NEXT, "SENT_MASQUERADED")
    tc.advance(31)
    late = tc.leave(rest[1])
    expect(late, SHOT, "DROP_NAT_FRAGMENT")
    assert late.events == {Event.FRAGMENT_LATE: 1}
    # Other protocols are not masqueraded, so their fragments leave as the first has.
    if family == 4:
        other = ip(POD[4], WORLD[4], flags="", frag=9, proto=47)
    else:
        other = ip(POD[6], WORLD[6]) / IPv6ExtHdrFragment(id=7, nh=47, offset=9)
    assert tc.leave(ether(other / Raw(bytes(64)))).said == (NEXT, {})
    for src, dst in ((POD[family], NEAR[family]), (OWN[family], WORLD[family])):
        other = fragments_of(either(UDP, src, dst, payload=bytes(4000)))[1]
        assert tc.leave(other).said == (NEXT, {})


@FAMILIES
def test_a_fragment_of_a_flow_that_has_gone_is_refused(tc: Masquerader, family: int) -> None:
    first, *rest = fragments_of(either(UDP, POD[family], WORLD[family], payload=bytes(4000)))
    expect(tc.leave(first), NEXT, "SENT_MASQUERADED")
    for name in ("nat_fwd", "nat_rev"):
        tc.map(name).delete_many(tc.map(name).items()[0])
    expect(tc.leave(rest[0]), SHOT, "DROP_NAT_NO_FLOW")


@FAMILIES
def test_associations_of_pods(tc: Masquerader, family: int) -> None:
    """With the pod's own port, or not at all."""
    pod, world = POD[family], WORLD[family]
    out = tc.leave(sctp(pod, world, sport=40000, dport=3868))
    expect(out, NEXT, "SENT_MASQUERADED")
    assert tuple_of(out.packet) == (OWN[family], 40000, world, 3868)
    back = tc.run(sctp(world, OWN[family], "INIT ACK", sport=3868, dport=40000))
    expect(back, NEXT, "SENT_TO_CLIENT")
    assert tuple_of(back.packet) == (world, 3868, pod, 40000)
    other = pod[:-1] + "8"
    expect(tc.leave(sctp(other, world, sport=40000, dport=3868)), SHOT, "DROP_NAT_SCTP_PORT")
    expect(tc.leave(sctp(other, world, sport=40001, dport=3868)), NEXT, "SENT_MASQUERADED")
    expect(tc.leave(sctp(other, world, "DATA", sport=40002, dport=3868)), SHOT, "DROP_NAT_NO_FLOW")
    expect(tc.leave(sctp(pod, world, "DATA", sport=40000, dport=3868)), SHOT, "DROP_NAT_INVALID")
