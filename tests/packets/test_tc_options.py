# SPDX-License-Identifier: Apache-2.0
"""What a service may ask for beyond balancing is the same where TC translates as in XDP.

Of mode local, and of nat where no XDP program does it; test_options.py and test_quic.py have XDP's.
"""

from __future__ import annotations

from collections import Counter
from ipaddress import ip_address, ip_network

import pytest

from shunt.lb.model import RateLimit
from shunt.policy.sources import compile_rules
from tests.packets import quic
from tests.packets.balancer import TCP, UDP, UP, Balancer, Flag, Reason, Service
from tests.packets.frames import either, tcp, transport, udp
from tests.packets.test_options import (
    AFFINITY_S,
    BACKENDS,
    CLIENTS,
    VIPS,
    connections,
    sent_to,
    serve,
    spread,
    versions,
)
from tests.packets.test_quic import BY_ID, DOWN, FIRST, UNROUTABLE, cid, datagram, to
from tests.packets.test_quic import serve as serve_quic
from tests.packets.translator import NEXT, SHOT, Translator, answer, expect, tuple_of

modes = pytest.mark.parametrize("mode", ["local", "nat"])
protos = pytest.mark.parametrize("proto", [TCP, UDP], ids=["tcp", "udp"])


def backend_to(tc: Translator, proto: int, version: int, host: int, sport: int) -> str:
    """Whose a new connection is."""
    return tc.backend_of(either(proto, f"{CLIENTS[version]}{host}", VIPS[version], sport=sport))


# Affinity ---------------------------------------------------------------------------------------


@versions
@protos
@modes
def test_a_clients_new_connections_go_where_its_last_one_went(
    version: int, proto: int, mode: str, tc: Translator
) -> None:
    serve(tc, version, mode, proto).ask(affinity_ns=AFFINITY_S * 10**9)
    first = {host: backend_to(tc, proto, version, host, 1000) for host in range(1, 30)}
    assert len(set(first.values())) > 4, "clients are spread"
    for host, backend in first.items():
        found = {backend_to(tc, proto, version, host, sport) for sport in range(1001, 1006)}
        assert found == {backend}


@versions
def test_without_affinity_they_spread(version: int, tc: Translator) -> None:
    serve(tc, version, "local")
    assert len({sent_to(tc, version, 1, sport) for sport in range(1000, 1030)}) > 4


@versions
@modes
def test_it_expires_and_each_new_connection_refreshes_it(
    version: int, mode: str, tc: Translator
) -> None:
    service = serve(tc, version, mode)
    service.ask(affinity_ns=100 * 10**9)
    first = {host: sent_to(tc, version, host, 1000) for host in range(1, 20)}
    for sport in range(1001, 1004):
        tc.advance(90)
        spread(service, sport)
        assert {h: sent_to(tc, version, h, sport) for h in first} == first
    tc.advance(102)
    assert {h: sent_to(tc, version, h, 2000) for h in first} != first


@versions
@modes
@pytest.mark.parametrize(
    "flags",
    [Flag.KNOWN, 0, UP | Flag.DRAINED, UP | Flag.REMOVED],
    ids=["fails", "gone", "drains", "removed"],
)
def test_a_backend_that_takes_no_new_ones_is_left_for_another(
    version: int, mode: str, flags: int, tc: Translator
) -> None:
    service = serve(tc, version, mode)
    service.ask(affinity_ns=AFFINITY_S * 10**9)
    was = sent_to(tc, version, 1, 1000)
    left = service.backends[BACKENDS[version].index(was)]
    tc.set_flags(left, flags)
    service.set_slots([b for b in service.backends if b != left])
    then = sent_to(tc, version, 1, 1001)
    assert then != was
    tc.set_flags(left, UP)
    spread(service, 5)
    assert {sent_to(tc, version, 1, sport) for sport in range(1002, 1010)} == {then}


@versions
def test_a_client_that_xdp_remembers_stays_at_tc_and_the_other_way(
    version: int, tc: Translator
) -> None:
    """An interface may lose its XDP program, or get one."""
    service = serve(tc, version, "nat")
    service.ask(affinity_ns=AFFINITY_S * 10**9)
    with Balancer(maps=tc.object.maps) as xdp:
        xdp.clock[...] = tc.clock
        for one, other, hosts in ((xdp, tc, range(1, 15)), (tc, xdp, range(15, 30))):
            spread(service)
            first = {host: sent_to(one, version, host, 1000) for host in hosts}
            spread(service, 3)
            assert {host: sent_to(other, version, host, 1001) for host in hosts} == first


# Hashing by client ------------------------------------------------------------------------------


@versions
@protos
@modes
def test_hashing_by_client_sends_all_of_a_client_to_one_backend(
    version: int, proto: int, mode: str, tc: Translator
) -> None:
    serve(tc, version, mode, proto).ask(hash_client=True)
    seen: Counter[str] = Counter()
    for host in range(1, 60):
        (backend,) = {backend_to(tc, proto, version, host, sport) for sport in (1, 2, 30000)}
        seen[backend] += 1
    assert len(seen) == 8
    assert not len(tc.flows())


@versions
def test_and_the_same_one_as_in_xdp(version: int, tc: Translator, lb: Balancer) -> None:
    for balancer, mode in ((tc, "local"), (lb, "dsr-l2")):
        serve(balancer, version, mode).ask(hash_client=True)
    for host in range(1, 30):
        packet = tcp(f"{CLIENTS[version]}{host}", VIPS[version])
        lb.run(packet)
        counts = lb.counts("backend_stats")["packets"].tolist()
        tc.run(packet)
        assert tc.counts("backend_stats")["packets"].tolist() == counts


# Source ranges ----------------------------------------------------------------------------------


@versions
@protos
@modes
def test_the_longest_source_range_decides(
    version: int, proto: int, mode: str, tc: Translator
) -> None:
    base = {4: "192.0.2.0", 6: "2001:db8:c::"}[version]
    wide, middle, narrow = (
        ip_network(f"{base}/{bits}") for bits in {4: (24, 26, 28), 6: (64, 122, 124)}[version]
    )
    service = serve(tc, version, mode, proto)
    service.ask(sources=compile_rules([wide, narrow], [middle]))
    for host, served in ((1, True), (15, True), (16, False), (63, False), (64, True)):
        out = tc.run(either(proto, str(ip_address(base) + host), VIPS[version]))
        wanted = Reason.SENT_TO_BACKEND if served else Reason.DROP_SOURCE_DENIED
        assert out.reasons == {wanted: 1}, host
        assert (out.verdict == SHOT) is not served
    outside = {4: "198.51.100.1", 6: "2001:db8:d::1"}[version]
    expect(tc.run(either(proto, outside, VIPS[version])), SHOT, "DROP_SOURCE_DENIED")
    assert len(tc.entries("nat_fwd")) == 3, "nothing is kept of the others"


@versions
@modes
def test_an_established_connection_that_is_denied_ends(
    version: int, mode: str, tc: Translator
) -> None:
    service = serve(tc, version, mode)
    client = f"{CLIENTS[version]}1"
    assert sent_to(tc, version, 1, 1)
    service.ask(sources=compile_rules([], [ip_network(client)]))
    expect(tc.run(tcp(client, VIPS[version], "A", sport=1)), SHOT, "DROP_SOURCE_DENIED")
    assert sent_to(tc, version, 2, 1)


# Rates ------------------------------------------------------------------------------------------


@versions
@modes
def test_new_connections_are_limited_for_each_network(
    version: int, mode: str, tc: Translator
) -> None:
    serve(tc, version, mode).ask(rate=RateLimit(10, 5, prefix4=30, prefix6=126))
    assert connections(tc, version, 0, 10, 1000) == 5, "the burst"
    assert connections(tc, version, 1, 10, 1000) == 0, "of the same network"
    assert connections(tc, version, 4, 10, 1000) == 5, "of another"
    tc.advance(0.3)
    assert connections(tc, version, 0, 10, 2000) == 3
    tc.advance(1000)
    assert connections(tc, version, 0, 10, 3000) == 5, "what is not used is not saved up"
    expect(tc.run(tcp(f"{CLIENTS[version]}0", VIPS[version], sport=9)), SHOT, "DROP_RATE_LIMITED")


@versions
@modes
def test_established_connections_are_not_limited(version: int, mode: str, tc: Translator) -> None:
    serve(tc, version, mode).ask(rate=RateLimit(1, 1))
    sent = tc.run(tcp(f"{CLIENTS[version]}1", VIPS[version], sport=1))
    back = tc.leave if mode == "local" else tc.run
    assert back(answer(sent)).reasons == {Reason.SENT_TO_CLIENT: 1}
    was = {sent.packet.payload.dst}
    assert {sent_to(tc, version, 1, 1, flags) for flags in ("A", "PA") * 5} == was


# QUIC by connection id --------------------------------------------------------------------------


@versions
@modes
def test_a_short_header_goes_to_its_server_from_any_address(
    version: int, mode: str, tc: Translator
) -> None:
    serve_quic(tc, version, mode)
    for number in range(4):
        for host, sport in ((1, 1000), (1, 2000), (9, 1000)):
            assert to(tc, version, quic.short(cid(number)), host, sport) == (number, BY_ID)


@versions
@modes
@pytest.mark.parametrize("known", [quic.V1, quic.V2], ids=["v1", "v2"])
def test_so_does_every_packet_of_a_handshake(
    version: int, mode: str, known: int, tc: Translator
) -> None:
    serve_quic(tc, version, mode)
    for sport, kinds in enumerate((quic.INITIAL, quic.ZERO_RTT, quic.HANDSHAKE)):
        packet = quic.long(cid(2), known, kinds[known])
        assert to(tc, version, packet, sport=1000 + sport) == (2, BY_ID)


@versions
@modes
def test_what_names_nobody_goes_by_its_addresses(version: int, mode: str, tc: Translator) -> None:
    serve_quic(tc, version, mode)
    for sport, dcid in enumerate((cid(2, 0), quic.connection_id(b"\xff\xff", 3), b""), 1000):
        assert to(tc, version, quic.short(dcid, b""), sport=sport) == (0, UNROUTABLE)
        initial = quic.long(dcid, quic.V1, quic.INITIAL[quic.V1])
        assert to(tc, version, initial, sport=sport + 1000) == (0, FIRST)


@versions
@modes
@pytest.mark.parametrize(
    ("flags", "event"),
    [(UP | Flag.DRAINED, BY_ID), (Flag.KNOWN, DOWN), (0, UNROUTABLE)],
    ids=["drains", "fails", "gone"],
)
def test_draining_is_served_failing_and_gone_is_not(
    version: int, mode: str, flags: int, event: set[str], tc: Translator
) -> None:
    service = serve_quic(tc, version, mode)
    assert to(tc, version, quic.short(cid(2))) == (2, BY_ID)
    tc.set_flags(service.backends[2], flags)
    number = 2 if event == BY_ID else 0
    assert to(tc, version, quic.short(cid(2))) == (number, event)
    assert to(tc, version, quic.short(cid(2)), sport=5) == (number, event)
    tc.set_flags(service.backends[2], UP)
    assert to(tc, version, quic.short(cid(2)), sport=6) == (2, BY_ID)


def pairs(tc: Translator) -> int:
    forward, reverse = len(tc.entries("nat_fwd")), len(tc.entries("nat_rev"))
    assert forward == reverse
    return forward


@versions
@modes
def test_a_tuple_has_one_translation_at_a_time(version: int, mode: str, tc: Translator) -> None:
    """A first flight stays with its flow; the id that a server made moves it."""
    serve_quic(tc, version, mode)
    assert to(tc, version, quic.long(bytes(8))) == (0, FIRST)
    assert to(tc, version, quic.long(cid(2))) == (0, BY_ID), "what is translated stays"
    assert to(tc, version, quic.short(cid(0))) == (0, BY_ID)
    assert pairs(tc) == 1
    assert to(tc, version, quic.short(cid(2))) == (2, BY_ID)
    assert pairs(tc) == 1
    assert to(tc, version, b"no id") == (2, UNROUTABLE), "it is this connection's now"


@versions
def test_replies_go_to_where_the_client_is_now(version: int, tc: Translator) -> None:
    serve_quic(tc, version, "local")
    for sport in (1000, 2000):
        sent = tc.run(datagram(version, quic.short(cid(2)), sport=sport))
        assert transport(sent.packet).sport == sport
        back = tc.leave(answer(sent, payload=b"pong", proto=UDP))
        expect(back, NEXT, "SENT_TO_CLIENT")
        assert tuple_of(back.packet) == (VIPS[version], 443, f"{CLIENTS[version]}1", sport)


@versions
def test_it_is_asked_beside_the_other_options(version: int, tc: Translator) -> None:
    """Ids lead past what is remembered of the client; sources are asked before all."""
    denied = ip_network(f"{CLIENTS[version]}9")
    service: Service = serve_quic(
        tc, version, "local", affinity_ns=10**12, sources=compile_rules([], [denied])
    )
    assert to(tc, version, quic.long(bytes(8))) == (0, FIRST)
    assert to(tc, version, quic.short(cid(3)), sport=7) == (3, BY_ID)
    service.set_slots(service.backends[1])
    assert to(tc, version, quic.long(bytes(8)), sport=8) == (0, FIRST), "where the client was"
    out = tc.run(datagram(version, quic.short(cid(3)), host=9))
    expect(out, SHOT, "DROP_SOURCE_DENIED")


def test_that_check_can_fail(tc: Translator) -> None:
    serve_quic(tc, 4, "local").ask()
    out = tc.run(udp(f"{CLIENTS[4]}1", VIPS[4], dport=443, payload=quic.short(cid(3))))
    assert out.packet.payload.dst != BACKENDS[4][3]
