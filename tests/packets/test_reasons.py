# SPDX-License-Identifier: Apache-2.0
"""Every reason a packet can leave for, and every event on the way, is reached by a packet."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from ipaddress import ip_network

import numpy as np
import pytest
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from shunt.kern.libbpf import XDP_DROP, XDP_PASS, XDP_TX
from shunt.lb.model import RateLimit
from shunt.policy.sources import compile_rules
from tests.packets import nat46, quic
from tests.packets.balancer import UDP, Balancer, Event, Flag, Out, Reason
from tests.packets.frames import (
    OWN_MAC,
    ROUTER_MAC,
    ether,
    ip,
    network,
    tcp,
    udp,
)
from tests.packets.hooked import HOOKS, hooked
from tests.packets.private import FORWARDING, in_namespace
from tests.packets.test_echo import ping, pinged
from tests.packets.test_fragments import early
from tests.packets.test_icmp import error
from tests.packets.test_nexthops import NETWORK
from tests.packets.test_quic import cid, datagram, serve

CLIENT, VIP, BACKEND = "192.0.2.1", "203.0.113.1", "10.0.0.1"

MakeLb = Callable[..., Balancer]
Scenario = Callable[[MakeLb], Out]
REASONS: dict[str, Scenario] = {}
EVENTS: dict[str, Scenario] = {}


def shows(name: str, into: dict[str, Scenario] = REASONS) -> Callable[[Scenario], Scenario]:
    def keep(scenario: Scenario) -> Scenario:
        assert name not in into
        into[name] = scenario
        return scenario

    return keep


@shows("PASS_NOT_IP")
def arp(make_lb: MakeLb) -> Out:
    return make_lb().run(Ether(src=ROUTER_MAC, dst=OWN_MAC) / ARP())


@shows("PASS_NOT_OURS")
def nobodys_port(make_lb: MakeLb) -> Out:
    return make_lb().run(tcp(CLIENT, VIP))


@shows("PASS_FRAGMENT")
def fragment(make_lb: MakeLb) -> Out:
    return make_lb().run(ether(ip(CLIENT, VIP, proto=UDP, flags="", frag=9) / Raw(bytes(8))))


@shows("PASS_MALFORMED")
def cut_in_the_tcp_header(make_lb: MakeLb) -> Out:
    return make_lb().run(bytes(tcp(CLIENT, VIP))[:50])


@shows("SENT_TO_BACKEND")
def settled(make_lb: MakeLb) -> Out:
    lb = make_lb()
    lb.add_service(VIP, backends=[BACKEND])
    return lb.run(tcp(CLIENT, VIP))


@shows("PASS_TO_FRAGMENT")
def wrapped_for_the_stack(make_lb: MakeLb) -> Out:
    lb = make_lb()
    lb.add_service(VIP, proto=UDP, backends=[BACKEND])
    return lb.run(udp(CLIENT, VIP, payload=bytes(1460), flags=""))


@shows("SENT_ERROR_TO_BACKEND")
def error_about_a_reply(make_lb: MakeLb) -> Out:
    lb = make_lb()
    lb.add_service(VIP, backends=[BACKEND])
    return lb.run(error(4, VIP, network(tcp(VIP, CLIENT, "SA", sport=80, dport=40000))))


@shows("SENT_ERROR_TO_CLIENT")
def error_about_a_translated_packet(make_lb: MakeLb) -> Out:
    lb = make_lb()
    lb.add_service(VIP, mode="nat", backends=[BACKEND])
    sent = network(lb.run(tcp(CLIENT, VIP)).packet)
    return lb.run(error(4, sent.src, sent))


@shows("SENT_ECHO_REPLY")
def ping_of_a_vip(make_lb: MakeLb) -> Out:
    return pinged(make_lb(), ping(4, CLIENT, VIP))


@shows("SENT_TO_CLIENT")
def translated_reply(make_lb: MakeLb) -> Out:
    lb = make_lb()
    lb.add_service(VIP, mode="nat", backends=[BACKEND])
    sent = lb.run(tcp(CLIENT, VIP)).packet
    return lb.run(tcp(sent.payload.dst, sent.payload.src, "SA", sport=80, dport=sent.sport))


@shows("SENT_RST_NO_BACKEND")
def tcp_without_backends(make_lb: MakeLb) -> Out:
    lb = make_lb()
    lb.add_service(VIP)
    return lb.run(tcp(CLIENT, VIP))


@shows("SENT_UNREACHABLE")
def udp_without_backends(make_lb: MakeLb) -> Out:
    lb = make_lb()
    lb.add_service(VIP, proto=UDP)
    return lb.run(udp(CLIENT, VIP))


@shows("SENT_RST_NO_FLOW")
def nat_without_the_flow(make_lb: MakeLb) -> Out:
    lb = make_lb()
    lb.add_service(VIP, mode="nat", backends=[BACKEND])
    return lb.run(tcp(CLIENT, VIP, "A"))


@shows("SENT_TOO_BIG")
def too_big(make_lb: MakeLb) -> Out:
    lb = make_lb()
    lb.add_service(VIP, backends=[BACKEND])
    return lb.run(tcp(CLIENT, VIP, "A", payload=bytes(1460)))


@shows("DROP_NO_BACKEND")
def reset_without_backends(make_lb: MakeLb) -> Out:
    lb = make_lb()
    lb.add_service(VIP)
    return lb.run(tcp(CLIENT, VIP, "R"))


@shows("DROP_TOO_BIG")
def too_big_and_over_budget(make_lb: MakeLb) -> Out:
    lb = make_lb(answers_per_s=0)
    lb.add_service(VIP, backends=[BACKEND])
    return lb.run(tcp(CLIENT, VIP, "A", payload=bytes(1460)))


@shows("DROP_NO_NEXTHOP")
def unknown_neighbour(make_lb: MakeLb) -> Out:
    lb = make_lb()
    # The loopback interface is not one that the kernel forwards from.
    lb.add_service(VIP, backends=[BACKEND], nexthop=0)
    return lb.run(tcp(CLIENT, VIP))


@shows("DROP_TTL_EXPIRED")
def last_hop_was_this_one(make_lb: MakeLb) -> Out:
    lb = make_lb()
    lb.add_service(VIP, mode="dsr-l2", backends=[BACKEND])
    return lb.run(tcp(CLIENT, VIP, ttl=1))


@shows("DROP_NO_HEADROOM")
def driver_without_headroom(make_lb: MakeLb) -> Out:
    lb = make_lb()
    lb.add_service(VIP, backends=[BACKEND])
    return lb.run_without_headroom(bytes(tcp(CLIENT, VIP, payload=bytes(128 - 54))))


@shows("DROP_NAT_NO_FLOW")
def nat_reset_without_the_flow(make_lb: MakeLb) -> Out:
    lb = make_lb()
    lb.add_service(VIP, mode="nat", backends=[BACKEND])
    return lb.run(tcp(CLIENT, VIP, "R"))


@shows("DROP_NAT_NO_PORT")
def nat_out_of_ports(make_lb: MakeLb) -> Out:
    lb = make_lb(nat_port_count=1)
    lb.add_service(VIP, mode="nat", backends=[BACKEND])
    lb.run(tcp(CLIENT, VIP, sport=1))
    return lb.run(tcp(CLIENT, VIP, sport=2))


@shows("DROP_NAT_TABLE_FULL")
def nat_table_full(make_lb: MakeLb) -> Out:
    lb = make_lb({"nat_rev": 1})
    lb.add_service(VIP, mode="nat", backends=[BACKEND])
    lb.run(tcp(CLIENT, VIP, sport=1))
    return lb.run(tcp(CLIENT, VIP, sport=2))


@shows("DROP_NAT_OVER_BUDGET")
def nat_too_many_new_flows(make_lb: MakeLb) -> Out:
    (lb := make_lb(inserts_per_s=0)).add_service(VIP, mode="nat", backends=[BACKEND])
    return lb.run(tcp(CLIENT, VIP))


@shows("DROP_NAT_NO_SOURCE")
def nat_without_an_address_of_our_own(make_lb: MakeLb) -> Out:
    lb = make_lb()
    service = lb.add_service(VIP, mode="nat")
    lb.add_backend(service.id, BACKEND, nexthop=lb.add_nexthop(saddr=None))
    service.set_slots(1)
    return lb.run(tcp(CLIENT, VIP))


@shows("DROP_HOOK")
def a_hook_says_so(make_lb: MakeLb) -> Out:
    lb = make_lb(hooks=True)
    with hooked(lb, HOOKS / "hook_drops.bpf.o"):
        return lb.run(tcp(CLIENT, VIP))


@shows("DROP_BAD_TABLE")
def slot_of_a_backend_that_is_gone(make_lb: MakeLb) -> Out:
    lb = make_lb()
    service = lb.add_service(VIP, backends=[BACKEND])
    lb.set_flags(service.backends[0], 0)
    return lb.run(tcp(CLIENT, VIP))


@shows("FLOW_REMEMBERED", EVENTS)
def new_flow_on_a_moving_slot(make_lb: MakeLb) -> Out:
    lb = make_lb()
    lb.add_service(VIP, backends=[BACKEND, "10.0.0.2"]).move()
    return lb.run(tcp(CLIENT, VIP))


@shows("FLOW_TABLE_FULL", EVENTS)
def no_room_for_the_flow(make_lb: MakeLb) -> Out:
    lb = make_lb({"flows": 1})
    lb.add_service(VIP, backends=[BACKEND, "10.0.0.2"]).move()
    lb.run(tcp(CLIENT, VIP, sport=1))
    return lb.run(tcp(CLIENT, VIP, sport=2))


@shows("FLOW_OVER_BUDGET", EVENTS)
def no_token_for_the_flow(make_lb: MakeLb) -> Out:
    lb = make_lb(inserts_per_s=0)
    lb.add_service(VIP, backends=[BACKEND, "10.0.0.2"]).move()
    return lb.run(tcp(CLIENT, VIP))


@shows("FLOW_UNPROTECTED", EVENTS)
def nowhere_safe_to_go(make_lb: MakeLb) -> Out:
    lb = make_lb(inserts_per_s=0)
    service = lb.add_service(VIP, backends=[BACKEND, "10.0.0.2"])
    service.move()
    lb.set_flags(service.backends[0], 0)
    return lb.run(tcp(CLIENT, VIP))


@shows("DROP_SOURCE_DENIED")
def client_denied(make_lb: MakeLb) -> Out:
    lb = make_lb()
    rules = compile_rules([], [ip_network("192.0.2.0/24")])
    lb.add_service(VIP, backends=[BACKEND]).ask(sources=rules)
    return lb.run(tcp(CLIENT, VIP))


@shows("DROP_RATE_LIMITED")
def connections_too_fast(make_lb: MakeLb) -> Out:
    lb = make_lb()
    lb.add_service(VIP, backends=[BACKEND]).ask(rate=RateLimit(1, 1))
    lb.run(tcp(CLIENT, VIP))
    return lb.run(tcp(CLIENT, VIP, sport=2))


@shows("CLIENT_REMEMBERED", EVENTS)
def client_of_a_service_with_affinity(make_lb: MakeLb) -> Out:
    lb = make_lb()
    lb.add_service(VIP, backends=[BACKEND]).ask(affinity_ns=10**12)
    return lb.run(tcp(CLIENT, VIP))


@shows("CLIENT_NOT_REMEMBERED", EVENTS)
def no_token_for_the_client(make_lb: MakeLb) -> Out:
    lb = make_lb(inserts_per_s=0)
    lb.add_service(VIP, backends=[BACKEND]).ask(affinity_ns=10**12)
    return lb.run(tcp(CLIENT, VIP))


@shows("FRAGMENT_FIRST", EVENTS)
def first_fragment(make_lb: MakeLb) -> Out:
    lb = make_lb()
    lb.add_service(VIP, proto=UDP, backends=[BACKEND])
    return lb.run(udp(CLIENT, VIP, flags="MF", payload=bytes(64)))


@shows("FRAGMENT_LATE", EVENTS)
def fragment_half_a_minute_late(make_lb: MakeLb) -> Out:
    lb = make_lb()
    lb.add_service(VIP, proto=UDP, backends=[BACKEND])
    lb.run(udp(CLIENT, VIP, flags="MF", payload=bytes(64), id=7))
    lb.advance(30.1)
    return lb.run(ether(ip(CLIENT, VIP, proto=UDP, flags="", frag=9, id=7) / Raw(bytes(8))))


@shows("NAT_CREATED", EVENTS)
def new_translation(make_lb: MakeLb) -> Out:
    lb = make_lb()
    lb.add_service(VIP, mode="nat", backends=[BACKEND])
    return lb.run(tcp(CLIENT, VIP))


@shows("NAT_COLLISION", EVENTS)
def port_taken(make_lb: MakeLb) -> Out:
    return nat_out_of_ports(make_lb)


@shows("NAT_ADOPTED", EVENTS)
def another_processor_was_first(make_lb: MakeLb) -> Out:
    lb = make_lb()
    lb.add_service(VIP, mode="nat", backends=[BACKEND])
    lb.run(tcp(CLIENT, VIP))
    ((key, value),) = lb.entries("nat_fwd")
    # The look-up finds nothing, the insertion something: as if it had come in between.
    value["word"] ^= np.uint64(1 << 63)
    lb.map("nat_fwd").update(key, value)
    return lb.run(tcp(CLIENT, VIP))


@shows("FIB_FALLBACK", EVENTS)
def next_hop_known_to_the_kernel_alone(make_lb: MakeLb) -> Out:
    lb = make_lb()
    lb.add_service(VIP, backends=["10.9.0.1"], nexthop=0)
    return in_namespace(lambda: lb.run(tcp(CLIENT, VIP)), NETWORK, FORWARDING)


@shows("SAMPLE_LOST", EVENTS)
def ring_full(make_lb: MakeLb) -> Out:
    lb = make_lb({"samples": 4096})
    lb.add_service(VIP)
    packet = tcp(CLIENT, VIP, "R")
    return next(out for _ in range(100) if (out := lb.run(packet)).events)


# See test_tc_*.py.
TC = {*(f"DROP_NAT_{w}" for w in ("CLASH", "FRAGMENT", "INVALID", "MALFORMED", "SCTP_PORT"))}
TC |= {"DROP_NAT46_NOT_XDP", "PASS_TO_TC", "SENT_MASQUERADED"}
REASONS |= {"DROP_NAT46_FRAGMENT": nat46.fragment, "DROP_NAT46_NO_EQUAL": nat46.source_route}


def quic_datagram(make_lb: MakeLb, payload: bytes) -> Out:
    lb = make_lb()
    lb.set_flags(serve(lb, 4).backends[3], Flag.KNOWN)
    return lb.run(datagram(4, payload))


EVENTS |= {
    "FRAGMENT_EARLY": lambda make_lb: early(make_lb()),
    "QUIC_BY_ID": partial(quic_datagram, payload=quic.short(cid(2))),
    "QUIC_FIRST": partial(quic_datagram, payload=quic.long(bytes(8))),
    "QUIC_UNROUTABLE": partial(quic_datagram, payload=quic.short(b"")),
    "QUIC_DOWN": partial(quic_datagram, payload=quic.short(cid(3))),
}


def test_every_reason_has_its_packet() -> None:
    assert set(REASONS) | TC | {"COUNT"} == set(Reason.__members__)


@pytest.mark.parametrize("name", sorted(REASONS))
def test_reason(name: str, make_lb: MakeLb) -> None:
    out = REASONS[name](make_lb)
    verdict = {"PASS": XDP_PASS, "SENT": XDP_TX, "DROP": XDP_DROP}[name[:4]]
    assert out.said == (verdict, {Reason[name]: 1})


def test_every_event_has_its_packet() -> None:
    assert set(EVENTS) | {"COUNT"} == set(Event.__members__)


@pytest.mark.parametrize("name", sorted(EVENTS))
def test_event(name: str, make_lb: MakeLb) -> None:
    assert EVENTS[name](make_lb).events[Event[name]] >= 1
