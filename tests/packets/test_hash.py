# SPDX-License-Identifier: Apache-2.0
"""The flow hash: even over slots for the tuples that clients really have, equal for equal seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import pairwise

import numpy as np
import pytest

from shunt.kern.testrun import run_xdp
from tests.packets.balancer import TCP, UDP, Balancer
from tests.packets.frames import ETH, either, network

VIPS = {4: "203.0.113.1", 6: "2001:db8:a::1"}
SLOTS, FLOWS = 64, 6400
# Chi-square with 63 degrees of freedom is beyond this once in a million.
LIMIT = 127.0

MakeLb = Callable[..., Balancer]
versions = pytest.mark.parametrize("version", [4, 6])


def hashes(lb: Balancer, frames: Iterator[bytes]) -> list[int]:
    """All 32 bits show in an IPv6 outer source's low word."""
    fd = lb.object.programs["shunt_lb"].fd
    at = ETH + 8 + 12
    return [int.from_bytes(run_xdp(fd, frame).data[at : at + 4], "big") for frame in frames]


def serving(lb: Balancer, version: int, *protos: int) -> Balancer:
    for proto in protos or (TCP,):
        lb.add_service(VIPS[version], proto=proto, backends=["fd00::1"])
    return lb


def sequential_ports(version: int) -> Iterator[bytes]:
    client = "192.0.2.1" if version == 4 else "2001:db8:c::1"
    yield from changed(version, client, "port")


def sequential_addresses(version: int) -> Iterator[bytes]:
    yield from changed(version, "10.64.0.0" if version == 4 else "2001:db8:c::", "address")


def sequential_networks(version: int) -> Iterator[bytes]:
    """The same host number in one network after the other: /24s, /64s."""
    yield from changed(version, "10.64.0.7" if version == 4 else "2001:db8:c::7", "network")


def changed(version: int, client: str, what: str) -> Iterator[bytes]:
    """One frame, patched: the hash reads addresses and ports, and no checksum."""
    frame = bytearray(bytes(either(TCP, client, VIPS[version])))
    size, source, ports = (4, ETH + 12, ETH + 20) if version == 4 else (16, ETH + 8, ETH + 40)
    base = int(ip_address(client))
    step = {"address": 1, "network": 1 << (8 if version == 4 else 64), "port": 0}[what]
    for i in range(FLOWS):
        frame[source : source + size] = (base + i * step).to_bytes(size, "big")
        if what == "port":
            frame[ports : ports + 2] = (1024 + i).to_bytes(2, "big")
        yield bytes(frame)


def chi_square(values: list[int], slots: int) -> float:
    seen = np.bincount(np.asarray(values), minlength=slots)
    expected = len(values) / slots
    return float(((seen - expected) ** 2 / expected).sum())


@versions
@pytest.mark.parametrize(
    "frames",
    [sequential_ports, sequential_addresses, sequential_networks],
    ids=lambda f: f.__name__,
)
def test_flows_spread_evenly(
    version: int, frames: Callable[[int], Iterator[bytes]], lb: Balancer
) -> None:
    """Over slots (the top bits), and over what outer sources are drawn from (the low ones)."""
    got = hashes(serving(lb, version), frames(version))
    assert chi_square([h >> 26 for h in got], SLOTS) < LIMIT
    assert chi_square([h & 63 for h in got], SLOTS) < LIMIT
    assert len(set(got)) >= FLOWS - 2
    # Neighbours have nothing in common: half of the bits differ.
    flips = [(a ^ b).bit_count() for a, b in pairwise(got)]
    assert 15.5 < float(np.mean(flips)) < 16.5


def test_that_check_can_fail() -> None:
    """A sum of addresses and ports is even over sequential ports, and nothing else."""
    weak = [(i * 256) % SLOTS for i in range(FLOWS)]
    assert chi_square(weak, SLOTS) > LIMIT


@versions
def test_equal_for_equal_seeds_and_different_for_others(version: int, make_lb: MakeLb) -> None:
    """Nodes that share VIPs share the seed, and so each flow's slot."""

    def first(seed: int) -> list[int]:
        lb = serving(make_lb(hash_seed=seed), version)
        return hashes(lb, (f for f, _ in zip(sequential_ports(version), range(500), strict=False)))

    one, same, other, none = first(7), first(7), first(8), first(0)
    assert one == same
    for different in (other, none):
        assert sum(a == b for a, b in zip(one, different, strict=True)) == 0
        assert chi_square([(a ^ b) >> 29 for a, b in zip(one, different, strict=True)], 8) < 40


@versions
def test_every_part_of_the_tuple_counts_and_nothing_else_does(version: int, lb: Balancer) -> None:
    serving(lb, version, TCP, UDP)
    client = "192.0.2.1" if version == 4 else "2001:db8:c::1"
    address = IPv4Address if version == 4 else IPv6Address
    service = lb.add_service(VIPS[version], 443, backends=["fd00::1"])
    other_vip = str(ip_address(VIPS[version]) + 1)
    lb.add_frontend(service, other_vip, 80)

    def of(proto: int = TCP, src: str = client, dst: str = VIPS[version], **fields: int) -> int:
        (got,) = hashes(lb, iter([bytes(either(proto, src, dst, **fields))]))
        return got

    # Whichever bit of the source it is.
    sources = [
        of(src=str(address(int(ip_address(client)) ^ 1 << bit)))
        for bit in range(32 if version == 4 else 128)
    ]
    tuples = [of(), of(UDP), of(dst=other_vip), of(sport=1), of(dport=443), *sources]
    assert len(set(tuples)) == len(tuples)
    assert of(tos=8, ttl=9) == of()


def test_a_reply_hashes_differently_from_its_request(lb: Balancer) -> None:
    """Swapping the ends is not symmetric: nat's two keys are two flows."""
    lb.add_service("203.0.113.1", 80, backends=["fd00::1"])
    lb.add_service("203.0.113.2", 80, backends=["fd00::1"])
    there = either(TCP, "203.0.113.2", "203.0.113.1", sport=80)
    back = either(TCP, "203.0.113.1", "203.0.113.2", sport=80)
    assert network(lb.run(there).packet).src != network(lb.run(back).packet).src
