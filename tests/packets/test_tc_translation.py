# SPDX-License-Identifier: Apache-2.0
"""Packets through the TC programs: whither they go, and that replies restore the tuple exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from scapy.packet import Packet

from shunt.kern.libbpf import XDP_PASS
from tests.packets.balancer import TCP, UDP, Balancer, Flag, Reason, Slot, mapped
from tests.packets.frames import either, network, tcp, transport, udp
from tests.packets.translator import (
    BACKENDS,
    CLIENT,
    FAMILIES,
    NEXT,
    PROTOS,
    REDIRECT,
    SHOT,
    VIP,
    Translator,
    answer,
    expect,
    tuple_of,
)


@PROTOS
@FAMILIES
def test_local_there_and_back(tc: Translator, ip: int, proto: int) -> None:
    tc.add_service(VIP[ip], 80, proto, backends=BACKENDS[ip][:1], backend_port=8080)
    sent = tc.run(either(proto, CLIENT[ip], VIP[ip], sport=40000, payload=b"odd"))
    expect(sent, NEXT, "SENT_TO_BACKEND")
    # The client is seen, and every checksum is right (Out.packet).
    assert tuple_of(sent.packet) == (CLIENT[ip], 40000, BACKENDS[ip][0], 8080)
    back = tc.leave(answer(sent, payload=b"x" * 7, proto=proto))
    expect(back, NEXT, "SENT_TO_CLIENT")
    assert tuple_of(back.packet) == (VIP[ip], 80, CLIENT[ip], 40000)
    assert bytes(transport(back.packet).payload) == b"x" * 7


@PROTOS
@FAMILIES
def test_remote_there_and_back(tc: Translator, ip: int, proto: int) -> None:
    tc.add_service(VIP[ip], 80, proto, "nat", BACKENDS[ip][:1], backend_port=8080)
    sent = tc.run(either(proto, CLIENT[ip], VIP[ip], sport=40000, payload=b"odd", ttl=9))
    expect(sent, REDIRECT, "SENT_TO_BACKEND")
    source, port, *to = tuple_of(sent.packet)
    assert source == {4: "10.0.0.254", 6: "fd00::fe"}[ip]
    assert port in tc.nat_ports
    assert to == [BACKENDS[ip][0], 8080]
    assert (sent.packet.dst, sent.packet.src) == ("02:00:00:00:00:03", "02:00:00:00:00:02")
    header = network(sent.packet)
    assert (header.ttl if ip == 4 else header.hlim) == 8
    back = tc.run(answer(sent, payload=b"x" * 7, proto=proto))
    expect(back, REDIRECT, "SENT_TO_CLIENT")
    assert tuple_of(back.packet) == (VIP[ip], 80, CLIENT[ip], 40000)
    # The way that the client's packets came.
    assert (back.packet.dst, back.packet.src) == ("02:00:00:00:00:01", "02:00:00:00:00:02")


@PROTOS
def test_a_flow_goes_on_in_the_other_program(make_lb: Callable[..., Balancer], proto: int) -> None:
    """The same maps: an interface may lose or get its XDP program while flows last."""
    xdp = make_lb()
    xdp.add_service(VIP[4], 80, proto, "nat", BACKENDS[4])
    with Translator(maps=xdp.object.maps) as tc:
        for i, (first, then) in enumerate([(xdp, tc), (tc, xdp)]):
            fields = {"sport": 41000 + i}
            sent = first.run(either(proto, CLIENT[4], VIP[4], **fields))
            back = then.run(answer(sent, proto=proto))
            assert back.reasons == {Reason.SENT_TO_CLIENT: 1}
            assert tuple_of(back.packet) == (VIP[4], 80, CLIENT[4], 41000 + i)
            if proto == TCP:
                fields["flags"] = "A"  # type: ignore[assignment]
            again = then.run(either(proto, CLIENT[4], VIP[4], **fields))
            assert tuple_of(again.packet) == tuple_of(sent.packet)


def test_xdp_leaves_local_services_to_tc(lb: Balancer) -> None:
    lb.add_service(VIP[4], 80, TCP, "local", BACKENDS[4])
    out = lb.run(tcp(CLIENT[4], VIP[4]))
    assert out.said == (XDP_PASS, {Reason.PASS_TO_TC: 1})
    assert out.data == bytes(tcp(CLIENT[4], VIP[4]))


@pytest.mark.parametrize(
    "frame",
    [
        tcp(CLIENT[4], VIP[4], dport=81),
        tcp(CLIENT[4], "203.0.113.9"),
        udp(CLIENT[4], VIP[4]),
    ],
    ids=["port", "address", "protocol"],
)
def test_what_is_not_ours_goes_on_untouched(tc: Translator, frame: Packet) -> None:
    tc.add_service(VIP[4], backends=BACKENDS[4])
    raw = bytes(frame)
    for out in (tc.run(raw), tc.leave(raw)):
        assert (out.verdict, out.data, out.reasons) == (NEXT, raw, {})


def test_two_vips_of_one_backend_and_one_client_port(tc: Translator) -> None:
    """The client's own port is taken towards that backend: it gets one of ours, and both work."""
    for vip in ("203.0.113.1", "203.0.113.2"):
        tc.add_service(vip, backends=["10.0.0.1"])
    first, second = (tc.run(tcp(CLIENT[4], f"203.0.113.{n}")) for n in (1, 2))
    assert tuple_of(first.packet)[1] == 40000
    assert tuple_of(second.packet)[0] == CLIENT[4]
    assert tuple_of(second.packet)[1] in tc.nat_ports
    for n, sent in ((1, first), (2, second)):
        back = tc.leave(answer(sent))
        assert tuple_of(back.packet) == (f"203.0.113.{n}", 80, CLIENT[4], 40000)


@pytest.mark.parametrize("end", ["b RA", "c R", "c FA b FA", "b FA c FA"])
def test_a_connection_to_the_backend_itself(tc: Translator, end: str) -> None:
    tc.add_service(VIP[4], backends=["10.0.0.1"])
    sent = tc.run(tcp(CLIENT[4], VIP[4]))
    direct = tcp(CLIENT[4], "10.0.0.1", sport=40001)
    assert tc.run(direct).said == (NEXT, {})
    assert tc.leave(tcp("10.0.0.1", CLIENT[4], "SA", sport=80, dport=40001)).said == (NEXT, {})
    tc.leave(answer(sent))
    tc.run(tcp(CLIENT[4], VIP[4], "A"))
    words = end.split()
    for who, flags in zip(words[::2], words[1::2], strict=True):
        # In the very tuple of the flow, its replies could not be told apart.
        expect(tc.run(tcp(CLIENT[4], "10.0.0.1")), SHOT, "DROP_NAT_CLASH")
        if who == "b":
            tc.leave(answer(sent, flags))
        else:
            tc.run(tcp(CLIENT[4], VIP[4], flags))
    # It has ended, and makes way: the replies are the client's own connection's from now on.
    for flags in ("S", "A"):
        assert tc.run(tcp(CLIENT[4], "10.0.0.1", flags)).said == (NEXT, {})
        assert tc.leave(tcp("10.0.0.1", CLIENT[4], f"{flags}A", sport=80, dport=40000)).said == (
            NEXT, {}
        )  # fmt: skip
    assert [len(tc.map(name).items()[0]) for name in ("nat_fwd", "nat_rev")] == [0, 0]


def test_refusals(tc: Translator) -> None:
    service = tc.add_service(VIP[4], backends=BACKENDS[4])
    expect(tc.run(tcp(CLIENT[4], VIP[4], "A")), SHOT, "DROP_NAT_NO_FLOW")
    expect(tc.run(tcp(CLIENT[4], VIP[4], "R")), SHOT, "DROP_NAT_NO_FLOW")
    expect(tc.run(tcp(CLIENT[4], VIP[4], flags="S")), NEXT, "SENT_TO_BACKEND")
    service.set_slots(0)
    expect(tc.run(tcp(CLIENT[4], VIP[4], sport=40001)), REDIRECT, "SENT_RST_NO_BACKEND")
    assert len(tc.samples()) == 2


def test_udp_without_a_checksum_stays_without(tc: Translator) -> None:
    tc.add_service(VIP[4], 80, UDP, backends=BACKENDS[4])
    frame = udp(CLIENT[4], VIP[4])
    frame.payload.payload.chksum = 0
    assert transport(tc.run(frame).packet).chksum == 0


def test_a_budget_of_new_flows() -> None:
    with Translator(inserts_per_s=3) as tc:
        tc.add_service(VIP[4], backends=BACKENDS[4])
        for i in range(3):
            expect(tc.run(tcp(CLIENT[4], VIP[4], sport=40000 + i)), NEXT, "SENT_TO_BACKEND")
        expect(tc.run(tcp(CLIENT[4], VIP[4], sport=50000)), SHOT, "DROP_NAT_OVER_BUDGET")
        expect(tc.run(tcp(CLIENT[4], VIP[4], sport=40000)), NEXT, "SENT_TO_BACKEND")
        tc.advance(1)
        expect(tc.run(tcp(CLIENT[4], VIP[4], sport=50000)), NEXT, "SENT_TO_BACKEND")


def test_full_tables_refuse_new_flows_and_keep_old_ones() -> None:
    with Translator({"nat_fwd": 64, "nat_rev": 64}, inserts_per_s=10**6) as tc:
        tc.add_service(VIP[4], backends=BACKENDS[4])
        sent = tc.run(tcp(CLIENT[4], VIP[4], sport=1000))
        said = [tc.run(tcp(CLIENT[4], VIP[4], sport=2000 + i)).reasons for i in range(200)]
        assert {Reason.DROP_NAT_TABLE_FULL: 1} in said
        # Entries are there in pairs, or not at all.
        assert len(tc.entries("nat_fwd")) == len(tc.entries("nat_rev"))
        back = tc.leave(answer(sent))
        assert tuple_of(back.packet) == (VIP[4], 80, CLIENT[4], 1000)
        expect(tc.run(tcp(CLIENT[4], VIP[4], "A", sport=1000)), NEXT, "SENT_TO_BACKEND")


def test_a_datagram_does_not_stay_with_a_backend_that_is_down(tc: Translator) -> None:
    service = tc.add_service(VIP[4], 80, UDP, backends=BACKENDS[4])
    sent = tc.run(udp(CLIENT[4], VIP[4]))
    at = BACKENDS[4].index(network(sent.packet).dst)
    tc.set_flags(service.backends[at], Flag.KNOWN)
    service.set_slots(service.backends[1 - at], 0, Slot.SETTLED)
    assert tc.backend_of(udp(CLIENT[4], VIP[4])) == BACKENDS[4][1 - at]
    assert len(tc.entries("nat_fwd")) == len(tc.entries("nat_rev")) == 1


def test_what_does_not_fit_or_has_no_way(tc: Translator) -> None:
    big = tcp(CLIENT[4], VIP[4], payload=b"x" * 1000)
    tc.add_service(VIP[4], mode="nat", backends=["10.0.0.1"], nexthop=tc.add_nexthop(mtu=900))
    expect(tc.run(big), REDIRECT, "SENT_TOO_BIG")
    expect(tc.run(tcp(CLIENT[4], VIP[4], ttl=1, sport=2)), SHOT, "DROP_TTL_EXPIRED")
    tc.map("nexthops").mapped()["ifindex"] = 0
    expect(tc.run(tcp(CLIENT[4], VIP[4])), SHOT, "DROP_NO_NEXTHOP")
    tc.map("nexthops").mapped()["saddr"] = 0
    expect(tc.run(tcp(CLIENT[4], VIP[4], sport=3)), SHOT, "DROP_NAT_NO_SOURCE")


@FAMILIES
def test_a_backend_of_the_other_family_is_xdps_alone(tc: Translator, ip: int) -> None:
    """Nothing is half-translated, also of a flow that XDP has made."""
    service = tc.add_service(VIP[ip], mode="nat", backends=BACKENDS[ip][:1])
    sent = tc.run(tcp(CLIENT[ip], VIP[ip]))
    other = 10 - ip
    service.set_slots(tc.add_backend(service.id, BACKENDS[other][0]))
    expect(tc.run(tcp(CLIENT[ip], VIP[ip], sport=2)), SHOT, "DROP_NAT46_NOT_XDP")
    assert len(tc.entries("nat_fwd")) == len(tc.entries("nat_rev")) == 1
    ((key, rev),) = tc.entries("nat_rev")
    rev["vip"] = mapped(VIP[other])
    tc.map("nat_rev").update(key, rev)
    expect(tc.run(answer(sent)), SHOT, "DROP_NAT46_NOT_XDP")


def test_a_neighbour_that_is_not_resolved_is_the_kernels_to_ask_for(tc: Translator) -> None:
    tc.add_service(VIP[4], mode="nat", backends=["10.0.0.1"])
    tc.map("nexthops").mapped()["dmac"] = 0
    expect(tc.run(tcp(CLIENT[4], VIP[4])), REDIRECT, "SENT_TO_BACKEND")


def test_checks_by_way_of_a_vip_are_left_alone(tc: Translator) -> None:
    """Their packets have a mark; of any other mark nothing is made."""
    tc.add_service(VIP[4], 80, backends=BACKENDS[4][:1])
    syn = tcp(CLIENT[4], VIP[4], sport=40000)
    mark = int(tc.config["check_mark"])
    out = tc.run(syn, mark=mark | 7)
    assert (out.verdict, out.reasons, out.data) == (NEXT, {}, bytes(syn))
    sent = tc.run(syn, mark=mark ^ 1 << 24)
    expect(sent, NEXT, "SENT_TO_BACKEND")
    back = answer(sent)
    out = tc.leave(back, mark=mark)
    assert (out.verdict, out.reasons, out.data) == (NEXT, {}, bytes(back))
    expect(tc.leave(back), NEXT, "SENT_TO_CLIENT")
