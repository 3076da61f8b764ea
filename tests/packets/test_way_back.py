# SPDX-License-Identifier: Apache-2.0
"""Mode dsr-geneve on a backend: a flow's way back is kept for as long as it is needed."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tests.packets import balancer
from tests.packets.backend_node import (
    CLIENT,
    OTHER_VIP,
    OWN,
    OWN_PORT,
    BackendNode,
    Reason,
    Way,
    answered,
    leaves_alone,
    passed,
    reply,
    sent,
)
from tests.packets.frames import either, network

protocols = pytest.mark.parametrize("proto", [balancer.TCP, balancer.UDP], ids=["tcp", "udp"])
versions = pytest.mark.parametrize("version", [4, 6])
LONG = {"opening": 1000, "open": 1000, "closing": 1000, "over": 1000, "udp": 1000}


def bring(node: BackendNode, state: str, version: int, sport: int) -> None:
    """A flow into a state."""
    proto = balancer.UDP if state == "udp" else balancer.TCP
    node.opened(sent(version, proto=proto, sport=sport))
    if state in {"opening", "udp"}:
        return
    node.opened(sent(version, sport=sport, flags="A"))
    if state in {"closing", "over"}:
        node.opened(sent(version, sport=sport, flags="FA"))
    if state == "over":
        answered(node.send(reply(version, dport=sport, flags="FA")))


@versions
@pytest.mark.parametrize("state", list(LONG))
def test_each_state_has_its_time(
    state: str, version: int, make_node: Callable[..., BackendNode]
) -> None:
    """The others of this map stay."""
    node = make_node(**{**LONG, state: 0.2})
    states = [other for other in LONG if other != state]
    for sport, other in enumerate(states, 1):
        bring(node, other, version, sport)
    bring(node, state, version, 99)
    assert node.forgets(len(states))
    leaves_alone(node, reply(version, dport=99))


@pytest.mark.parametrize("end", ["client's RST", "backend's RST"])
def test_a_reset_ends_it(end: str, make_node: Callable[..., BackendNode]) -> None:
    node = make_node(**{**LONG, "over": 0.2})
    bring(node, "open", 4, 1)
    bring(node, "open", 4, 2)
    if end == "client's RST":
        node.opened(sent(4, sport=1, flags="R"))
    else:
        answered(node.send(reply(4, dport=1, flags="R")))
    assert node.forgets(1)


def test_it_lives_as_long_as_packets_come(make_node: Callable[..., BackendNode]) -> None:
    """From either side."""
    node = make_node(**{**LONG, "udp": 1})
    node.opened(sent(4, proto=balancer.UDP))
    begun = last = time.monotonic()
    deadline = begun + 60
    while last - begun < 2.5:
        out = node.send(reply(4, balancer.UDP))
        stalled = time.monotonic() - last > 0.8  # this process: then nothing can be said
        if not stalled:
            assert out.reasons == {Reason.ANSWERED: 1}
        node.opened(sent(4, proto=balancer.UDP))
        last = time.monotonic()
        begun = last if stalled else begun
        assert last < deadline, "this host is too slow"
        time.sleep(0.05)
    assert node.forgets(0)


def test_a_flow_that_opens_outlives_the_time_of_opening(
    make_node: Callable[..., BackendNode],
) -> None:
    node = make_node(**{**LONG, "opening": 0.3})
    bring(node, "open", 4, 1)
    bring(node, "opening", 4, 2)
    assert node.forgets(1)
    time.sleep(0.5)
    answered(node.send(reply(4, dport=1, flags="A")))


def test_a_packet_in_between_begins_as_a_syn_does(node: BackendNode) -> None:
    """After decap was attached anew; or a flood's, which must not have the time of a connection."""
    node.opened(sent(4, flags="A"))
    (way,) = node.ways()
    assert way["flags"] == 0
    node.opened(sent(4, flags="A"))
    (way,) = node.ways()
    assert way["flags"] == Way.OPEN


def test_an_rst_of_nobody_is_not_remembered(node: BackendNode) -> None:
    node.opened(sent(4, flags="R"))
    assert node.ways() == []


@versions
@protocols
def test_what_is_over_is_not_there_though_nobody_has_swept(
    version: int, proto: int, make_node: Callable[..., BackendNode]
) -> None:
    node = make_node(**dict.fromkeys(LONG, 0.3))
    node.opened(sent(version, proto=proto))
    time.sleep(0.4)
    leaves_alone(node, reply(version, proto))
    direct = either(proto, CLIENT[version], OWN[version], dport=OWN_PORT)
    assert passed(node, direct) == Reason.PASS_NOT_TUNNEL
    node.opened(sent(version, proto=proto, vip=OTHER_VIP[version]))
    assert network(answered(node.send(reply(version, proto)))).src == OTHER_VIP[version]


@versions
def test_a_syn_after_the_end_begins_anew(version: int, node: BackendNode) -> None:
    bring(node, "over", version, 1)
    node.opened(sent(version, sport=1))
    (way,) = node.ways()
    assert way["flags"] == 0
