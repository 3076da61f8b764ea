# SPDX-License-Identifier: Apache-2.0
"""What leaves the node gets its address, and replies come back to whoever sent it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from ipaddress import ip_network

import numpy as np
import pytest
from scapy.packet import Packet

from shunt.ipam import masquerade
from shunt.lb.compile import mapped
from shunt.lb.model import IPNetwork
from tests.packets.balancer import LOOPBACK, TCP, UDP, Balancer, Out, Reason
from tests.packets.frames import either, network, tcp, transport, udp
from tests.packets.test_icmp import ROUTER, checksums_hold, error, quote_of
from tests.packets.test_icmp import tuple_of as quoted_tuple
from tests.packets.translator import (
    BACKENDS,
    CLIENT,
    FAMILIES,
    NEXT,
    PROTOS,
    SHOT,
    VIP,
    Track,
    Translator,
    answer,
    expect,
    tuple_of,
)

OWN = {4: "198.51.100.254", 6: "2001:db8:e::fe"}
POD = {4: "10.244.0.7", 6: "fd44::7"}
WORLD = {4: "192.0.2.80", 6: "2001:db8:f::80"}
NEAR = {4: "10.3.0.1", 6: "fd03::1"}
SOURCES = [ip_network("10.244.0.0/16"), ip_network("fd44::/64")]
NOT_TO = [ip_network("10.0.0.0/8"), ip_network("fc00::/7")]


class Masquerader(Translator):
    """Of what leaves by the device that test runs have."""

    def __init__(self, *args: object, own: bool = True, **config: object) -> None:
        super().__init__(*args, masquerade=1, **config)  # type: ignore[arg-type]
        self._own = own
        self._configure()

    def empty(self) -> None:
        super().empty()
        self._configure()

    def _configure(self) -> None:
        self.leaves_by(LOOPBACK, own=self._own)
        for prefix, kinds in masquerade.kinds(SOURCES, NOT_TO).items():
            self.add_net(prefix, kinds)
        for proto in (TCP, UDP):
            self.open_port(proto, *self.nat_ports)

    def leaves_by(self, ifindex: int, own: bool = True) -> None:
        devices = self.map("masq")
        key, value = devices.new_keys(1), devices.new_values(1)
        key["ifindex"] = ifindex
        for ip in (4, 6) if own else ():
            value[f"saddr{ip}"] = np.frombuffer(mapped_of(OWN[ip]), np.uint8)
        devices.update(key[0], value[0])

    def add_net(self, network: IPNetwork, kinds: int) -> None:
        nets = self.map("masq_nets")
        key, value = nets.new_keys(1), nets.new_values(1)
        key["prefix_bits"] = network.prefixlen + (96 if network.version == 4 else 0)
        key["addr"] = np.frombuffer(mapped(network.network_address), np.uint8)
        value["kinds"] = kinds
        nets.update(key[0], value[0])


def mapped_of(text: str) -> bytes:
    return mapped(ip_network(text).network_address)


@pytest.fixture(scope="module")
def translator() -> Iterator[Masquerader]:
    with Masquerader() as found:
        yield found


def test_the_kinds_of_networks_are_the_programs(tc: Masquerader) -> None:
    found = tc.object.btf.enum("masq_net", "MASQ_NET_")
    assert (found["SOURCE"], found["NOT_TO"]) == (masquerade.SOURCE, masquerade.NOT_TO)


@PROTOS
@FAMILIES
def test_a_pod_and_the_world(tc: Masquerader, ip: int, proto: int) -> None:
    sent = tc.leave(either(proto, POD[ip], WORLD[ip], sport=40000, dport=443, payload=b"odd"))
    expect(sent, NEXT, "SENT_MASQUERADED")
    source, port, *to = tuple_of(sent.packet)
    assert (source, to) == (OWN[ip], [WORLD[ip], 443])
    assert port in tc.nat_ports
    back = tc.run(answer(sent, payload=b"x" * 7, proto=proto))
    expect(back, NEXT, "SENT_TO_CLIENT")
    assert tuple_of(back.packet) == (WORLD[ip], 443, POD[ip], 40000)
    assert bytes(transport(back.packet).payload) == b"x" * 7
    # It is no flow of a service's, and its replies do not leave as such.
    assert tc.leave(back.packet).said == (NEXT, {})
    later = {"flags": "A"} if proto == TCP else {}
    again = tc.leave(either(proto, POD[ip], WORLD[ip], sport=40000, dport=443, **later))
    assert tuple_of(again.packet) == tuple_of(sent.packet)


@PROTOS
@FAMILIES
def test_a_client_and_a_backend_elsewhere(tc: Masquerader, ip: int, proto: int) -> None:
    """S41: on its way in the destination is translated, on its way out the source; and back."""
    tc.add_service(VIP[ip], 80, proto, backends=BACKENDS[ip][:1], backend_port=8080)
    inward = tc.run(either(proto, CLIENT[ip], VIP[ip], sport=40000, payload=b"odd"))
    assert tuple_of(inward.packet) == (CLIENT[ip], 40000, BACKENDS[ip][0], 8080)
    sent = tc.leave(inward.packet)
    expect(sent, NEXT, "SENT_MASQUERADED")
    source, _, *to = tuple_of(sent.packet)
    assert (source, to) == (OWN[ip], [BACKENDS[ip][0], 8080])
    back = tc.run(answer(sent, payload=b"x" * 7, proto=proto))
    expect(back, NEXT, "SENT_TO_CLIENT")
    assert tuple_of(back.packet) == (BACKENDS[ip][0], 8080, CLIENT[ip], 40000)
    out = tc.leave(back.packet)
    expect(out, NEXT, "SENT_TO_CLIENT")
    assert tuple_of(out.packet) == (VIP[ip], 80, CLIENT[ip], 40000)
    assert bytes(transport(out.packet).payload) == b"x" * 7
    # Both flows are the service's, with its backend: they end with it.
    of = {(int(v["svc"]), int(v["word"]) & 0xFFFFFFFF) for _, v in tc.entries("nat_rev")}
    assert of == {(1, 1)}


@FAMILIES
def test_a_pod_and_a_backend_elsewhere_keep_their_addresses(tc: Masquerader, ip: int) -> None:
    """S10: the backend sees the pod; its replies find the way to the pod by themselves."""
    tc.add_service(VIP[ip], 80, TCP, backends=BACKENDS[ip][:1], backend_port=8080)
    inward = tc.run(tcp(POD[ip], VIP[ip], sport=40000))
    assert tc.leave(inward.packet).said == (NEXT, {})


@FAMILIES
def test_what_leaves_as_it_is(tc: Masquerader, ip: int) -> None:
    for frame in (
        udp(POD[ip], NEAR[ip], sport=40000, dport=53),  # not to there
        udp(POD[ip], {4: "224.0.0.251", 6: "ff02::fb"}[ip], dport=5353),  # for many
        udp(OWN[ip], WORLD[ip], sport=50000, dport=53),  # this host's own
        udp(CLIENT[ip], WORLD[ip], dport=53),  # through this host, and none of its business
        tcp(POD[ip], NEAR[ip], "A", dport=53),
    ):
        out = tc.leave(frame)
        assert (out.verdict, out.reasons, out.data) == (NEXT, {}, bytes(frame))
    assert tc.entries("nat_rev") == []


def test_other_devices_do_not_lead_out(tc: Masquerader) -> None:
    devices = tc.map("masq")
    devices.delete_many(devices.items()[0])
    tc.leaves_by(77)
    assert tc.leave(udp(POD[4], WORLD[4])).said == (NEXT, {})


def test_not_configured_means_not_looked_at() -> None:
    with Masquerader() as on, Translator(maps=on.object.maps) as off:
        assert off.leave(udp(POD[4], WORLD[4])).said == (NEXT, {})
        expect(on.leave(udp(POD[4], WORLD[4])), NEXT, "SENT_MASQUERADED")


def test_the_longest_prefix_decides(tc: Masquerader) -> None:
    for prefix, kinds in masquerade.kinds(
        [*SOURCES, ip_network("10.0.0.0/7")], [*NOT_TO, ip_network("192.0.2.0/28")]
    ).items():
        tc.add_net(prefix, kinds)
    expect(tc.leave(udp("10.9.9.9", WORLD[4])), NEXT, "SENT_MASQUERADED")
    expect(tc.leave(udp("11.9.9.9", WORLD[4])), NEXT, "SENT_MASQUERADED")
    assert tc.leave(udp("12.0.0.1", WORLD[4])).said == (NEXT, {})
    assert tc.leave(udp(POD[4], "192.0.2.15")).said == (NEXT, {})
    expect(tc.leave(udp(POD[4], "192.0.2.16")), NEXT, "SENT_MASQUERADED")
    assert tc.leave(udp(POD[4], "10.244.0.9")).said == (NEXT, {})


def test_refusals(tc: Masquerader) -> None:
    """S77: what matches no flow where one is required never leaves with a pod's address."""
    for flags in ("A", "SA", "R", "FA"):
        expect(tc.leave(tcp(POD[4], WORLD[4], flags)), SHOT, "DROP_NAT_NO_FLOW")
    expect(tc.leave(tcp(POD[4], WORLD[4])), NEXT, "SENT_MASQUERADED")
    expect(tc.leave(tcp(POD[4], WORLD[4], "A")), SHOT, "DROP_NAT_INVALID")  # nobody has answered
    with Masquerader(own=False) as nameless:
        expect(nameless.leave(udp(POD[4], WORLD[4])), SHOT, "DROP_NAT_NO_SOURCE")
    with Masquerader(inserts_per_s=1) as poor:
        expect(poor.leave(udp(POD[4], WORLD[4], sport=1)), NEXT, "SENT_MASQUERADED")
        expect(poor.leave(udp(POD[4], WORLD[4], sport=2)), SHOT, "DROP_NAT_OVER_BUDGET")
        expect(poor.leave(udp(POD[4], WORLD[4], sport=1)), NEXT, "SENT_MASQUERADED")


@PROTOS
@FAMILIES
def test_ports_of_others_are_left_out(ip: int, proto: int) -> None:
    with Masquerader(nat_port_count=4) as tc:
        tc.exclude_ports(proto, 10001, 10002)
        outs = [tc.leave(either(proto, POD[ip], WORLD[ip], sport=1 + n)) for n in range(20)]
        sent = [out for out in outs if out.verdict == NEXT]
        assert {tuple_of(out.packet)[1] for out in sent} == {10000, 10003}


@PROTOS
@FAMILIES
def test_refusals_are_counted_by_whom_they_were_for(ip: int, proto: int) -> None:
    """Of a service's flow its backend says so, and of nobody's its destination."""
    with Masquerader(nat_port_count=2) as tc:
        for dport, flows in ((443, 7), (444, 4), (445, 2)):
            for sport in range(1, 1 + flows):
                tc.leave(either(proto, POD[ip], WORLD[ip], sport=sport, dport=dport))
        to = mapped_of(WORLD[ip])
        found = {
            (key["addr"].tobytes(), int(key["port"]), int(key["proto"])): int(value["flows"])
            for key, value in tc.entries("masq_refused")
        }
        assert found == {(to, 443, proto): 5, (to, 444, proto): 2}
        tc.add_service(VIP[ip], 80, proto, backends=BACKENDS[ip][:1])
        for sport in range(1, 6):
            tc.leave(tc.run(either(proto, CLIENT[ip], VIP[ip], sport=sport)).packet)
        assert tc.map("nat_refused").mapped()["flows"][:3].tolist() == [0, 3, 0]
        assert len(tc.entries("masq_refused")) == 2


def test_full_tables_refuse_new_flows_and_keep_old_ones() -> None:
    with Masquerader({"nat_fwd": 64, "nat_rev": 64}, inserts_per_s=10**6) as tc:
        sent = tc.leave(tcp(POD[4], WORLD[4], sport=1000))
        said = [tc.leave(tcp(POD[4], WORLD[4], sport=2000 + i)).reasons for i in range(200)]
        assert {Reason.DROP_NAT_TABLE_FULL: 1} in said
        assert len(tc.entries("nat_fwd")) == len(tc.entries("nat_rev"))
        assert tuple_of(tc.run(answer(sent)).packet)[2:] == (POD[4], 1000)
        expect(tc.leave(tcp(POD[4], WORLD[4], "A", sport=1000)), NEXT, "SENT_MASQUERADED")


def test_a_connection_that_has_ended_begins_anew(tc: Masquerader) -> None:
    sent = tc.leave(tcp(POD[4], WORLD[4]))
    tc.run(answer(sent))
    tc.leave(tcp(POD[4], WORLD[4], "A"))
    tc.run(answer(sent, "RA"))
    expect(tc.leave(tcp(POD[4], WORLD[4])), NEXT, "SENT_MASQUERADED")
    ((_, after),) = tc.entries("nat_rev")
    assert int(after["track"]) == Track.TRACKED | Track.MASQUERADED
    assert int(after["svc"]) == 0
    assert len(tc.entries("nat_fwd")) == 1


def pairs(tc: Balancer) -> int:
    """How many flows there are, each with both of its entries."""
    forward, reverse = tc.entries("nat_fwd"), tc.entries("nat_rev")
    assert len(forward) == len(reverse)
    return len(forward)


@FAMILIES
def test_connections_outlive_a_vip_that_comes_where_they_go(tc: Masquerader, ip: int) -> None:
    """They were masqueraded before that address was a VIP's. New ones are for its service."""
    sent = tc.leave(tcp(POD[ip], WORLD[ip], sport=40000))
    tc.run(answer(sent))
    tc.add_service(WORLD[ip], 80, TCP, backends=BACKENDS[ip][:1], backend_port=8080)
    later = tcp(POD[ip], WORLD[ip], "A", sport=40000, payload=b"odd")
    inward = tc.run(later)
    assert (inward.verdict, inward.reasons, inward.data) == (NEXT, {}, bytes(later))
    out = tc.leave(later)
    expect(out, NEXT, "SENT_MASQUERADED")
    assert tuple_of(out.packet) == tuple_of(sent.packet)
    assert tuple_of(tc.run(answer(sent, "A")).packet)[2:] == (POD[ip], 40000)
    anew = tc.run(tcp(POD[ip], WORLD[ip], sport=40000))
    expect(anew, NEXT, "SENT_TO_BACKEND")
    assert tuple_of(anew.packet)[2:] == (BACKENDS[ip][0], 8080)
    assert pairs(tc) == 1
    assert tuple_of(tc.leave(answer(anew)).packet) == (WORLD[ip], 80, POD[ip], 40000)


@FAMILIES
def test_datagrams_follow_a_vip_that_comes_where_they_go(tc: Masquerader, ip: int) -> None:
    tc.leave(udp(POD[ip], WORLD[ip], sport=40000, dport=53))
    tc.add_service(WORLD[ip], 53, UDP, backends=BACKENDS[ip][:1])
    anew = tc.run(udp(POD[ip], WORLD[ip], sport=40000, dport=53))
    assert tuple_of(anew.packet)[2:] == (BACKENDS[ip][0], 53)
    assert pairs(tc) == 1


@PROTOS
@FAMILIES
def test_xdp_does_as_tc_with_what_went_where_a_vip_is(
    lb: Balancer, tc: Masquerader, ip: int, proto: int
) -> None:
    tc.leave(either(proto, POD[ip], WORLD[ip], sport=40000, dport=80))
    tc.add_service(WORLD[ip], 80, proto, "nat", backends=BACKENDS[ip][:1])
    xdp = Balancer(maps=tc.object.maps)
    try:
        if proto == TCP:
            for later in ("A", "FA", "R"):
                frame = tcp(POD[ip], WORLD[ip], later, sport=40000)
                out = xdp.run(frame)
                assert (out.data, out.reasons) == (bytes(frame), {Reason.PASS_NOT_OURS: 1})
        out = xdp.run(either(proto, POD[ip], WORLD[ip], sport=40000, dport=80))
        assert out.reasons == {Reason.SENT_TO_BACKEND: 1}
        assert tuple_of(out.packet)[2:] == (BACKENDS[ip][0], 80)
        assert pairs(tc) == 1
    finally:
        xdp.close()


@PROTOS
@FAMILIES
def test_what_went_to_a_vip_that_is_none_any_more(tc: Masquerader, ip: int, proto: int) -> None:
    """Before the scan has removed it, its next connection leaves the node as anybody's."""
    first = either(proto, POD[ip], VIP[ip], sport=40000, dport=80)
    tc.add_service(VIP[ip], 80, proto, backends=BACKENDS[ip][:1], backend_port=8080)
    tc.run(first)
    out = tc.leave(first)
    expect(out, NEXT, "SENT_MASQUERADED")
    assert tuple_of(out.packet)[2:] == (VIP[ip], 80)
    assert pairs(tc) == 1
    assert tuple_of(tc.run(answer(out, proto=proto)).packet) == (VIP[ip], 80, POD[ip], 40000)


@PROTOS
@FAMILIES
@pytest.mark.parametrize("kind", ["too-big", "unreachable"])
def test_an_error_about_it_reaches_the_sender(
    tc: Masquerader, ip: int, proto: int, kind: str
) -> None:
    """From a router on the way: without it there would be no path MTU discovery."""
    sent = tc.leave(either(proto, POD[ip], WORLD[ip], sport=40000, dport=443, payload=b"y" * 50))
    out = tc.run(error(ip, OWN[ip], network(sent.packet), kind=kind))
    expect(out, NEXT, "SENT_ERROR_TO_CLIENT")
    assert (network(out.packet).src, network(out.packet).dst) == (ROUTER[ip], POD[ip])
    inner = quote_of(out.packet, ip)
    assert quoted_tuple(inner) == (POD[ip], 40000, WORLD[ip], 443)
    checksums_hold(inner, whole=True)


@FAMILIES
def test_an_error_about_a_clients_packet_reaches_the_client(tc: Masquerader, ip: int) -> None:
    tc.add_service(VIP[ip], 80, TCP, backends=BACKENDS[ip][:1], backend_port=8080)
    sent = tc.leave(tc.run(tcp(CLIENT[ip], VIP[ip], sport=40000, payload=b"y" * 50)).packet)
    back = tc.run(error(ip, OWN[ip], network(sent.packet)))
    expect(back, NEXT, "SENT_ERROR_TO_CLIENT")
    out = tc.leave(back.packet)
    expect(out, NEXT, "SENT_ERROR_TO_CLIENT")
    assert network(out.packet).dst == CLIENT[ip]
    assert quoted_tuple(quote_of(out.packet, ip)) == (CLIENT[ip], 40000, VIP[ip], 80)


def test_replies_pass_xdp(lb: Balancer) -> None:
    """On the same maps: what comes back is left for TC."""
    with Masquerader() as tc:
        sent = tc.leave(tcp(POD[4], WORLD[4]))
        xdp = Balancer(maps=tc.object.maps)
        try:
            reply = answer(sent)
            out = xdp.run(reply)
            assert (out.data, out.reasons) == (bytes(reply), {Reason.PASS_NOT_OURS: 1})
        finally:
            xdp.close()


@FAMILIES
def test_random_histories(ip: int) -> None:
    """Pods, clients and whom they ask, all at once, against an oracle that remembers everything."""
    draw = random.Random(ip)
    pods = [POD[ip][:-1] + str(n) for n in range(1, 6)]
    worlds = [WORLD[ip][:-1] + str(n) for n in range(1, 6)]
    clients = [CLIENT[ip][:-1] + str(n) for n in range(1, 6)]
    with Masquerader({"nat_fwd": 8192, "nat_rev": 8192}, inserts_per_s=10**6) as tc:
        tc.add_service(VIP[ip], 80, UDP, backends=BACKENDS[ip], backend_port=8080)
        known: dict[tuple[str, int, str, int], tuple[str, int, str, int]] = {}
        sent: list[tuple[tuple[str, int, str, int], Out]] = []
        for _ in range(1500):
            if sent and draw.random() < 0.4:
                (source, sport, to, dport), out = draw.choice(sent)
                back = tc.run(answer(out, proto=UDP))
                inner = tuple_of(back.packet)
                if to == VIP[ip]:
                    back = tc.leave(back.packet)
                    inner = tuple_of(back.packet)
                assert inner == (to, dport, source, sport)
                continue
            port = draw.randrange(1, 2000)
            if draw.random() < 0.5:
                asked = (draw.choice(pods), port, draw.choice(worlds), draw.randrange(1, 1000))
                first: Packet = udp(asked[0], asked[2], sport=port, dport=asked[3])
            else:
                asked = (draw.choice(clients), port, VIP[ip], 80)
                first = tc.run(udp(asked[0], VIP[ip], sport=port)).packet
            out = tc.leave(first)
            expect(out, NEXT, "SENT_MASQUERADED")
            got = tuple_of(out.packet)
            assert (got[0], got[1] in tc.nat_ports) == (OWN[ip], True)
            assert known.setdefault(asked, got) == got
            sent.append((asked, out))
        # No two flows share a way back.
        assert len(set(known.values())) == len(known)
