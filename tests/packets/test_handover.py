# SPDX-License-Identifier: Apache-2.0
"""handover: peer, packet by packet; and map veth_sets, which follows the devices.

What has no room in the map is told, and goes through its device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from shunt.agent.handover import Handover
from shunt.agent.nat_ports import PortUse
from shunt.agent.troubles import Troubles
from tests.packets.balancer import BACKEND_MAC, ELSEWHERE, TCP, UDP
from tests.packets.frames import either, network
from tests.packets.test_fragments import fragments_of
from tests.packets.translator import (
    BACKENDS,
    CLIENT,
    NEXT,
    REDIRECT,
    VIP,
    Translator,
    answer,
    expect,
    tuple_of,
)

PROTOS = pytest.mark.parametrize("proto", [TCP, UDP], ids=["tcp", "udp"])
FAMILIES = pytest.mark.parametrize("ip", [4, 6])


def places(tc: Translator) -> Any:
    return tc.map("veth_sets").mapped()["ifindex"]


def held(tc: Translator) -> set[int]:
    return set(places(tc).flat) - {0}


def handover_of(tc: Translator) -> tuple[Handover, Troubles]:
    troubles = Troubles()
    return Handover({"veth_sets": tc.map("veth_sets")}, troubles), troubles


def test_the_map_follows(tc: Translator) -> None:
    handover, troubles = handover_of(tc)
    sets, ways = places(tc).shape
    for wanted in ({2, 4}, {4, 4 + sets}, set(), set(range(2, 900)), {7}):
        handover.sync(wanted)
        assert held(tc) == wanted
        assert troubles == {}
    alike = {7 + n * sets for n in range(ways + 3)}
    handover.sync(alike | {8})
    assert held(tc) == set(sorted(alike)[:ways]) | {8}
    assert f"3 veth devices of {ways + 4}" in troubles["handover"].what
    # Whoever had none gets the place of one that is gone.
    handover.sync(alike - {7, 7 + sets, 7 + 2 * sets})
    assert held(tc) == alike - {7, 7 + sets, 7 + 2 * sets}
    assert troubles == {}


def test_a_device_that_stays_is_there_all_the_time(tc: Translator) -> None:
    handover, _ = handover_of(tc)
    sets, ways = places(tc).shape
    devices = [7 + n * sets for n in range(ways)]
    handover.sync(set(devices))
    (at,) = np.flatnonzero(places(tc)[7] == devices[-1])
    for gone in range(1, ways):
        handover.sync(set(devices[gone:]))
        assert places(tc)[7, at] == devices[-1]


@pytest.fixture
def handing() -> Iterator[Translator]:
    """It hands over to what is behind device ELSEWHERE, where add() has a backend."""
    with Translator(handover_peer=1) as tc:
        tc.add_veth(ELSEWHERE)
        yield tc


def add(
    tc: Translator, ip: int, proto: int, *, ifindex: int = ELSEWHERE, dmac: str = BACKEND_MAC
) -> None:
    nexthop = tc.add_nexthop(None, ifindex=ifindex, dmac=dmac)
    backends = BACKENDS[ip][:1]
    tc.add_service(VIP[ip], 80, proto, backends=backends, backend_port=8080, nexthop=nexthop)


@PROTOS
@FAMILIES
def test_there_and_back_past_the_stack(handing: Translator, ip: int, proto: int) -> None:
    add(handing, ip, proto)
    sent = handing.run(either(proto, CLIENT[ip], VIP[ip], sport=40000, payload=b"odd", ttl=9))
    expect(sent, REDIRECT, "SENT_TO_BACKEND")
    # The client is seen, as by the stack.
    assert tuple_of(sent.packet) == (CLIENT[ip], 40000, BACKENDS[ip][0], 8080)
    assert (sent.packet.dst, sent.packet.src) == ("02:00:00:00:00:03", "02:00:00:00:00:02")
    header = network(sent.packet)
    assert (header.ttl if ip == 4 else header.hlim) == 8
    back = handing.run(answer(sent, payload=b"x" * 7, proto=proto))
    expect(back, REDIRECT, "SENT_TO_CLIENT")
    assert tuple_of(back.packet) == (VIP[ip], 80, CLIENT[ip], 40000)
    # The way that the client's packets came.
    assert (back.packet.dst, back.packet.src) == ("02:00:00:00:00:01", "02:00:00:00:00:02")


@PROTOS
@FAMILIES
def test_replies_may_come_by_the_stack(handing: Translator, ip: int, proto: int) -> None:
    """There is no program at the backend's device."""
    add(handing, ip, proto)
    sent = handing.run(either(proto, CLIENT[ip], VIP[ip], sport=40000))
    back = handing.leave(answer(sent, proto=proto))
    expect(back, NEXT, "SENT_TO_CLIENT")
    assert tuple_of(back.packet) == (VIP[ip], 80, CLIENT[ip], 40000)


@FAMILIES
@pytest.mark.parametrize("where", [{"ifindex": 8}, {"dmac": "00:00:00:00:00:00"}])
def test_it_is_the_stacks_where_it_knows_more(
    handing: Translator, ip: int, where: dict[str, int | str]
) -> None:
    """Another kind of device; a neighbour that is not known yet."""
    add(handing, ip, TCP, **where)  # type: ignore[arg-type]
    sent = handing.run(either(TCP, CLIENT[ip], VIP[ip], sport=40000))
    expect(sent, NEXT, "SENT_TO_BACKEND")
    assert handing.run(answer(sent)).verdict == NEXT
    assert tuple_of(handing.leave(answer(sent)).packet) == (VIP[ip], 80, CLIENT[ip], 40000)


@FAMILIES
def test_fragments_stay_together(handing: Translator, ip: int) -> None:
    """Of a flow that is handed over otherwise: all of them by the stack, both ways."""
    add(handing, ip, UDP)
    plain = either(UDP, CLIENT[ip], VIP[ip], sport=40000)
    sent = handing.run(plain)
    expect(sent, REDIRECT, "SENT_TO_BACKEND")
    large = either(UDP, CLIENT[ip], VIP[ip], sport=40000, payload=bytes(3000), **_may_split(ip))
    for part in fragments_of(large):
        expect(handing.run(part), NEXT, "SENT_TO_BACKEND")
    back = answer(sent, payload=bytes(3000), proto=UDP)
    if ip == 4:
        network(back).flags = 0
    for part in fragments_of(back):
        assert handing.run(part).verdict == NEXT
        expect(handing.leave(part), NEXT, "SENT_TO_CLIENT")


def _may_split(ip: int) -> dict[str, int]:
    return {"flags": 0} if ip == 4 else {}


def test_their_ports_are_their_clients(handing: Translator) -> None:
    """What is counted as taken is what this host has given."""
    add(handing, 4, TCP)
    handing.run(either(TCP, CLIENT[4], VIP[4], sport=40000))
    use = PortUse()
    use.add(*handing.map("nat_rev").items())
    assert use.taken() == {}
