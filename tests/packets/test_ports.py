# SPDX-License-Identifier: Apache-2.0
"""Map ports on the real map: whose ports are looked up at all, against the same said one by one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from shunt.agent.apply import exclude_ports, sync_ports
from shunt.agent.tables import Tables
from shunt.lb.model import ANY_PORT, Protocol
from tests.packets.histories import Lab

LB = Path(__file__).resolve().parents[2] / "xdp" / "lb.bpf.o"
NAT = range(10_001, 29_998)  # neither end at a word's
SERVED = {(Protocol.TCP, 1), (Protocol.UDP, 63), (Protocol.UDP, 64), (Protocol.SCTP, 65_535)}
REPLIES = frozenset({(Protocol.TCP, 9_000), (Protocol.UDP, 10_001)})
CHEAP_S = 0.005  # of a processor; port by port it was 0.04, and every change of a service paid it


@pytest.fixture
def tables() -> Iterator[Tables]:
    lab = Lab(LB)
    try:
        yield lab.tables
    finally:
        lab.close()


def holds(
    words: NDArray[np.uint64], wanted: Callable[[Protocol, int], bool]
) -> list[tuple[Protocol, int]]:
    """The ports whose bits are not as they should be; struct ports_val of bpf/abi.h says where."""
    rows = words.reshape(len(Protocol), -1).tolist()
    return [
        (protocol, port)
        for row, protocol in zip(rows, Protocol, strict=True)
        for port in range(1 << 16)
        if bool(row[port >> 6] >> (port & 63) & 1) is not wanted(protocol, port)
    ]


def test_a_port_is_looked_up_if_anybody_has_it(tables: Tables) -> None:
    tables.served.update(SERVED)
    tables.reply_ports = REPLIES
    sync_ports(tables, NAT)

    def wanted(protocol: Protocol, port: int) -> bool:
        return (protocol, port) in SERVED | REPLIES or port in NAT

    assert holds(tables.ports, wanted) == []
    tables.served[Protocol.UDP, ANY_PORT] += 1
    sync_ports(tables, range(0))
    assert holds(tables.ports, lambda p, n: p is Protocol.UDP or (p, n) in SERVED | REPLIES) == []


def test_ports_left_out_are_those_and_no_others(tables: Tables) -> None:
    for some in (SERVED, REPLIES, frozenset[tuple[Protocol, int]]()):
        exclude_ports(tables, some)
        assert holds(tables.nat_excluded, lambda p, n, some=some: (p, n) in some) == []  # type: ignore[misc]


def test_that_a_wrong_bit_is_seen(tables: Tables) -> None:
    tables.served.update(SERVED)
    sync_ports(tables, range(0))
    tables.ports[1] |= np.uint64(2)
    assert holds(tables.ports, lambda p, n: (p, n) in SERVED) == [(Protocol.TCP, 65)]


def test_nats_many_ports_cost_a_change_next_to_nothing(tables: Tables) -> None:
    def cost_s() -> float:
        began = time.thread_time()
        sync_ports(tables, range(10_000, 30_000))
        return time.thread_time() - began

    assert min(cost_s() for _ in range(5)) < CHEAP_S
