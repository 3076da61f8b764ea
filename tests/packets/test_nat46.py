# SPDX-License-Identifier: Apache-2.0
"""Mode nat with a backend of the other family, there and back (RFC 7915)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP
from scapy.packet import Packet

from shunt.kern.libbpf import XDP_DROP, XDP_TX
from tests.packets.balancer import BACKEND_MAC, TCP, UDP, Balancer, Event, Reason, mapped
from tests.packets.frames import (
    ETH,
    OWN_MAC,
    ROUTER_MAC,
    either,
    network,
    tcp,
    transport,
    udp,
    verify,
)
from tests.packets.nat46 import (
    BACKEND,
    ENDS,
    HEADER,
    OTHER,
    OWN,
    VIP,
    clients,
    rebuilt,
    serve,
)
from tests.packets.nat46 import hops as hops_of
from tests.packets.private import in_namespace
from tests.packets.test_nat import answer_to, forwarded, protocols, returned
from tests.packets.test_vlan import ONE, TWO, tagged, untag, word

MakeLb = Callable[..., Balancer]
TRANSPORT = {TCP: 20, UDP: 8}


class Kept:
    """One balancer for all examples of a test by Hypothesis: the same services, other backends."""

    def __init__(self, lb: Balancer) -> None:
        self.lb = lb
        self._services = {(c, p): serve(lb, c, p) for c in (4, 6) for p in (TCP, UDP)}

    def begin(self, client: int, proto: int, own: str, backend: str, port: int) -> None:
        """Nobody is known, and the service has this one backend."""
        for name in ("nat_fwd", "nat_rev"):
            self.lb.map(name).delete_many(self.lb.map(name).items()[0])
        row = self.lb.map("backends").mapped()[self._services[client, proto].backends[0]]
        row["addr"], row["port"] = mapped(backend), port
        self.lb.map("nexthops").mapped()["saddr"][row["nexthop"]] = mapped(own)


@pytest.fixture(scope="module")
def kept() -> Iterator[Kept]:
    with Balancer() as lb:
        yield Kept(lb)


def as_written(packet: Packet, like: Packet) -> bytes:
    """The frame that is wanted; of IPv4 with the identification that `like` has, and DF by size."""
    if IP in packet:
        whole = IP(bytes(network(packet))).len
        packet.payload.id, packet.payload.flags = network(like).id, "DF" if whole > 1260 else ""
        if whole > 1260:
            assert network(like).id == 0
    packet.src, packet.dst = like.src, like.dst
    return bytes(packet)


@protocols
@clients
@pytest.mark.parametrize("port", [0, 8080])
@pytest.mark.parametrize("payload", [b"", b"x", b"hello, backend"])
def test_round_trip(client: int, proto: int, port: int, payload: bytes, lb: Balancer) -> None:
    """Both frames are exact."""
    other = OTHER[client]
    serve(lb, client, proto, port)
    out = lb.run(either(proto, *ENDS[client], sport=5555, payload=payload, ttl=33, tos=0x2E))
    sent = forwarded(out)
    assert out.events == {Event.NAT_CREATED: 1}
    assert transport(sent).sport in lb.nat_ports
    ends: dict[str, Any] = {"sport": transport(sent).sport, "dport": port or 80}
    want = either(proto, OWN[other], BACKEND[other], **ends, payload=payload, ttl=32, tos=0x2E)
    assert out.data == as_written(want, sent)
    assert (sent.src, sent.dst) == (OWN_MAC, BACKEND_MAC)

    back = lb.run(answer_to(sent, payload=payload[::-1], ttl=60, tos=0x03))
    restored = returned(back)
    ends = {"sport": 80, "dport": 5555, "payload": payload[::-1], "ttl": 59, "tos": 0x03}
    if proto == TCP:
        ends["flags"] = "SA"
    want = either(proto, *ENDS[client][::-1], **ends)
    assert back.data == as_written(want, restored)
    assert (restored.src, restored.dst) == (OWN_MAC, ROUTER_MAC)


ports = st.integers(1, 65535)
some = st.fixed_dictionaries(
    {
        "payload": st.one_of(
            st.binary(max_size=64),
            st.integers(0, 1420).map(bytes),
            st.integers(0, 1420).flatmap(lambda n: st.binary(min_size=n, max_size=n)),
            st.integers(1, 1420).map(lambda n: b"\xff" * n),
        ),
        "tos": st.integers(0, 255),
        "ttl": st.integers(2, 255),
    }
)
addresses = {
    4: st.integers(1, 2**32 - 1).map(lambda n: str(IPv4Address(n))),
    6: st.integers(1, 2**128 - 1).map(lambda n: str(IPv6Address(n))),
}
SEQUENCE = st.integers(0, 2**32 - 1)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), client=st.sampled_from([4, 6]), proto=st.sampled_from([TCP, UDP]))
def test_whatever_goes_there_comes_back(
    kept: Kept, data: st.DataObject, client: int, proto: int
) -> None:
    """Payload, DSCP and ECN arrive as they were; the reply has the first packet's tuple exactly."""
    own, backend = data.draw(addresses[OTHER[client]]), data.draw(addresses[OTHER[client]])
    kept.begin(client, proto, own, backend, data.draw(ports))
    source, sport = data.draw(addresses[client]), data.draw(ports)
    there, back = data.draw(some), data.draw(some)
    seq = {"seq": data.draw(SEQUENCE), "ack": data.draw(SEQUENCE)} if proto == TCP else {}

    out = kept.lb.run(either(proto, source, VIP[client], sport=sport, **seq, **there))
    sent = forwarded(out)
    carried(out.data, sent, proto, there)
    assert [ip_address(a) for a in (network(sent).src, network(sent).dst)] == [
        ip_address(a) for a in (own, backend)
    ]
    assert all(getattr(transport(sent), name) == value for name, value in seq.items())

    out = kept.lb.run(answer_to(sent, **seq, **back))
    restored = returned(out)
    carried(out.data, restored, proto, back)
    assert (network(restored).src, transport(restored).sport) == (VIP[client], 80)
    assert ip_address(network(restored).dst) == ip_address(source)
    assert transport(restored).dport == sport


def carried(frame: bytes, packet: Packet, proto: int, fields: dict[str, Any]) -> None:
    """The payload is there; lengths and checksums are what dpkt makes of them, too."""
    header = network(packet)
    start = ETH + HEADER[header.version] + TRANSPORT[proto]
    assert frame[start:] == fields["payload"]
    assert hops_of(packet) == fields["ttl"] - 1
    assert (header.tos if header.version == 4 else header.tc) == fields["tos"]
    again = rebuilt(frame)
    if proto == TCP or transport(packet).chksum != 0xFFFF:  # dpkt writes 0 there
        assert again == frame


def test_that_a_wrong_checksum_would_be_seen(lb: Balancer) -> None:
    serve(lb, 4, TCP)
    frame = bytearray(lb.run(tcp(*ENDS[4], payload=b"x")).data)
    assert rebuilt(bytes(frame)) == frame
    frame[-1] ^= 1
    assert rebuilt(bytes(frame)) != frame
    with pytest.raises(AssertionError, match="checksum"):
        verify(bytes(frame))


def test_backends_of_both_families_behind_vips_of_both(lb: Balancer) -> None:
    service = lb.add_service(VIP[4], mode="nat", backends=[BACKEND[4], BACKEND[6]])
    lb.add_frontend(service, VIP[6], 80)
    seen = set()
    for client in (4, 6):
        for backend, host in zip(service.backends, (BACKEND[4], BACKEND[6]), strict=True):
            service.set_slots(backend)
            sent = forwarded(lb.run(tcp(*ENDS[client], sport=1000 + backend)))
            assert network(sent).dst == host
            back = returned(lb.run(answer_to(sent)))
            assert (network(back).src, network(back).dst) == ENDS[client][::-1]
            assert transport(back).dport == 1000 + backend
            seen.add((client, network(sent).version))
    assert len(seen) == 4


@pytest.mark.parametrize("backend", [4, 6])
def test_a_client_that_writes_an_ipv4_mapped_source_is_one_of_ipv6(
    backend: int, lb: Balancer
) -> None:
    lb.add_service(VIP[6], mode="nat", backends=[BACKEND[backend]])
    client = "::ffff:192.0.2.1"
    sent = forwarded(lb.run(tcp(client, VIP[6], sport=7)))
    assert network(sent).version == backend
    back = returned(lb.run(answer_to(sent)))
    assert (network(back).src, network(back).dst) == (VIP[6], client)


@clients
def test_a_connection_until_its_end(client: int, lb: Balancer) -> None:
    serve(lb, client, TCP)
    sent = forwarded(lb.run(tcp(*ENDS[client], "S")))
    returned(lb.run(answer_to(sent, flags="SA")))
    assert transport(forwarded(lb.run(tcp(*ENDS[client], "A")))).sport == transport(sent).sport
    forwarded(lb.run(tcp(*ENDS[client], "FA")))
    returned(lb.run(answer_to(sent, flags="FA")))
    ((_, fwd),) = lb.entries("nat_fwd")
    ((_, rev),) = lb.entries("nat_rev")
    assert (int(fwd["closed"]), int(rev["closed"])) == (1, 2)


# Sizes ------------------------------------------------------------------------------------------


def sized(client: int, size: int, **fields: Any) -> Packet:
    """A segment of a connection; `size` bytes of IP packet."""
    return tcp(*ENDS[client], "A", payload=bytes(size - HEADER[client] - 20), **fields)


@clients
def test_what_does_not_fit_any_more_is_answered_with_the_senders_mtu(
    client: int, lb: Balancer
) -> None:
    serve(lb, client, TCP)
    forwarded(lb.run(tcp(*ENDS[client])))
    most = 1480 if client == 4 else 1520
    sent = forwarded(lb.run(sized(client, most)))
    assert len(sent) == ETH + 1500
    out = lb.run(sized(client, most + 1))
    assert out.said == (XDP_TX, {Reason.SENT_TOO_BIG: 1})
    answer = out.packet
    assert (network(answer).src, network(answer).dst) == ENDS[client][::-1]
    told = answer["ICMP"].nexthopmtu if client == 4 else answer["ICMPv6PacketTooBig"].mtu
    assert told == most


def test_ipv6_senders_are_told_no_mtu_below_theirs(lb: Balancer) -> None:
    service = lb.add_service(VIP[6], mode="nat")
    hop = lb.add_nexthop(mtu=1000)
    service.set_slots(lb.add_backend(service.id, BACKEND[4], nexthop=hop))
    forwarded(lb.run(tcp(*ENDS[6])))
    out = lb.run(sized(6, 1400))
    assert out.reasons == {Reason.SENT_TOO_BIG: 1}
    assert out.packet["ICMPv6PacketTooBig"].mtu == 1280


def test_without_df_what_does_not_fit_is_dropped(lb: Balancer) -> None:
    serve(lb, 4, TCP)
    forwarded(lb.run(tcp(*ENDS[4], flags="S")))
    packet = sized(4, 1481)
    packet.payload.flags = ""
    assert lb.run(packet).said == (XDP_DROP, {Reason.DROP_TOO_BIG: 1})


@pytest.mark.parametrize(("size", "df"), [(1280, ""), (1281, "DF")])
def test_df_of_what_was_ipv6(size: int, df: str, lb: Balancer) -> None:
    serve(lb, 6, TCP)
    forwarded(lb.run(tcp(*ENDS[6])))
    sent = network(forwarded(lb.run(sized(6, size))))
    assert (sent.flags, sent.len) == (df, size - 20)


@clients
def test_a_reply_has_to_fit_the_clients_link(client: int, lb: Balancer) -> None:
    serve(lb, client, TCP)
    sent = forwarded(lb.run(tcp(*ENDS[client])))
    most = 1480 if client == 6 else 1520

    def replies() -> tuple[Any, Any]:
        size = most - HEADER[OTHER[client]] - 20
        return lb.run(answer_to(sent, flags="A", payload=bytes(size))), lb.run(
            answer_to(sent, flags="A", payload=bytes(size + 1))
        )

    fits, too_big = in_namespace(replies, ["link set lo mtu 1500"])
    assert len(returned(fits)) == ETH + 1500
    assert too_big.said == (XDP_TX, {Reason.SENT_TOO_BIG: 1})
    answer = too_big.packet
    assert network(answer).dst == BACKEND[OTHER[client]]
    told = answer["ICMP"].nexthopmtu if client == 6 else answer["ICMPv6PacketTooBig"].mtu
    assert told == most


@clients
def test_ttl_expires_on_both_ways(client: int, lb: Balancer) -> None:
    serve(lb, client, TCP)
    assert lb.run(tcp(*ENDS[client], ttl=1)).reasons == {Reason.DROP_TTL_EXPIRED: 1}
    sent = forwarded(lb.run(tcp(*ENDS[client], ttl=2)))
    assert hops_of(sent) == 1
    assert lb.run(answer_to(sent, ttl=1)).reasons == {Reason.DROP_TTL_EXPIRED: 1}
    assert hops_of(returned(lb.run(answer_to(sent, ttl=2)))) == 1


def test_padding_of_the_frame_is_no_payload(lb: Balancer) -> None:
    serve(lb, 4, UDP)
    frame = bytes(udp(*ENDS[4], payload=b"abc"))
    out = lb.run(frame + bytes(60 - len(frame)))
    sent = forwarded(out)
    assert network(sent).plen == 8 + 3
    assert out.data[ETH + 48 : ETH + 51] == b"abc"


def test_a_driver_that_leaves_no_room_in_front(lb: Balancer) -> None:
    serve(lb, 4, TCP)
    frame = bytes(tcp(*ENDS[4], payload=bytes(128 - 54)))
    assert lb.run_without_headroom(frame).said == (XDP_DROP, {Reason.DROP_NO_HEADROOM: 1})


@clients
@pytest.mark.parametrize("tags", [ONE, TWO], ids=["one", "two"])
def test_in_vlans(client: int, tags: Any, lb: Balancer) -> None:
    service = lb.add_service(VIP[client], mode="nat")
    hop = lb.add_nexthop(OWN[OTHER[client]])
    lb.map("nexthops").mapped()[hop]["tags"] = word(tags)
    service.set_slots(lb.add_backend(service.id, BACKEND[OTHER[client]], nexthop=hop))
    out = lb.run(tagged(tcp(*ENDS[client]), tags))
    assert out.reasons == {Reason.SENT_TO_BACKEND: 1}
    found, sent = untag(out.data)
    assert found == list(tags)
    assert network(sent).dst == BACKEND[OTHER[client]]
    out = lb.run(tagged(answer_to(sent), tags))
    found, back = untag(out.data)
    assert found == list(tags)
    assert (network(back).src, network(back).dst) == ENDS[client][::-1]
