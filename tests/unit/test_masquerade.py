# SPDX-License-Identifier: Apache-2.0
"""`masquerade:` of shunt.yaml, and what follows from it before any packet comes."""

from ipaddress import ip_address, ip_network
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shunt.agent.nat_expiry import NS_PER_S, idle_of_nobodys
from shunt.agent.sources.file import load
from shunt.agent.sources.masquerade import NOT_TO as PRIVATE
from shunt.ipam.masquerade import NOT_TO, SOURCE, kinds, source_of
from shunt.kern.netlink import (
    IFA_F_DADFAILED,
    IFA_F_DEPRECATED,
    IFA_F_SECONDARY,
    IFA_F_TENTATIVE,
    InterfaceAddress,
)
from shunt.lb.model import IPNetwork, Masquerade
from tests.unit.config_files import SETTINGS, errors, three

NETWORKS = [
    ip_network(text)
    for text in (
        *("0.0.0.0/0", "10.0.0.0/8", "10.244.0.0/16", "10.244.1.0/24", "10.244.1.7/32"),
        *("192.0.2.0/24", "224.0.0.0/8", "::/0", "fd00::/8", "fd44::/64", "ff02::/16"),
    )
]
ADDRESSES = [
    ip_address(text)
    for text in (
        *("10.0.0.1", "10.244.0.1", "10.244.1.1", "10.244.1.7", "192.0.2.1", "203.0.113.1"),
        *("224.0.0.1", "239.0.0.1", "255.255.255.255", "fd00::1", "fd44::1", "ff02::1"),
        "2001:db8::1",
    )
]
networks = st.lists(st.sampled_from(NETWORKS), max_size=5)


@given(networks, networks)
def test_the_longest_prefix_says_what_all_of_them_do(
    sources: list[IPNetwork], not_to: list[IPNetwork]
) -> None:
    found = kinds(sources, not_to)
    for address in ADDRESSES:
        longest = max((n for n in found if address in n), key=lambda n: n.prefixlen, default=None)
        kind = found[longest] if longest is not None else 0
        assert bool(kind & SOURCE) == any(address in n for n in sources)
        never = address.is_multicast or str(address) == "255.255.255.255"
        assert bool(kind & NOT_TO) == (never or any(address in n for n in not_to))


def address(text: str, ifindex: int = 2, flags: int = 0) -> InterfaceAddress:
    return InterfaceAddress(ifindex, ip_address(text), 24, flags)


def test_the_first_primary_address_of_the_device() -> None:
    held = [
        address("192.0.2.1", ifindex=1),
        address("169.254.7.7"),
        address("198.51.100.1", flags=IFA_F_SECONDARY),
        address("198.51.100.2"),
        address("198.51.100.3"),
        address("fe80::1"),
        *(address(f"2001:db8::{f:x}", flags=f) for f in (IFA_F_TENTATIVE, IFA_F_DADFAILED)),
        *(address(f"2001:db8::{f:x}", flags=f) for f in (IFA_F_DEPRECATED, IFA_F_SECONDARY)),
        address("2001:db8::7"),
    ]
    assert str(source_of(held, 2, 4)) == "198.51.100.2"
    assert str(source_of(held, 2, 6)) == "2001:db8::7"
    assert source_of(held, 1, 6) is None
    assert source_of(held, 3, 4) is None


def test_of_no_service_the_idle_time_is_services_default() -> None:
    idle = idle_of_nobodys(np.array([6, 17]))
    assert (idle / NS_PER_S).tolist() == [8000, 60]


def built(place: Path, text: str) -> Masquerade | None:
    assert errors(place, SETTINGS + text) == []
    return load(place / "shunt.yaml", place / "services.d").settings.masquerade


def test_what_is_written(tmp_path: Path) -> None:
    assert built(tmp_path, "") is None
    assert built(tmp_path, "masquerade: off\n") is None
    assert built(tmp_path, "masquerade: {interfaces: eth0}\n") == Masquerade(("eth0",), (), PRIVATE)
    text = 'masquerade: {interfaces: [eth0], sources: 10.244.0.0/16, not_to: ["fd00::/8"]}\n'
    assert built(tmp_path, text) == Masquerade(
        ("eth0",), (ip_network("10.244.0.0/16"),), (ip_network("fd00::/8"),)
    )
    none = built(tmp_path, "masquerade: {interfaces: eth0, sources: 10.0.0.1, not_to: []}\n")
    assert none is not None
    assert none.not_to == ()


CASES = {
    "no interfaces": (
        "masquerade: {sources: 10.0.0.0/8}\n",
        '2: masquerade has no "interfaces"',
        "masquerade wants interfaces",
        'add "interfaces: [eth0]"',
    ),
    "another interface": (
        "masquerade:\n  interfaces: [eth0, eth1]\n",
        "3: interface eth1 is not among this node's interfaces",
        "its programs do it, and they are on eth0",
        "add it to interfaces, or remove it here",
    ),
    "a source": (
        "masquerade:\n  interfaces: eth0\n  sources: [10.0.0.1/8]\n",
        "4: sources 10.0.0.1/8 has bits set beyond its prefix",
        "masquerade.sources[0] wants an address, or a network such as 10.0.0.0/8",
        "write 10.0.0.0/8",
    ),
    "not_to": (
        "masquerade:\n  interfaces: eth0\n  sources: 10.0.0.0/8\n  not_to: home\n",
        "5: not_to home is not a network",
        "masquerade.not_to wants an address, or a network such as 10.0.0.0/8",
        "correct the line",
    ),
    "not_to alone": (
        "masquerade:\n  interfaces: eth0\n  not_to: 10.0.0.0/8\n",
        "4: not_to without sources",
        "it says whereto those are not masqueraded",
        "remove it, or write sources",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    text, what, why, fix = CASES[case]
    assert errors(tmp_path, SETTINGS + text) == [three(f"shunt.yaml:{what}", why, fix)]


def test_too_many_networks(tmp_path: Path) -> None:
    many = ", ".join(f"10.{n // 256}.{n % 256}.0/24" for n in range(501))
    (error,) = errors(tmp_path, f"{SETTINGS}masquerade: {{interfaces: eth0, sources: [{many}]}}\n")
    assert "sources has 501 networks" in error
