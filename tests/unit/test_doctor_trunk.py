# SPDX-License-Identifier: Apache-2.0
"""What doctor says of trunks and bonds that are described to it, and of a status."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shunt.agent.doctor import Level, check_balancer
from shunt.agent.doctor_daemon import check_closing, check_resolution
from shunt.agent.doctor_trunk import check_trunks
from shunt.agent.facts import DeviceFacts
from shunt.kern.netdev import Device
from shunt.kern.netlink import Link
from tests.unit.test_doctor import ETH0, FACTS, FULL, LO, MAC, NIC, bad, configuration, only

TAGGED = Link(9, "eth0.100", MAC, 1500, up=True, kind="vlan", lower=2, vlan=100)
STRIPS = replace(NIC, device=replace(NIC.device, offloads=frozenset({"rxvlan", "txvlan"})))
VETH = Link(2, "eth0", MAC, 1500, up=True, kind="veth", lower=3, lower_nsid=0)
PEER = Device(replace(VETH, name="far"), "veth", frozenset({"txvlan"}), FULL, "lab")


def test_a_driver_that_takes_tags_out_of_a_trunks_frames() -> None:
    facts = replace(FACTS, links={1: LO, 2: ETH0, 9: TAGGED}, devices={"eth0": STRIPS})
    found = only(check_trunks(facts, configuration()))
    assert "eth0 takes VLAN tags out of the frame (rxvlan)" in found.what
    assert "eth0.100" in found.what
    assert found.fix == "ethtool -K eth0 rxvlan off"


def test_without_vlan_devices_nobody_minds() -> None:
    other = replace(TAGGED, lower_nsid=4)  # its lower device is another host's number 2
    for links in ({1: LO, 2: ETH0}, {1: LO, 2: ETH0, 9: other}):
        facts = replace(FACTS, links=links, devices={"eth0": STRIPS})
        assert check_trunks(facts, configuration()) == []


def test_a_trunk_as_it_should_be() -> None:
    facts = replace(FACTS, links={1: LO, 2: ETH0, 9: TAGGED})
    (found,) = check_trunks(facts, configuration())
    assert found.level is Level.OK


def test_of_a_veth_the_other_end_is_asked() -> None:
    device = DeviceFacts(Device(VETH, "veth", frozenset({"rxvlan"}), FULL), peer=PEER)
    facts = replace(FACTS, links={2: VETH, 9: TAGGED}, devices={"eth0": device})
    found = only(check_trunks(facts, configuration()))
    assert found.fix == "nsenter --net=/run/netns/lab ethtool -K far txvlan off"
    facts = replace(facts, devices={"eth0": replace(device, peer=None)})
    assert bad(check_trunks(facts, configuration())) == []


def test_each_part_of_a_bond_is_asked_and_none_alone_is_attached_to() -> None:
    bond = Link(7, "bond0", MAC, 1500, up=True, kind="bond")
    parts = {n: replace(ETH0, ifindex=n, name=f"eth{n}", master=7) for n in (2, 3)}
    links = {1: LO, **parts, 7: bond, 9: replace(TAGGED, name="bond0.100", lower=7)}
    devices = {
        link.name: replace(STRIPS, device=replace(STRIPS.device, link=link))
        for link in parts.values()
    }
    told = configuration()
    facts = replace(FACTS, links=links, devices=devices)
    of_bond = replace(told, settings=replace(told.settings, interfaces=("bond0",)))
    assert [f.fix for f in bad(check_trunks(facts, of_bond))] == [
        "ethtool -K eth2 rxvlan off",
        "ethtool -K eth3 rxvlan off",
    ]
    both = {f.check for f in check_balancer(facts, of_bond) if f.check.startswith("offloads")}
    assert both == {"offloads eth2", "offloads eth3"}
    alone = replace(told, settings=replace(told.settings, interfaces=("eth2", "eth3")))
    found = bad(check_trunks(facts, alone))
    assert [f.check for f in found] == ["interface eth2", "interface eth3"]
    assert "interfaces: [bond0, eth3] in shunt.yaml" in found[0].fix


def test_a_bond_in_generic_mode_sees_no_tags() -> None:
    bond = Link(7, "bond0", MAC, 1500, up=True, kind="bond")
    links = {1: LO, 7: bond, 9: replace(TAGGED, name="bond0.100", lower=7)}
    told = configuration()
    told = replace(told, settings=replace(told.settings, interfaces=("eth9", "bond0")))
    device = DeviceFacts(replace(NIC.device, link=bond), "shunt_lb", "generic")
    found = only(check_trunks(replace(FACTS, links=links, devices={"bond0": device}), told))
    assert "interfaces: [eth9, bond0.100] in shunt.yaml" in found.fix
    native = replace(FACTS, links=links, devices={"bond0": replace(device, mode="native")})
    assert bad(check_trunks(native, told)) == []
    asked_for = replace(told, settings=replace(told.settings, xdp_mode="generic"))
    assert "generic mode" in only(check_trunks(native, asked_for)).what


PROBLEM = {"address": "10.0.0.5", "what": "backend 10.0.0.5 does not answer", "why": "no reply"}


@pytest.mark.parametrize("slow", [0, 12])
def test_backends_that_are_not_resolved_are_named_with_their_cost(slow: int) -> None:
    status: dict[str, Any] = {"events": {"FIB_FALLBACK": slow} if slow else {}}
    status["nexthop_problems"] = [{**PROBLEM, "fix": "ip neigh show"}]
    found = only(list(check_resolution(status)))
    assert "10.0.0.5 is not resolved: backend 10.0.0.5 does not answer" in found.what
    assert ("12 packets" in found.why) == bool(slow)
    assert found.fix == "ip neigh show"
    status["nexthop_problems"] = []
    (fine,) = check_resolution(status)
    assert fine.level is Level.OK
    assert ("12 packets" in fine.what) == bool(slow)


def test_a_shuntd_that_may_not_go_into_other_namespaces() -> None:
    barred = {"what": "not closed", "why": "it is not allowed", "fix": "install it"}
    closing: dict[str, Any] = {"by": "iterator", "barred": barred}
    status = {"sockets": {"scope": "all", "closing": closing}}
    found = only(list(check_closing(status)))
    assert (found.level, found.what, found.fix) == (Level.WARN, "not closed", "install it")
    closing["barred"] = None
    (fine,) = check_closing(status)
    assert fine.level is Level.OK
    closing["by"] = ""  # it is not to close any
    assert list(check_closing(status)) == []
    status["sockets"].update(scope="host", closing={"by": "iterator", "barred": None})
    assert list(check_closing(status)) == []
