# SPDX-License-Identifier: Apache-2.0
"""What doctor says of backends of mode dsr-geneve that are described to it."""

from dataclasses import replace
from ipaddress import ip_address

import pytest

from shunt.agent.doctor import Finding, Level, check_balancer, outer_header_bytes
from shunt.agent.doctor_backend import check_backend
from shunt.agent.facts import BackendFacts
from shunt.agent.nexthops import NextHop
from shunt.kern.netlink import InterfaceAddress, Route
from shunt.lb.model import (
    Backend,
    Configuration,
    IPAddress,
    Mode,
    Port,
    Protocol,
    Service,
    Settings,
)
from tests.unit.test_doctor import (
    ETH0,
    FACTS,
    HOP,
    LO,
    NEAR,
    NIC,
    VIP,
    VIP6,
    bad,
)

OWN6 = ip_address("fd00::5")
DECAP = replace(NIC, program="shunt_decap", mode="native")
ROUTES = {v: Route(ip_address(a), ETH0, 1600) for v, a in ((4, "192.0.2.1"), (6, "2001:db8::1"))}
SERVER = BackendFacts(
    links={1: LO, 2: ETH0},
    addresses=(InterfaceAddress(2, NEAR, 24), InterfaceAddress(2, OWN6, 64)),
    sysctls={},
    routes=ROUTES,
    devices={"eth0": DECAP},
    geneve={"eth0": (NEAR, OWN6)},
)


def found(facts: BackendFacts, *vips: IPAddress) -> list[Finding]:
    return bad(check_backend(facts, vips or (VIP, VIP6), Mode.DSR_GENEVE))


def test_a_server_without_the_vip_is_as_it_should_be() -> None:
    assert found(SERVER) == []
    said = [f.what for f in check_backend(SERVER, [VIP], Mode.DSR_GENEVE)]
    assert "Geneve is opened on eth0" in said
    assert "they get the VIP, and an MSS that fits, on eth0" in said


@pytest.mark.parametrize("attached", [False, True])
def test_nothing_opens_it(attached: bool) -> None:
    facts = replace(SERVER, geneve={"eth0": ()} if attached else {})
    findings = found(facts)
    assert {f.check for f in findings} == {"geneve IPv4", "geneve IPv6"}
    assert all(f.level is Level.ERROR for f in findings)
    fix = "shunt decap --iface eth0 --address 10.0.0.5 --address fd00::5"
    assert {f.fix for f in findings} == {fix}
    assert all(("given no address" in f.why) == attached for f in findings)


def test_a_family_that_nothing_stands_for() -> None:
    (finding,) = found(replace(SERVER, geneve={"eth0": (NEAR,)}))
    assert (finding.level, finding.check) == (Level.ERROR, "geneve IPv6")
    assert finding.fix == "shunt decap --iface eth0 --address 10.0.0.5 --address fd00::5"
    assert found(replace(SERVER, geneve={"eth0": (NEAR,)}), VIP) == []
    without = replace(SERVER, addresses=SERVER.addresses[:1], geneve={"eth0": (NEAR,)})
    (finding,) = found(without)
    assert finding.fix.endswith("--address ADDRESS")


def test_answers_that_leave_elsewhere() -> None:
    other = replace(ETH0, ifindex=7, name="eth1")
    route = replace(ROUTES[4], link=other)
    (finding,) = found(replace(SERVER, routes={4: route}), VIP)
    assert (finding.level, finding.check) == (Level.ERROR, "answers IPv4")
    assert "clients are answered on eth1" in finding.what


def test_an_address_of_another() -> None:
    (finding,) = found(replace(SERVER, geneve={"eth0": (NEAR, ip_address("10.0.0.99"))}), VIP)
    assert (finding.level, finding.check) == (Level.WARN, "address 10.0.0.99")
    assert finding.fix == "ip addr add 10.0.0.99/32 dev eth0"


def test_a_strict_reverse_path_filter() -> None:
    strict = {"net.ipv4.conf.all.rp_filter": "1"}
    assert found(replace(SERVER, sysctls=strict), VIP) == []
    elsewhere = replace(SERVER, sysctls=strict, geneve={"eth1": (NEAR,)})
    assert "rp_filter eth1" in {f.check for f in found(elsewhere, VIP)}


@pytest.mark.parametrize(("mode", "outer"), [(Mode.DSR_IPIP, 20), (Mode.DSR_GENEVE, 60)])
def test_the_balancers_room(mode: Mode, outer: int) -> None:
    assert outer_header_bytes(NEAR, mode) == outer
    service = Service("web", (VIP,), (Port(80, Protocol.TCP),), mode, (Backend(NEAR),))
    configuration = Configuration(Settings(interfaces=("eth0",)), (service,))
    for mtu, enough in ((1500 + outer, True), (1500 + outer - 1, False)):
        hop: NextHop = replace(HOP, mtu=mtu)
        facts = replace(FACTS, hops={NEAR: hop})
        findings = [f for f in check_balancer(facts, configuration) if f.check.startswith("mtu")]
        assert [f.level is Level.OK for f in findings] == [enough]
