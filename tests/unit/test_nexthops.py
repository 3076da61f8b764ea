# SPDX-License-Identifier: Apache-2.0
"""What route and neighbour make of a next hop, without a kernel."""

from dataclasses import replace
from ipaddress import IPv4Address, ip_address

import pytest

from shunt.agent.nexthops import NextHop, decide, shared, unresolved
from shunt.agent.reach import unfit
from shunt.kern.neighbours import STATE_NAMES, USABLE, Neighbour
from shunt.kern.netlink import Link, Route
from shunt.lb.errors import ShuntError
from shunt.lb.model import Mode

BACKEND, GATEWAY, OWN = (IPv4Address(a) for a in ("10.1.0.5", "10.0.0.1", "10.0.0.11"))
MAC = bytes.fromhex("020000000001")
LINK = Link(ifindex=3, name="eth0", mac=bytes.fromhex("020000000099"), mtu=1500, up=True)
ROUTE = Route(BACKEND, LINK, mtu=1400, gateway=GATEWAY, source=OWN)
HOP = NextHop(3, "eth0", GATEWAY, True, LINK.mac, 1400, OWN, MAC)


def neighbour(state: int, mac: bytes = MAC) -> Neighbour:
    return Neighbour(3, GATEWAY, state, mac)


@pytest.mark.parametrize("state", STATE_NAMES)
def test_every_state_of_a_neighbour(state: int) -> None:
    hop = decide(ROUTE, neighbour(state))
    usable = STATE_NAMES[state] not in ("none", "incomplete", "failed")
    assert usable == bool(state & USABLE)
    assert hop == replace(HOP, dmac=MAC if usable else None)
    assert isinstance(hop, NextHop)
    error = unresolved(BACKEND, hop, neighbour(state))
    assert (error is None) == usable
    if error is not None:
        assert STATE_NAMES[state] in error.why
        assert "the gateway 10.0.0.1 of backend 10.1.0.5" in error.what


def test_a_mac_that_is_none() -> None:
    assert decide(ROUTE, None) == replace(HOP, dmac=None)
    assert decide(ROUTE, neighbour(USABLE, mac=b"")) == replace(HOP, dmac=None)


def test_on_the_link_the_backend_is_its_own_next_hop() -> None:
    hop = decide(replace(ROUTE, gateway=None), neighbour(USABLE))
    assert hop == replace(HOP, via=BACKEND, gateway=False)
    assert isinstance(hop, NextHop)
    assert unfit(Mode.DSR_L2, BACKEND, hop) is None


def test_dsr_l2_does_not_reach_past_a_gateway() -> None:
    error = unfit(Mode.DSR_L2, BACKEND, HOP)
    assert error is not None
    assert "behind the gateway 10.0.0.1" in str(error)
    assert "dsr-ipip" in error.fix
    assert unfit(Mode.NAT, BACKEND, HOP) is None
    assert unfit(Mode.DSR_IPIP, BACKEND, HOP) is None


@pytest.mark.parametrize(
    ("backend", "source", "gateway", "fits"),
    [
        ("10.1.0.5", None, False, False),
        ("fd00::5", None, True, False),
        ("fd00::5", "fe80::1", True, False),
        ("fd00::5", "fe80::1", False, True),
        ("fd00::5", "fd00::1", True, True),
    ],
)
def test_nat_needs_an_address_of_the_backends_family(
    backend: str, source: str | None, gateway: bool, fits: bool
) -> None:
    hop = replace(HOP, saddr=ip_address(source) if source else None, gateway=gateway)
    error = unfit(Mode.NAT, ip_address(backend), hop)
    assert (error is None) == fits
    assert unfit(Mode.DSR_IPIP, ip_address(backend), hop) is None
    if error is not None:
        assert f"backend {backend} cannot be reached from an address of this host" in error.what
        assert ("IPv6" in error.why) == (":" in backend)
        assert f"dev {hop.device}" in error.fix


@pytest.mark.parametrize(
    ("route", "says"),
    [
        (replace(ROUTE, local=True), "is an address of this host"),
        (replace(ROUTE, link=replace(LINK, mac=b"", name="wg0")), "by way of wg0, not Ethernet"),
        (replace(ROUTE, tunnel=True), "a route that encapsulates"),
    ],
)
def test_ways_an_xdp_program_cannot_go(route: Route, says: str) -> None:
    error = decide(route, neighbour(USABLE))
    assert isinstance(error, ShuntError)
    assert says in error.what
    assert error.why
    assert error.fix


def test_an_mtu_fits_its_field() -> None:
    hop = decide(replace(ROUTE, mtu=65536), None)
    assert isinstance(hop, NextHop)
    assert hop.mtu == 65535


def test_equal_keys_share_the_smallest_mtu() -> None:
    others = [replace(HOP, mtu=1300), replace(HOP, mtu=1350), replace(HOP, saddr=GATEWAY)]
    assert shared([HOP, *others]) == {
        HOP.key: replace(HOP, mtu=1300),
        others[2].key: others[2],
    }
