# SPDX-License-Identifier: Apache-2.0
"""Samples of dropped packets, through the ring to the reading side."""

from __future__ import annotations

import os
import select
from collections.abc import Callable

import pytest

from shunt.kern.ring import Ring
from tests.packets.balancer import LOOPBACK, Balancer, Event, Reason
from tests.packets.frames import tcp, udp

ENDS = {4: ("192.0.2.1", "203.0.113.1"), 6: ("2001:db8:c::1", "2001:db8:a::1")}
MakeLb = Callable[..., Balancer]


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("size", [0, 1, 95 - 74, 96 - 74, 97 - 74, 1000])
def test_a_sample_shows_the_packet_and_why(version: int, size: int, lb: Balancer) -> None:
    service = lb.add_service(ENDS[version][1], backends=["10.0.0.1"])
    lb.map("backends").mapped()["nexthop"][service.backends[0]] = 0
    packet = bytes(tcp(*ENDS[version], payload=b"\xa5" * size))
    assert lb.run(packet).reasons == {Reason.DROP_NO_NEXTHOP: 1}
    (sample,) = lb.samples()
    assert sample["time_ns"] == lb.clock
    assert sample["reason"] == Reason.DROP_NO_NEXTHOP
    assert sample["ifindex"] == LOOPBACK
    assert (sample["svc"], sample["backend"]) == (service.id, service.backends[0])
    assert sample["len"] == len(packet)
    assert sample["captured"] == min(len(packet), 96)
    assert sample["data"].tobytes() == packet[:96].ljust(96, b"\0")


def test_only_drops_are_sampled(lb: Balancer) -> None:
    lb.add_service(ENDS[4][1], backends=["10.0.0.1"])
    lb.add_service(ENDS[6][1])
    for packet in (
        tcp(*ENDS[4]),
        tcp(*ENDS[6]),
        udp(*ENDS[4]),
        tcp(*ENDS[4], payload=bytes(1500)),
    ):
        lb.run(packet)
    assert len(lb.samples()) == 0


def test_samples_are_rationed_by_the_second(make_lb: MakeLb) -> None:
    lb = make_lb(samples_per_s=3)
    lb.add_service(ENDS[4][1])
    reset = tcp(*ENDS[4], "R")

    def sampled() -> int:
        assert all(lb.run(reset).reasons == {Reason.DROP_NO_BACKEND: 1} for _ in range(5))
        return len(lb.samples())

    assert sampled() == 3
    assert sampled() == 0
    lb.advance(1)
    assert sampled() == 3


def test_no_samples_at_all(make_lb: MakeLb) -> None:
    lb = make_lb(samples_per_s=0)
    lb.add_service(ENDS[4][1])
    out = lb.run(tcp(*ENDS[4], "R"))
    assert (out.reasons, out.events) == ({Reason.DROP_NO_BACKEND: 1}, {})
    assert len(lb.samples()) == 0


def test_what_a_full_ring_loses_is_counted(make_lb: MakeLb) -> None:
    lb = make_lb({"samples": 4096})
    lb.add_service(ENDS[4][1])
    reset = tcp(*ENDS[4], "R")
    lost = sum(lb.run(reset).events.get(Event.SAMPLE_LOST, 0) for _ in range(100))
    kept = len(lb.samples())
    assert kept + lost == 100
    assert 20 <= kept <= 32, "a record is some 136 bytes"
    assert lb.run(reset).events == {}, "read, there is room again"
    assert len(lb.samples()) == 1


def test_a_reader_can_wait_for_samples(lb: Balancer) -> None:
    lb.add_service(ENDS[4][1])
    poll = select.poll()
    poll.register(lb.ring.fileno(), select.POLLIN)
    assert poll.poll(0) == []
    lb.run(tcp(*ENDS[4], "R"))
    assert poll.poll(1000) == [(lb.ring.fileno(), select.POLLIN)]
    assert len(lb.samples()) == 1
    assert poll.poll(0) == []


def test_an_error_of_the_readers_own_comes_out_of_consume(lb: Balancer) -> None:
    lb.add_service(ENDS[4][1])
    got: list[bytes] = []

    def callback(record: bytes) -> None:
        got.append(record)
        if len(got) == 1:
            raise ValueError("unreadable")

    with Ring(lb.map("samples").fd, callback) as ring:
        for _ in range(3):
            lb.run(tcp(*ENDS[4], "R"))
        with pytest.raises(ValueError, match="unreadable"):
            ring.consume()
        assert len(got) == 1
        assert ring.consume() == 2
        assert len(got) == 3


def test_a_ring_of_what_is_none(lb: Balancer) -> None:
    with pytest.raises(OSError, match="ring_buffer__new"):
        Ring(lb.map("slots").fd, lambda _: None)
    descriptor = os.open("/dev/null", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="ring_buffer__new"):
            Ring(descriptor, lambda _: None)
    finally:
        os.close(descriptor)
