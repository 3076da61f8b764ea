# SPDX-License-Identifier: Apache-2.0
"""Map services: what Python writes, the program finds, whatever stands beside it."""

from __future__ import annotations

import random
from ipaddress import IPv4Address, IPv6Address

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP

from shunt.lb.errors import ShuntError
from shunt.lb.frontends import (
    LINE_ENTRIES,
    REACH_MAX,
    SHORTCUT_MODES,
    WORDS,
    FrontendTable,
    lines_for,
    shortcuts,
)
from shunt.lb.model import Frontend, Protocol
from tests.packets.balancer import Balancer, Mode, Reason
from tests.packets.frames import tcp, udp

addresses = st.one_of(
    st.integers(0, 255).map(lambda n: IPv4Address("203.0.113.0") + n),
    st.integers(0, 255).map(lambda n: IPv6Address("2001:db8::") + n),
)
frontends = st.builds(
    Frontend, addresses, st.sampled_from([53, 80, 443, 65535]), st.sampled_from(Protocol)
)


def table(lines: int) -> FrontendTable:
    return FrontendTable(np.zeros((lines, LINE_ENTRIES, WORDS), np.uint64))


@given(st.lists(st.tuples(st.booleans(), frontends, st.integers(1, 99)), max_size=80))
def test_it_is_a_dictionary(actions: list[tuple[bool, Frontend, int]]) -> None:
    words = np.zeros((256, LINE_ENTRIES, WORDS), np.uint64)
    found, oracle = FrontendTable(words), {}
    for put, frontend, svc in actions:
        if put:
            found.put(frontend, svc)
            oracle[frontend] = svc
        else:
            assert found.drop(frontend) == (oracle.pop(frontend, None) is not None)
            if svc % 2:
                found.reap()
    assert dict(found.items()) == oracle
    assert dict(FrontendTable(words).items()) == oracle  # as a restarted agent reads it


def test_as_many_as_it_is_meant_for() -> None:
    many = 20_000
    found = table(lines_for(many))
    assert found.capacity >= many
    for n in range(many):
        found.put(Frontend(IPv4Address("10.0.0.0") + n // 4, 80 + n % 4, Protocol.TCP), n + 1)
    assert len(found) == many


def test_a_dropped_entry_waits_for_its_readers() -> None:
    found = table(1)
    one, two, three = (Frontend(IPv4Address("10.0.0.1") + n, 80, Protocol.TCP) for n in range(3))
    found.put(one, 1)
    found.put(two, 2)
    found.drop(one)
    with pytest.raises(ShuntError, match="table frontends is full"):
        found.put(three, 3)
    found.reap()
    found.put(three, 3)
    assert dict(found.items()) == {two: 2, three: 3}


def test_the_program_finds_what_python_wrote() -> None:
    """In a table so small that lines overflow into those behind them, both families."""
    rnd = random.Random(1)
    with Balancer(sizes={"services": 16}) as lb:
        service = lb.add_service("203.0.113.1", 80, backends=["10.0.0.1"])
        there = {("203.0.113.1", 80, 6)}
        for n in range(26):
            vip = f"203.0.113.{n}" if n % 2 else f"2001:db8:1::{n:x}"
            port, proto = rnd.choice([80, 443]), rnd.choice([6, 17])
            if (vip, port, proto) not in there:
                there.add((vip, port, proto))
                lb.add_frontend(service, vip, port, proto)
        reach = int(lb.map("services").mapped()["entry"]["svc_reach"].max()) >> 24
        assert 0 < reach <= REACH_MAX
        for n in range(26):
            for vip, client in ((f"203.0.113.{n}", "192.0.2.1"), (f"2001:db8:1::{n:x}", "2001::1")):
                for port in (80, 443):
                    for proto, make in ((6, tcp), (17, udp)):
                        out = lb.run(make(client, vip, dport=port))
                        served = (vip, port, proto) in there
                        want = Reason.SENT_TO_BACKEND if served else Reason.PASS_NOT_OURS
                        assert out.reasons == {want: 1}, (vip, port, proto)


@pytest.mark.parametrize("lead", ["none", "its own", "another service's", "beyond the slots"])
def test_a_shortcut_leads_only_where_the_service_does(lead: str, lb: Balancer) -> None:
    """What is read beside an entry may be of a service that the entry has led to before or will."""
    vips = "203.0.113.1", "203.0.113.2"
    mine, other = (
        lb.add_service(vip, 80, backends=[f"10.0.{n}.{i}" for i in range(1, 4)])
        for n, vip in enumerate(vips)
    )
    ways = shortcuts(lb.map("svc").mapped()).tolist()
    assert ways[mine.id]
    assert ways[other.id]
    word = {
        "none": 0,
        "its own": ways[mine.id],
        "another service's": ways[other.id],
        "beyond the slots": ways[mine.id] | 1 << 36,
    }[lead]
    lb.frontends().put(Frontend(IPv4Address(vips[0]), 80, Protocol.TCP), mine.id, word)
    for port in range(3000, 3030):
        out = lb.run(tcp("192.0.2.1", vips[0], sport=port, dport=80))
        assert out.reasons == {Reason.SENT_TO_BACKEND: 1}
        assert out.packet[IP].dst.startswith("10.0.0.")


def test_a_shortcut_is_what_the_programs_take_it_for() -> None:
    assert SHORTCUT_MODES == (Mode.DSR_IPIP, Mode.DSR_L2)


@pytest.mark.parametrize("mode", ["nat", "local"])
def test_modes_that_keep_state_have_no_shortcut(mode: str, lb: Balancer) -> None:
    service = lb.add_service("203.0.113.1", mode=mode, backends=["10.0.0.1"])
    assert not shortcuts(lb.map("svc").mapped())[service.id]


def test_options_have_no_shortcut(lb: Balancer) -> None:
    service = lb.add_service("203.0.113.1", backends=["10.0.0.1"])
    assert shortcuts(lb.map("svc").mapped())[service.id]
    service.ask(affinity_ns=60 * 10**9)
    assert not shortcuts(lb.map("svc").mapped())[service.id]
