# SPDX-License-Identifier: Apache-2.0
"""A next hop that the agent has not resolved: the kernel's FIB is asked."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from shunt.kern.libbpf import XDP_DROP, XDP_REDIRECT, XDP_TX
from tests.packets.balancer import Balancer, Event, Out, Reason
from tests.packets.frames import ETH, tcp
from tests.packets.private import FORWARDING, in_namespace
from tests.packets.test_vlan import untag

ENDS = {4: ("192.0.2.1", "203.0.113.1"), 6: ("2001:db8:c::1", "2001:db8:a::1")}
BACKENDS = {4: "10.9.0.1", 6: "fd09::1"}
BEYOND = {4: "10.10.0.1", 6: "fd10::1"}
NEIGHBOUR_MAC = "02:00:00:00:09:01"
DEVICE_MAC = "02:00:00:00:09:fe"
OUTER_BYTES = {4: 20, 6: 40}

NETWORK = (
    f"link add name a address {DEVICE_MAC} mtu 1400 type veth peer name b",
    "link set dev b up",
    "link set dev a up",
    "address add 10.9.0.254/24 dev a",
    "address add fd09::fe/64 dev a nodad",
    f"neighbour add 10.9.0.1 lladdr {NEIGHBOUR_MAC} nud permanent dev a",
    f"neighbour add fd09::1 lladdr {NEIGHBOUR_MAC} nud permanent dev a",
    "route add 10.10.0.0/24 via 10.9.0.1",
    "route add fd10::/64 via fd09::1",
    "route add blackhole 10.11.0.0/24",
    "route add blackhole fd11::/64",
)

versions = pytest.mark.parametrize("version", [4, 6])
modes = pytest.mark.parametrize("mode", ["dsr-ipip", "dsr-l2"])
MakeLb = Callable[..., Balancer]


def asked(
    lb: Balancer,
    version: int,
    mode: str,
    backend: str,
    size: int = 0,
    *,
    forwarding: bool = True,
    nexthop: int = 0,
) -> Out:
    """A packet to a backend whose next hop is not resolved, where the kernel has one."""
    lb.add_service(ENDS[version][1], mode=mode, backends=[backend], nexthop=nexthop)
    packet = tcp(*ENDS[version], "A", payload=bytes(size))
    return in_namespace(lambda: lb.run(packet), NETWORK, FORWARDING if forwarding else None)


@versions
@modes
@pytest.mark.parametrize("backend", [BACKENDS, BEYOND], ids=["on link", "by a gateway"])
def test_the_fib_finds_the_neighbour(
    backend: dict[int, str], mode: str, version: int, lb: Balancer
) -> None:
    out = asked(lb, version, mode, backend[version])
    assert out.said == (XDP_REDIRECT, {Reason.SENT_TO_BACKEND: 1})
    assert out.events == {Event.FIB_FALLBACK: 1}
    assert (out.packet.dst, out.packet.src) == (NEIGHBOUR_MAC, DEVICE_MAC)


@versions
def test_a_way_that_is_known_counts_more_than_the_fibs_device(version: int, lb: Balancer) -> None:
    """The FIB names a VLAN device, the agent what is below it: only the MAC was missing."""
    way = lb.add_nexthop(dmac="00:00:00:00:00:00")
    lb.map("nexthops").mapped()[way]["tags"] = 100
    out = asked(lb, version, "dsr-l2", BACKENDS[version], nexthop=way)
    assert out.said == (XDP_TX, {Reason.SENT_TO_BACKEND: 1})
    assert out.events == {Event.FIB_FALLBACK: 1}
    tags, frame = untag(out.data)
    assert tags == [(False, 0, 100)]
    assert (frame.dst, frame.src) == (NEIGHBOUR_MAC, DEVICE_MAC)


@versions
@modes
def test_the_fib_knows_the_mtu(mode: str, version: int, lb: Balancer) -> None:
    """With the outer header counted in: 1,400 bytes are for all of it."""
    overhead = OUTER_BYTES[version] if mode == "dsr-ipip" else 0
    room = 1400 - overhead - (len(tcp(*ENDS[version])) - ETH)
    assert asked(lb, version, mode, BACKENDS[version], room).reasons == {Reason.SENT_TO_BACKEND: 1}
    out = asked(lb, version, mode, BACKENDS[version], room + 1)
    assert out.said == (XDP_TX, {Reason.SENT_TOO_BIG: 1})
    error = out.packet.payload.payload
    assert (error.nexthopmtu if version == 4 else error.mtu) == 1400 - overhead


@versions
@modes
@pytest.mark.parametrize("host", [9, 11, 12], ids=["neighbour unknown", "blackhole", "no route"])
def test_the_fib_knows_no_way(host: int, mode: str, version: int, lb: Balancer) -> None:
    backend = f"10.{host}.0.77" if version == 4 else f"fd{host:02}::77"
    out = asked(lb, version, mode, backend)
    assert out.said == (XDP_DROP, {Reason.DROP_NO_NEXTHOP: 1})
    assert out.events == {}


@versions
def test_a_backend_of_this_host_is_no_next_hop(version: int, lb: Balancer) -> None:
    backend = "10.9.0.254" if version == 4 else "fd09::fe"
    assert asked(lb, version, "dsr-l2", backend).reasons == {Reason.DROP_NO_NEXTHOP: 1}


@versions
def test_the_fib_says_nothing_where_forwarding_is_off(version: int, lb: Balancer) -> None:
    """So the kernel has it. Next hops that the agent resolves need no forwarding."""
    out = asked(lb, version, "dsr-l2", BACKENDS[version], forwarding=False)
    assert out.said == (XDP_DROP, {Reason.DROP_NO_NEXTHOP: 1})
