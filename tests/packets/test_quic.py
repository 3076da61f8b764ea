# SPDX-License-Identifier: Apache-2.0
"""QUIC by connection id: where packets with server ids go, and where those without."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, fragment6
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw

from shunt.agent import quic as agent_quic
from shunt.agent.quic import PutServerId, ServerIds
from shunt.lb.model import Quic
from shunt.policy.sources import compile_rules
from tests.packets import quic
from tests.packets.balancer import UDP as PROTO
from tests.packets.balancer import UP, Balancer, Event, Flag, Reason, Service
from tests.packets.frames import ether, udp
from tests.packets.translator import answer, returned, tuple_of

VIPS = {4: "203.0.113.1", 6: "2001:db8:a::1"}
CLIENTS = {4: "192.0.2.", 6: "2001:db8:c::"}
BACKENDS = {
    4: [f"10.0.0.{n}" for n in range(1, 5)],
    6: [f"fd00::{n}" for n in range(1, 5)],
}
CONFIG = Quic(2, config_id=3, nonce_length=5)
SERVERS = [bytes((0xA0, n)) for n in range(1, 5)]
versions = pytest.mark.parametrize("version", [4, 6])
modes = pytest.mark.parametrize("mode", ["dsr-ipip", "dsr-geneve", "nat"])
# Where flows are translated: in XDP, and in TC.
translated = pytest.mark.parametrize(
    ("hook", "mode"), [("xdp", "nat"), ("tc", "local"), ("tc", "nat")]
)
everywhere = pytest.mark.parametrize(
    ("hook", "mode"),
    [("xdp", "dsr-ipip"), ("xdp", "dsr-geneve"), ("xdp", "nat"), ("tc", "local"), ("tc", "nat")],
)
both = pytest.mark.parametrize("known", [quic.V1, quic.V2], ids=["v1", "v2"])


def serve(
    lb: Balancer, version: int, mode: str = "dsr-ipip", config: Quic = CONFIG, **asked: Any
) -> Service:
    """A service whose backends have server ids; every slot is the first backend's."""
    service = lb.add_service(VIPS[version], 443, PROTO, mode, BACKENDS[version], idle_s=60)
    service.ask(quic=config, **asked)
    name(lb, service, dict(zip(SERVERS, service.backends, strict=True)))
    service.set_slots(service.backends[0])
    return service


def name(lb: Balancer, service: Service, ids: dict[bytes, int]) -> None:
    table = ServerIds(lb.map("server_ids"))
    for server, backend in ids.items():
        table.put(PutServerId(service.id, server, backend))


def cid(number: int, config: int = 3, nonce: bytes = b"nonce") -> bytes:
    """A connection id that backend `number` made."""
    return quic.connection_id(SERVERS[number], config, nonce)


def datagram(version: int, payload: bytes, host: int = 1, sport: int = 40000) -> Packet:
    return udp(f"{CLIENTS[version]}{host}", VIPS[version], sport=sport, dport=443, payload=payload)


def to(
    lb: Balancer, version: int, payload: bytes, host: int = 1, sport: int = 40000
) -> tuple[int, set[str]]:
    """Which backend gets a datagram, by number, and what happened on the way."""
    out = lb.run(datagram(version, payload, host, sport))
    assert out.reasons == {Reason.SENT_TO_BACKEND: 1}, out.reasons
    events = {event.name for event in out.events if event.name.startswith("QUIC_")}
    return BACKENDS[version].index(out.packet.payload.dst), events


BY_ID, FIRST, UNROUTABLE, DOWN = {"QUIC_BY_ID"}, {"QUIC_FIRST"}, {"QUIC_UNROUTABLE"}, {"QUIC_DOWN"}


# By id ------------------------------------------------------------------------------------------


@versions
@everywhere
def test_a_short_header_goes_to_its_server_from_any_address(
    version: int, mode: str, program: Balancer
) -> None:
    """A rebound port, another address: the server stays."""
    serve(program, version, mode)
    for number in range(4):
        for host, sport in ((1, 1000), (1, 2000), (9, 1000)):
            assert to(program, version, quic.short(cid(number)), host, sport) == (number, BY_ID)
    assert not len(program.flows())


@versions
@everywhere
@both
def test_so_does_every_packet_of_a_handshake(
    version: int, mode: str, known: int, program: Balancer
) -> None:
    serve(program, version, mode)
    for sport, kinds in enumerate((quic.INITIAL, quic.ZERO_RTT, quic.HANDSHAKE)):
        packet = quic.long(cid(2), known, kinds[known])
        assert to(program, version, packet, sport=1000 + sport) == (2, BY_ID)
    assert to(program, version, quic.long(cid(1), quic.DRAFT), sport=2000) == (1, BY_ID)


@versions
def test_layer_2_too(version: int, lb: Balancer) -> None:
    service = lb.add_service(VIPS[version], 443, PROTO, "dsr-l2")
    macs = ["02:00:00:00:01:01", "02:00:00:00:01:02"]
    service.backends = [
        lb.add_backend(service.id, address, nexthop=lb.add_nexthop(dmac=mac))
        for address, mac in zip(BACKENDS[version], macs, strict=False)
    ]
    service.set_slots(service.backends[0])
    service.ask(quic=CONFIG)
    name(lb, service, dict(zip(SERVERS, service.backends, strict=False)))
    for number, mac in enumerate(macs):
        out = lb.run(datagram(version, quic.short(cid(number))))
        assert out.packet.dst == mac


@versions
def test_ids_of_every_length(version: int, lb: Balancer) -> None:
    service = serve(lb, version)
    for length in range(1, 16):
        servers = [bytes((length,)) * (length - 1) + bytes((n,)) for n in range(4)]
        name(lb, service, dict(zip(servers, service.backends, strict=True)))
        service.ask(quic=Quic(length))
        for number, server in enumerate(servers):
            packet = quic.short(quic.connection_id(server, 0, b"nonc"))
            assert to(lb, version, packet) == (number, BY_ID)


def test_with_options_the_vlan_tag_and_extensions_it_is_found_too(lb: Balancer) -> None:
    serve(lb, 4)
    serve(lb, 6)
    payload = UDP(sport=1, dport=443) / Raw(quic.short(cid(2)))
    four = IP(src="192.0.2.1", dst=VIPS[4], options=[b"\x94\x04\0\0"]) / payload
    six = IPv6(src="2001:db8:c::1", dst=VIPS[6]) / IPv6ExtHdrDestOpt() / payload
    tagged = Ether() / Dot1Q(vlan=5) / IP(src="192.0.2.1", dst=VIPS[4]) / payload
    for packet in (ether(four), ether(six), tagged):
        assert lb.run(packet).events == {Event.QUIC_BY_ID: 1}


@versions
@modes
def test_later_fragments_follow(version: int, mode: str, lb: Balancer) -> None:
    serve(lb, version, mode)
    whole = datagram(version, quic.short(cid(3), bytes(3000)))
    if version == 4:
        whole[IP].flags = 0
        parts = whole[IP].fragment(1400)
    else:
        header = IPv6(src=f"{CLIENTS[6]}1", dst=VIPS[6])
        parts = fragment6(header / IPv6ExtHdrFragment(id=7) / whole[UDP], 1400)  # type: ignore[no-untyped-call]
    assert len(parts) > 1
    for part in parts:
        sent = Ether(lb.run(ether(part)).data)  # no part has the datagram's whole checksum
        assert sent.payload.dst == BACKENDS[version][3]


# Not by id --------------------------------------------------------------------------------------


@versions
@everywhere
@pytest.mark.parametrize(
    "dcid",
    [cid(2, 0), cid(2, 7), quic.connection_id(b"\xff\xff", 3), cid(2, nonce=b"")[:2], b""],
    ids=["another config", "unroutable", "unknown server", "cut off", "none"],
)
def test_what_names_nobody_goes_by_its_addresses(
    version: int, mode: str, dcid: bytes, program: Balancer
) -> None:
    serve(program, version, mode)
    assert to(program, version, quic.short(dcid, b"")) == (0, UNROUTABLE)
    for known in (quic.V1, quic.V2):
        for kind, event in (
            (quic.HANDSHAKE[known], UNROUTABLE),
            (quic.INITIAL[known], FIRST),
            (quic.ZERO_RTT[known], FIRST),
        ):
            assert to(program, version, quic.long(dcid, known, kind), sport=2000) == (0, event)


@versions
def test_a_packet_is_looked_at_no_further_than_it_goes(version: int, lb: Balancer) -> None:
    """Cut at every octet: routed once the whole of the shortest connection id is there."""
    serve(lb, version)
    for whole, before in (
        (quic.short(cid(2), b""), 1),
        (quic.long(cid(2), quic.V1, 2, b""), 6),
    ):
        least = before + 1 + CONFIG.server_id_length + CONFIG.nonce_length
        for size in range(len(whole) + 1):
            number, events = to(lb, version, whole[:size])
            assert (number == 2) is (size >= least), size
            if size >= 7:
                assert events == (BY_ID if size >= least else UNROUTABLE)


@versions
def test_padding_of_the_frame_is_not_the_packets(version: int, lb: Balancer) -> None:
    serve(lb, version)
    whole = quic.short(cid(2), b"")
    frame = bytes(datagram(version, whole[:-1])) + whole[-1:] + bytes(20)
    out = lb.run(frame)
    assert out.events == {Event.QUIC_UNROUTABLE: 1}


@versions
def test_other_services_are_not_asked(version: int, lb: Balancer) -> None:
    """Neither those without the option, nor another's server ids."""
    service = serve(lb, version)
    service.ask()
    assert to(lb, version, quic.short(cid(2))) == (0, set())
    other = lb.add_service("203.0.113.9", 443, PROTO, backends=BACKENDS[4][:1])
    other.ask(quic=CONFIG)
    out = lb.run(udp("192.0.2.1", "203.0.113.9", dport=443, payload=quic.short(cid(2))))
    assert out.packet.payload.dst == BACKENDS[4][0]
    assert out.events == {Event.QUIC_UNROUTABLE: 1}


# Backends that change ---------------------------------------------------------------------------


@versions
@everywhere
@pytest.mark.parametrize(
    ("flags", "event"),
    [(UP | Flag.DRAINED, BY_ID), (Flag.KNOWN, DOWN), (0, UNROUTABLE)],
    ids=["drains", "fails", "gone"],
)
def test_draining_is_served_failing_and_gone_is_not(
    version: int, mode: str, flags: int, event: set[str], program: Balancer
) -> None:
    service = serve(program, version, mode)
    assert to(program, version, quic.short(cid(2))) == (2, BY_ID)
    program.set_flags(service.backends[2], flags)
    number = 2 if event == BY_ID else 0
    assert to(program, version, quic.short(cid(2))) == (number, event)
    assert to(program, version, quic.short(cid(2)), sport=5) == (number, event)
    program.set_flags(service.backends[2], UP)
    assert to(program, version, quic.short(cid(2))) == (2, BY_ID)


# What is remembered -----------------------------------------------------------------------------


@versions
@pytest.mark.parametrize("affinity_ns", [0, 10**12], ids=["moving", "affinity"])
def test_a_first_flight_stays_with_what_is_remembered_of_its_tuple(
    version: int, affinity_ns: int, lb: Balancer
) -> None:
    """An id that a client made up may look like a server's. One that a server made decides."""
    service = serve(lb, version, affinity_ns=affinity_ns)
    service.move(1, 0)
    first = quic.long(bytes(8), quic.V1, quic.INITIAL[quic.V1])
    assert to(lb, version, first) == (0, FIRST)
    assert len(lb.flows()) == (2 if affinity_ns else 1), "and the client"
    like = [quic.long(cid(2), v, quic.INITIAL[v]) for v in (quic.V1, quic.V2)]
    for packet in (*like, quic.long(cid(2), quic.DRAFT)):
        assert to(lb, version, packet) == (0, FIRST)
    assert to(lb, version, quic.long(cid(2), quic.V1, 2)) == (2, BY_ID)
    assert to(lb, version, quic.short(cid(2))) == (2, BY_ID)
    assert to(lb, version, like[0], sport=7) == (2, BY_ID), "nothing is remembered of this one"
    lb.advance(70)
    assert to(lb, version, like[0]) == (2, BY_ID), "nor of this one any more"


@versions
def test_in_settled_slots_nothing_is_remembered(version: int, lb: Balancer) -> None:
    serve(lb, version)
    assert to(lb, version, quic.long(cid(2))) == (2, BY_ID)
    assert not len(lb.flows())


@versions
@translated
def test_a_translation_is_to_the_server_that_the_id_names(
    version: int, mode: str, program: Balancer
) -> None:
    """And leaves a first flight with its flow; a tuple has one translation at a time."""
    serve(program, version, mode)
    assert to(program, version, quic.long(bytes(8))) == (0, FIRST)
    assert to(program, version, quic.long(cid(2))) == (0, BY_ID), "what is translated stays"
    assert to(program, version, quic.short(cid(0))) == (0, BY_ID)
    assert len(program.entries("nat_fwd")) == len(program.entries("nat_rev")) == 1
    assert to(program, version, quic.short(cid(2))) == (2, BY_ID)
    assert len(program.entries("nat_fwd")) == len(program.entries("nat_rev")) == 1
    assert to(program, version, b"no id") == (2, UNROUTABLE), "it is this connection's now"


@versions
@translated
def test_replies_go_to_where_the_client_is_now(version: int, mode: str, program: Balancer) -> None:
    serve(program, version, mode)
    for sport in (1000, 2000):
        sent = program.run(datagram(version, quic.short(cid(2)), sport=sport))
        out = returned(program, mode, answer(sent, payload=b"pong", proto=PROTO))
        assert out.reasons == {Reason.SENT_TO_CLIENT: 1}
        assert tuple_of(out.packet) == (VIPS[version], 443, f"{CLIENTS[version]}1", sport)


@versions
@everywhere
def test_it_is_asked_beside_the_other_options(version: int, mode: str, program: Balancer) -> None:
    """Ids lead past what is remembered of the client; sources are asked before all."""
    denied = ip_network(f"{CLIENTS[version]}9")
    asked: dict[str, Any] = {"affinity_ns": 10**12, "sources": compile_rules([], [denied])}
    service = serve(program, version, mode, **asked)
    assert to(program, version, quic.long(bytes(8))) == (0, FIRST)
    assert to(program, version, quic.short(cid(3)), sport=7) == (3, BY_ID)
    service.set_slots(service.backends[1])
    assert to(program, version, quic.long(bytes(8)), sport=8) == (0, FIRST), "where the client was"
    out = program.run(datagram(version, quic.short(cid(3)), host=9))
    assert out.reasons == {Reason.DROP_SOURCE_DENIED: 1}


# Against an oracle ------------------------------------------------------------------------------

octets = st.integers(0, 255)
servers = st.sampled_from(SERVERS) | st.binary(min_size=0, max_size=4)
ids = st.builds(
    quic.connection_id, servers, st.sampled_from((3, 3, 3, 0, 7)), st.binary(max_size=9)
)
payloads = st.one_of(
    st.binary(max_size=40),
    st.builds(quic.short, ids | st.binary(max_size=20), st.binary(max_size=9)),
    st.builds(
        quic.long,
        ids | st.binary(max_size=20),
        st.sampled_from((quic.V1, quic.V2, quic.DRAFT, 0)) | st.integers(0, 2**32 - 1),
        st.integers(0, 3),
        st.binary(max_size=9),
    ),
)


@pytest.fixture(scope="module", params=[(v, m) for v in (4, 6) for m in ("dsr-ipip", "nat")])
def asked(request: pytest.FixtureRequest) -> Iterator[Callable[[bytes, int], None]]:
    """Sends a datagram of a fresh client, and compares with the oracle."""
    version, mode = request.param
    with Balancer() as lb:
        serve(lb, version, mode)
        sport = iter(range(1024, 65536))
        known = {s: str(n) for n, s in enumerate(SERVERS)}

        def compare(payload: bytes, cut: int) -> None:
            payload = payload[: len(payload) - cut]
            backend, certain = quic.named(payload, 3, 2, 5, known)
            number, events = to(lb, version, payload, sport=next(sport))
            if backend is not None:
                assert (number, events) == (int(backend), BY_ID)
            else:
                short = certain or len(payload) < 7
                assert (number, events) == (0, UNROUTABLE if short else FIRST)

        yield compare


@settings(max_examples=300)
@given(payloads, st.sampled_from((0, 0, 0, 1, 2, 5)))
def test_random_datagrams(asked: Callable[[bytes, int], None], payload: bytes, cut: int) -> None:
    asked(payload, cut)


def test_that_check_can_fail(
    asked: Callable[[bytes, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quic, "named", lambda *_: (None, True))
    with pytest.raises(AssertionError):
        asked(quic.short(cid(2)), 0)


# The agent's part -------------------------------------------------------------------------------


def test_the_agents_constant_is_the_programs(lb: Balancer) -> None:
    key = lb.map("server_ids").spec.key
    assert key["id"].shape == (agent_quic.SERVER_ID_MAX,)
