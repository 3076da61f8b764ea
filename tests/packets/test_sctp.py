# SPDX-License-Identifier: Apache-2.0
"""SCTP in the modes of direct server return; translated it is TC's: test_tc_sctp.py."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from scapy.layers.l2 import Ether

from shunt.kern.libbpf import XDP_PASS, XDP_TX
from tests.packets.balancer import ELSEWHERE, SCTP, TCP, UDP, Balancer, Event, Flow, Reason
from tests.packets.frames import CHUNKS, ETH, network, sctp, tcp, udp
from tests.packets.test_fragments import fragments_of, reassemble
from tests.packets.test_icmp import error
from tests.packets.tracking import ADDRESSES, ENDS, IDLE_S, NEW, NOBODY, OLD, Case

FAMILIES = pytest.mark.parametrize("version", [4, 6])
OUTER = {4: 20, 6: 40}


class Associations(Case):
    """A service of SCTP, whose slots move from OLD to NEW."""

    def __init__(self, lb: Balancer, version: int) -> None:
        super().__init__(lb, version)
        self.service = lb.add_service(
            self.ends[1], proto=SCTP, backends=ADDRESSES[version], idle_s=IDLE_S
        )
        self.old, self.new = self.service.backends
        self.service.move()

    def hears(self, chunks: str) -> str:
        return self._sent(sctp(*self.ends, chunks))


@pytest.fixture(params=[4, 6])
def case(request: pytest.FixtureRequest, lb: Balancer) -> Associations:
    return Associations(lb, request.param)


@FAMILIES
@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("chunks", CHUNKS)
def test_every_packet_is_wrapped_as_it_is(
    lb: Balancer, version: int, outer: int, chunks: str
) -> None:
    lb.add_service(ENDS[version][1], 3868, SCTP, backends=ADDRESSES[outer][:1])
    sent = sctp(*ENDS[version], chunks, dport=3868)
    out = lb.run(sent)
    assert out.said == (XDP_TX, {Reason.SENT_TO_BACKEND: 1})
    assert network(out.packet).dst == ADDRESSES[outer][0]
    assert out.data[ETH + OUTER[outer] :] == bytes(sent)[ETH:]


@FAMILIES
def test_by_mac_alone(lb: Balancer, version: int) -> None:
    hop = lb.add_nexthop(ifindex=ELSEWHERE)
    lb.add_service(ENDS[version][1], 80, SCTP, "dsr-l2", ADDRESSES[version][:1], nexthop=hop)
    sent = sctp(*ENDS[version], "DATA", ttl=7)
    out = lb.run(sent)
    assert out.reasons == {Reason.SENT_TO_BACKEND: 1}
    assert bytes(out.packet.payload) == bytes(sctp(*ENDS[version], "DATA", ttl=6).payload)


@FAMILIES
def test_protocols_share_no_port(lb: Balancer, version: int) -> None:
    """S6: each of the three has a set of ports, and frontends, of its own."""
    client, vip = ENDS[version]
    makers = {TCP: tcp, UDP: udp, SCTP: sctp}
    ports = {TCP: 80, UDP: 81, SCTP: 82}
    for proto, port in ports.items():
        lb.add_service(vip, port, proto, backends=ADDRESSES[version][:1])
    for proto, make in makers.items():
        for other, port in ports.items():
            said = lb.run(make(client, vip, dport=port)).reasons
            wanted = Reason.SENT_TO_BACKEND if proto == other else Reason.PASS_NOT_OURS
            assert said == {wanted: 1}, (proto, port)


@FAMILIES
def test_every_port_of_a_vip(lb: Balancer, version: int) -> None:
    lb.add_service(ENDS[version][1], 0, SCTP, backends=ADDRESSES[version][:1])
    for port in (1, 80, 65535):
        said = lb.run(sctp(*ENDS[version], dport=port)).reasons
        assert said == {Reason.SENT_TO_BACKEND: 1}
        assert lb.run(tcp(*ENDS[version], dport=port)).reasons == {Reason.PASS_NOT_OURS: 1}


@FAMILIES
def test_cut_short_it_is_the_stacks(lb: Balancer, version: int) -> None:
    """A header, and a chunk's: without one there is no packet."""
    lb.add_service(ENDS[version][1], 80, SCTP, backends=ADDRESSES[version][:1])
    frame = bytes(sctp(*ENDS[version], "COOKIE ACK"))
    for cut in range(len(frame) - 16, len(frame)):
        assert lb.run(frame[:cut]).said == (XDP_PASS, {Reason.PASS_MALFORMED: 1})
    assert lb.run(frame).reasons == {Reason.SENT_TO_BACKEND: 1}


@FAMILIES
def test_without_backends_the_client_is_told(lb: Balancer, version: int) -> None:
    lb.add_service(ENDS[version][1], 80, SCTP)
    out = lb.run(sctp(*ENDS[version]))
    assert out.said == (XDP_TX, {Reason.SENT_UNREACHABLE: 1})
    assert network(out.packet).dst == ENDS[version][0]


@FAMILIES
def test_errors_and_fragments_go_where_the_association_is(lb: Balancer, version: int) -> None:
    client, vip = ENDS[version]
    lb.add_service(vip, 80, SCTP, "dsr-l2", ADDRESSES[version])
    macs = set()
    said = sctp(vip, client, "DATA", sport=80, dport=40000)
    out = lb.run(error(version, vip, said.payload))
    assert out.reasons == {Reason.SENT_ERROR_TO_BACKEND: 1}
    macs.add(out.data[:6])
    frame = sctp(client, vip, "DATA", payload=bytes(range(256)) * 15)
    outs = [lb.run(part) for part in fragments_of(frame)]
    assert [out.reasons for out in outs] == [{Reason.SENT_TO_BACKEND: 1}] * len(outs)
    whole = reassemble([network(Ether(out.data)) for out in outs])
    assert (whole.src, whole.dst) == (client, vip)
    assert len(macs | {out.data[:6] for out in outs}) == 1


# Moving slots -----------------------------------------------------------------------------------


def test_an_init_goes_to_cur_and_is_remembered(case: Associations) -> None:
    assert case.hears("INIT") == NEW
    assert case.events == {Event.FLOW_REMEMBERED: 1}
    assert case.entry() == (case.new, Flow.OPENING)


@pytest.mark.parametrize("chunks", sorted(set(CHUNKS) - {"INIT"}))
def test_any_other_packet_is_of_an_old_association(chunks: str, case: Associations) -> None:
    assert case.hears(chunks) == OLD
    ends = chunks in {"ABORT", "SHUTDOWN ACK", "SHUTDOWN COMPLETE"}
    assert case.entry() == (case.old, Flow.CLOSING if ends else Flow.CONFIRMED)


def test_the_cookie_confirms(case: Associations) -> None:
    for chunks in ("INIT", "COOKIE ECHO", "DATA", "SACK"):
        assert case.hears(chunks) == NEW
    assert case.entry() == (case.new, Flow.CONFIRMED)


@pytest.mark.parametrize("chunks", sorted(set(CHUNKS) - {"INIT", "COOKIE ECHO"}))
def test_before_the_cookie_anything_else_is_an_older_associations(
    chunks: str, case: Associations
) -> None:
    """RFC 9260, 5.1: the client sends nothing before it has an INIT ACK, and then the cookie."""
    assert case.hears("INIT") == NEW
    assert case.hears(chunks) == OLD


@pytest.mark.parametrize("end", ["ABORT", "SHUTDOWN ACK", "SHUTDOWN COMPLETE"])
def test_after_the_end_an_init_chooses_anew_and_others_follow(end: str, case: Associations) -> None:
    for chunks in ("DATA", end, "SACK"):
        assert case.hears(chunks) == OLD
    assert case.entry() == (case.old, Flow.CLOSING)
    assert case.hears("INIT") == NEW
    assert case.entry() == (case.new, Flow.OPENING)


def test_an_ended_association_is_forgotten_after_a_minute(case: Associations) -> None:
    case.hears("DATA")
    case.hears("SHUTDOWN COMPLETE")
    case.service.linger()
    case.lb.advance(59)
    assert case.hears("SACK") == OLD
    case.lb.advance(63)
    assert case.hears("SACK") == NEW


def test_an_init_on_an_association_stays_with_its_backend(case: Associations) -> None:
    """A client that has lost its state restarts the association (5.2.2)."""
    assert case.hears("DATA") == OLD
    assert case.hears("INIT") == OLD
    assert case.entry() == (case.old, Flow.CONFIRMED)


def test_nobody_up_is_nobody(case: Associations) -> None:
    case.service.set_slots(0)
    out = case.lb.run(sctp(*case.ends))
    assert out.reasons == {Reason.SENT_UNREACHABLE: 1}
    assert NOBODY not in case.names.values()


@pytest.mark.parametrize("seed", range(4))
def test_random_associations_keep_their_backends(
    seed: int, make_lb: Callable[..., Balancer]
) -> None:
    """While slots change hands, against an oracle that remembers every association."""
    draw, version = random.Random(seed), (4, 6)[seed % 2]
    lb = make_lb(inserts_per_s=10**6)
    service = lb.add_service(ENDS[version][1], proto=SCTP, backends=ADDRESSES[version])
    service.set_slots(service.backends[0])
    known: dict[int, str] = {}
    stage: dict[int, str] = {}
    used: set[str] = set()
    moved = 0
    for _ in range(800):
        if draw.random() < 0.01 and moved < 2:
            service.move((1, 0)[moved], 0)  # and back: prev is who had it before the first change
            moved += 1
        port = draw.randrange(40000, 40040)
        at = stage.get(port, "closed")
        chunks = {
            "closed": "INIT", "opening": draw.choice(("INIT", "COOKIE ECHO")),
            "open": draw.choice(("DATA", "SACK", "HEARTBEAT", "COOKIE ECHO", "SHUTDOWN", "ABORT")),
        }[at]  # fmt: skip
        got = lb.backend_of(sctp(*ENDS[version], chunks, sport=port))
        if chunks == "INIT":  # sent again it may choose again: a backend knows nothing of it yet
            known[port] = got
        assert got == known[port], (port, at, chunks)
        used.add(got)
        stage[port] = {"INIT": "opening", "ABORT": "closed"}.get(chunks, "open")
        lb.advance(draw.choice((0, 0.1, 0.5)))
    assert (moved, used) == (2, set(ADDRESSES[version]))
