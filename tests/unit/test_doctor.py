# SPDX-License-Identifier: Apache-2.0
"""What doctor says of hosts that are described to it."""

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from shunt.agent.doctor import Finding, Level, check_balancer, worst
from shunt.agent.doctor_backend import check_backend
from shunt.agent.facts import BackendFacts, BalancerFacts, DeviceFacts
from shunt.agent.nexthops import NextHop
from shunt.kern.features import Feature
from shunt.kern.netdev import XDP_ACT_BASIC, XDP_ACT_NDO_XMIT, XDP_ACT_REDIRECT, Device
from shunt.kern.netlink import (
    IFA_F_DADFAILED,
    IFA_F_TENTATIVE,
    InterfaceAddress,
    Link,
    Route,
    RouteEntry,
)
from shunt.lb.errors import ShuntError
from shunt.lb.model import (
    Backend,
    Configuration,
    IPAddress,
    Masquerade,
    Mode,
    Port,
    Protocol,
    Service,
    Settings,
)

VIP, VIP6 = ip_address("203.0.113.10"), ip_address("2001:db8:a::10")
NEAR, FAR6 = ip_address("10.0.0.5"), ip_address("fd00::5")
OWN = ip_address("10.0.0.11")
MAC = bytes.fromhex("020000000011")
FULL = XDP_ACT_BASIC | XDP_ACT_REDIRECT | XDP_ACT_NDO_XMIT
LO = Link(1, "lo", b"", 65536, up=True, loopback=True)
ETH0 = Link(2, "eth0", MAC, 1600, up=True)
NIC = DeviceFacts(Device(ETH0, "ixgbe", frozenset({"rx", "tx", "gro"}), FULL))
HOP = NextHop(2, "eth0", NEAR, False, MAC, 1600, OWN)
JIT = Feature("jit", True, False, "on")


def configuration(mode: Mode = Mode.DSR_IPIP, xdp_mode: str = "auto") -> Configuration:
    service = Service(
        "web", (VIP,), (Port(80, Protocol.TCP),), mode, (Backend(NEAR), Backend(FAR6))
    )
    settings = Settings(("eth0",), xdp_mode)  # type: ignore[arg-type]
    return Configuration(settings, (service,))


FACTS = BalancerFacts(
    features=(JIT,),
    links={1: LO, 2: ETH0},
    devices={"eth0": NIC},
    addresses=frozenset({OWN}),
    hops={NEAR: HOP, FAR6: replace(HOP, via=FAR6)},
    local_ports=range(32768, 61000),
    memory_bytes=24 * 2**30,
)


def bad(findings: Sequence[Finding]) -> list[Finding]:
    """What is not ok; each of which must say why and how to fix it."""
    found = [f for f in findings if f.level is not Level.OK]
    assert all(f.what and f.why and f.fix for f in found)
    return found


def only(findings: Sequence[Finding]) -> Finding:
    (found,) = bad(findings)
    return found


def test_a_node_as_it_should_be() -> None:
    findings = check_balancer(FACTS, configuration())
    assert bad(findings) == []
    assert worst(findings) is Level.OK
    assert {f.check for f in findings} >= {"jit", "interface eth0", "offloads eth0", "mtu", "vips"}


def test_features_that_are_missing() -> None:
    missing = replace(JIT, present=False, what="interpreted", fix="sysctl ...")
    facts = replace(FACTS, features=(missing, replace(missing, name="ipip")))
    assert only(check_balancer(facts, configuration())).level is Level.WARN
    facts = replace(FACTS, features=(replace(missing, needed=True),))
    findings = check_balancer(facts, configuration())
    assert only(findings).level is Level.ERROR
    assert worst(findings) is Level.ERROR


def test_that_hooks_cannot_be_compiled_is_told_and_is_no_warning() -> None:
    missing = replace(JIT, name="hook_compiler", present=False, what="no bcc", fix="apt-get ...")
    findings = check_balancer(replace(FACTS, features=(missing,)), configuration())
    assert bad(findings) == []
    (told,) = [f for f in findings if f.check == "hook_compiler"]
    assert told.what == "no bcc; to change that: apt-get ..."


def test_interfaces_absent_down_and_without_carrier() -> None:
    finding = only(check_balancer(replace(FACTS, links={1: LO}, devices={}), configuration()))
    assert (finding.level, finding.what) == (Level.ERROR, "interface eth0 does not exist")
    facts = replace(FACTS, links={1: LO, 2: replace(ETH0, up=False)})
    assert only(check_balancer(facts, configuration())).fix == "ip link set dev eth0 up"
    facts = replace(FACTS, links={1: LO, 2: replace(ETH0, carrier=False)})
    assert "no carrier" in only(check_balancer(facts, configuration())).what


def with_device(facts: DeviceFacts) -> BalancerFacts:
    return replace(FACTS, devices={"eth0": facts})


@pytest.mark.parametrize(
    ("xdp_mode", "level"), [("auto", Level.WARN), ("native", Level.ERROR), ("generic", None)]
)
def test_a_driver_without_native_xdp(xdp_mode: str, level: Level | None) -> None:
    old = replace(NIC, device=replace(NIC.device, driver="e1000", xdp=0))
    found = bad(check_balancer(with_device(old), configuration(xdp_mode=xdp_mode)))
    # What cannot receive natively cannot send so either.
    assert [f.level for f in found if f.check == "interface eth0"] == ([level] if level else [])
    assert bool(found) == (level is not None)


def test_a_kernel_that_does_not_tell_is_no_finding() -> None:
    unknown = replace(NIC, device=replace(NIC.device, xdp=None))
    findings = check_balancer(with_device(unknown), configuration())
    assert bad(findings) == []
    assert any("does not tell" in f.what for f in findings)


def test_an_interface_that_is_taken() -> None:
    taken = replace(NIC, program="bpfilter", mode="native")
    finding = only(check_balancer(with_device(taken), configuration()))
    assert "already has XDP program 'bpfilter'" in finding.what
    ours = replace(NIC, program="shunt_lb", mode="generic")
    finding = only(check_balancer(with_device(ours), configuration()))
    assert finding.level is Level.WARN


def test_offloads_of_hardware() -> None:
    merging = replace(NIC.device, offloads=frozenset({"lro", "rx-gro-hw", "tx"}))
    finding = only(check_balancer(with_device(replace(NIC, device=merging)), configuration()))
    assert finding.fix == "ethtool -K eth0 lro off rx-gro-hw off"
    virtio = replace(NIC, device=replace(NIC.device, driver="virtio_net"))
    finding = only(check_balancer(with_device(virtio), configuration()))
    assert finding.fix == "ethtool -K eth0 rx off"
    native = replace(virtio, program="shunt_lb", mode="native")
    assert bad(check_balancer(with_device(native), configuration())) == []


VETH = DeviceFacts(
    Device(replace(ETH0, kind="veth"), "veth", frozenset(), FULL),
    peer=Device(replace(ETH0, name="lb1"), "veth", frozenset({"gro"}), FULL, "switch"),
)


def test_a_veth() -> None:
    assert bad(check_balancer(with_device(VETH), configuration())) == []
    assert VETH.peer is not None
    peer = replace(VETH.peer, offloads=frozenset({"gro", "tx", "tso"}))
    finding = only(check_balancer(with_device(replace(VETH, peer=peer)), configuration()))
    assert finding.level is Level.ERROR
    assert finding.fix == (
        "nsenter --net=/run/netns/switch ethtool -K lb1 tx off tso off gso off"
    )  # fmt: skip
    here = replace(peer, namespace="")
    finding = only(check_balancer(with_device(replace(VETH, peer=here)), configuration()))
    assert finding.fix == "ethtool -K lb1 tx off tso off gso off"
    finding = only(check_balancer(with_device(replace(VETH, peer=None)), configuration()))
    assert finding.level is Level.WARN


def test_a_veth_whose_other_end_does_not_poll() -> None:
    deaf = replace(VETH, device=replace(VETH.device, xdp=FULL & ~XDP_ACT_NDO_XMIT))
    finding = only(check_balancer(with_device(deaf), configuration()))
    assert (finding.level, finding.check) == (Level.ERROR, "sending eth0")
    assert finding.fix == "nsenter --net=/run/netns/switch ethtool -K lb1 gro on"
    assert bad(check_balancer(with_device(deaf), configuration(xdp_mode="generic"))) == []


def test_backends_without_a_way() -> None:
    error = ShuntError("no route to 10.0.0.5", "none", "add one")
    facts = replace(FACTS, hops={**FACTS.hops, NEAR: error})
    assert only(check_balancer(facts, configuration())).what == "no route to 10.0.0.5"
    behind = replace(HOP, gateway=True, via=ip_address("10.0.0.1"))
    facts = replace(FACTS, hops={**FACTS.hops, NEAR: behind})
    assert bad(check_balancer(facts, configuration())) == []
    finding = only(check_balancer(facts, configuration(Mode.DSR_L2)))
    assert "out of dsr-l2's reach" in finding.what


@pytest.mark.parametrize(
    ("mtu", "tight"), [(1600, []), (1540, []), (1539, [1540]), (1519, [1520, 1540])]
)
def test_room_for_the_outer_header(mtu: int, tight: list[int]) -> None:
    facts = replace(FACTS, hops={a: replace(HOP, mtu=mtu) for a in (NEAR, FAR6)})
    found = bad(check_balancer(facts, configuration()))
    assert [f.fix.split("#")[0].strip() for f in found] == [
        f"ip link set dev eth0 mtu {needed}" for needed in tight
    ]
    assert all(f.level is Level.WARN for f in found)
    assert bad(check_balancer(facts, configuration(Mode.DSR_L2))) == []


def test_ports_of_nat_that_the_host_uses_too() -> None:
    facts = replace(FACTS, local_ports=range(20000, 61000), reserved_ports=frozenset({80, 81, 99}))
    finding = only(check_balancer(facts, configuration(Mode.NAT)))
    assert "10000 of nat's ports 10000-29999" in finding.what
    assert finding.fix == "sysctl -w net.ipv4.ip_local_reserved_ports=80-81,99,10000-29999"
    assert bad(check_balancer(facts, configuration())) == []
    masquerading = replace(configuration().settings, masquerade=Masquerade(("eth0",)))
    for_that = replace(configuration(), settings=masquerading)
    assert only(check_balancer(facts, for_that)).fix == finding.fix
    reserved = replace(facts, reserved_ports=frozenset(range(10000, 30000)))
    assert bad(check_balancer(reserved, configuration(Mode.NAT))) == []


def test_a_vip_that_is_the_hosts_own() -> None:
    finding = only(check_balancer(replace(FACTS, addresses=frozenset({VIP})), configuration()))
    assert finding.what == "203.0.113.10 is an address of this host"


# ----- the backend's side

GATEWAY = ip_address("10.0.0.1")
QUIET = {
    "net.ipv4.conf.all.arp_ignore": "1",
    "net.ipv4.conf.all.arp_announce": "2",
    "net.ipv4.conf.all.rp_filter": "0",
    "net.ipv4.conf.eth0.rp_filter": "0",
}
TUNL0 = Link(3, "tunl0", b"", 1480, up=True, kind="ipip")
SERVER = BackendFacts(
    links={1: LO, 2: ETH0, 3: TUNL0},
    addresses=(InterfaceAddress(2, NEAR, 24), InterfaceAddress(1, VIP, 32)),
    sysctls=QUIET,
    routes={4: Route(ip_address("192.0.2.1"), ETH0, 1600, GATEWAY)},
    entries={4: RouteEntry(ip_network("0.0.0.0/0"), 0, 254, 3)},
    devices={"eth0": NIC},
)


def server(vips: Sequence[IPAddress] = (VIP,), facts: BackendFacts = SERVER) -> list[Finding]:
    return check_backend(facts, vips)


def test_a_backend_as_it_should_be() -> None:
    for mode in set(Mode) - {Mode.DSR_GENEVE}:  # test_doctor_geneve.py
        assert bad(check_backend(SERVER, [VIP], mode)) == []


@pytest.mark.parametrize(
    ("held", "fix"),
    [
        ([], "ip addr add 203.0.113.10/32 dev lo"),
        (
            [InterfaceAddress(2, VIP, 24)],
            "ip addr del 203.0.113.10/24 dev eth0 && ip addr add 203.0.113.10/32 dev lo",
        ),
        (
            [InterfaceAddress(1, VIP, 24)],
            "ip addr del 203.0.113.10/24 dev lo && ip addr add 203.0.113.10/32 dev lo",
        ),
        ([InterfaceAddress(3, VIP, 32)], None),  # on the tunnel, as LVS has it
    ],
)
def test_where_the_vip_is(held: list[InterfaceAddress], fix: str | None) -> None:
    facts = replace(SERVER, addresses=(SERVER.addresses[0], *held))
    found = bad(check_backend(facts, [VIP], Mode.DSR_L2))
    assert [f.fix for f in found] == ([fix] if fix else [])
    assert all(f.level is Level.ERROR for f in found)


def test_a_vip_on_a_dummy() -> None:
    dummy = Link(4, "vip0", MAC, 1500, up=True, kind="dummy")
    held = InterfaceAddress(4, VIP, 24)
    facts = replace(SERVER, links={**SERVER.links, 4: dummy}, addresses=(held,))
    assert bad(server(facts=facts)) == []
    down = replace(facts, links={**SERVER.links, 4: replace(dummy, up=False)})
    assert only(server(facts=down)).fix == "ip link set dev vip0 up"


@pytest.mark.parametrize("flags", [IFA_F_TENTATIVE, IFA_F_TENTATIVE | IFA_F_DADFAILED])
def test_an_ipv6_vip_that_others_have_too(flags: int) -> None:
    dummy = Link(4, "vip0", MAC, 1500, up=True, kind="dummy")
    facts = replace(
        SERVER,
        links={**SERVER.links, 4: dummy},
        addresses=(InterfaceAddress(4, VIP6, 128, flags),),
    )
    finding = next(f for f in bad(server([VIP6], facts)) if f.check == f"vip {VIP6}")
    assert "duplicate address detection" in finding.why
    assert finding.fix.endswith(f"ip addr add {VIP6}/128 dev lo nodad")


@pytest.mark.parametrize(
    ("change", "fix"),
    [
        ({"all.arp_ignore": "0"}, "all.arp_ignore=1 net.ipv4.conf.eth0.arp_ignore=1"),
        ({"eth0.arp_ignore": "3"}, "all.arp_ignore=1 net.ipv4.conf.eth0.arp_ignore=1"),
        ({"all.arp_announce": "1"}, "all.arp_announce=2"),
        ({"all.arp_announce": "0", "eth0.arp_announce": "2"}, None),
    ],
)
def test_arp(change: dict[str, str], fix: str | None) -> None:
    settings = {f"net.ipv4.conf.{key}": value for key, value in change.items()}
    facts = replace(SERVER, sysctls=QUIET | settings)
    found = bad(check_backend(facts, [VIP], Mode.DSR_L2))
    assert [f.fix for f in found] == ([f"sysctl -w net.ipv4.conf.{fix}"] if fix else [])
    assert all(f.level is Level.ERROR for f in found)
    assert all(f.level is Level.WARN for f in bad(check_backend(facts, [VIP], Mode.DSR_IPIP)))


def test_a_strict_reverse_path_filter_on_the_tunnel() -> None:
    facts = replace(SERVER, sysctls=QUIET | {"net.ipv4.conf.all.rp_filter": "1"})
    finding = only(server(facts=facts))
    assert finding.fix == "sysctl -w net.ipv4.conf.tunl0.rp_filter=2"
    loose = replace(facts, sysctls={**facts.sysctls, "net.ipv4.conf.tunl0.rp_filter": "2"})
    assert bad(server(facts=loose)) == []
    # Where clients are answered the strict filter finds nothing wrong.
    assert bad(check_backend(facts, [VIP], Mode.DSR_L2)) == []


def test_nothing_that_unwraps() -> None:
    down = replace(SERVER, links={1: LO, 2: ETH0, 3: replace(TUNL0, up=False)})
    assert only(server(facts=down)).fix == "ip link set dev tunl0 up"
    absent = replace(SERVER, links={1: LO, 2: ETH0})
    assert only(server(facts=absent)).fix == "shunt decap --iface eth0"
    module = replace(absent, ipip_module=True)
    assert only(server(facts=module)).fix == "modprobe ipip && ip link set dev tunl0 up"
    program = replace(NIC, program="shunt_decap", mode="native")
    assert bad(server(facts=replace(absent, devices={"eth0": program}))) == []
    merging = replace(program, device=replace(NIC.device, offloads=frozenset({"lro"})))
    finding = only(server(facts=replace(absent, devices={"eth0": merging})))
    assert finding.fix == "ethtool -K eth0 lro off"


def with_mtu(mtu: int, advmss: int = 0) -> BackendFacts:
    link = replace(ETH0, mtu=mtu)
    route = Route(ip_address("192.0.2.1"), link, mtu, GATEWAY, advmss=advmss)
    return replace(SERVER, links={1: LO, 2: link, 3: TUNL0}, routes={4: route})


@pytest.mark.parametrize(
    ("mtu", "advmss", "enough"),
    [(1520, 0, True), (1519, 0, False), (1500, 0, False), (1500, 1440, True), (1500, 1441, False)],
)
def test_the_mss_leaves_room(mtu: int, advmss: int, enough: bool) -> None:
    found = bad(server(facts=with_mtu(mtu, advmss)))
    assert (not found) == enough
    if not enough:
        assert found[0].level is Level.WARN
        assert found[0].fix == (
            f"ip -4 route change default via 10.0.0.1 dev eth0 table 254 proto 3 advmss {mtu - 60}"
        )


def test_an_mss_for_an_ipv6_header_where_the_host_has_ipv6() -> None:
    six = InterfaceAddress(2, FAR6, 64)
    facts = with_mtu(1520)
    facts = replace(facts, addresses=(*facts.addresses, six))
    assert only(server(facts=facts)).fix.endswith("advmss 1440")
    several = replace(facts, entries={4: None})
    assert only(server(facts=several)).fix.startswith("ip link set dev eth0 mtu 1540")


def test_a_clamp_repeats_all_of_the_route() -> None:
    facts = with_mtu(1500)
    route = facts.routes[4]
    assert isinstance(route, Route)
    entry = RouteEntry(ip_network("192.0.0.0/8", strict=False), 100, 7, 16, NEAR)
    facts = replace(facts, routes={4: replace(route, mtu=1450, gateway=FAR6)}, entries={4: entry})
    # 1450 + 20 fit into 1500: nothing to do.
    assert bad(server(facts=facts)) == []
    facts = replace(facts, routes={4: replace(route, mtu=1490, gateway=FAR6)})
    assert only(server(facts=facts)).fix == (
        "ip -4 route change 192.0.0.0/8 via inet6 fd00::5 dev eth0 table 7 proto 16 metric 100"
        " src 10.0.0.5 mtu 1490 advmss 1440"
    )


def test_no_way_back() -> None:
    error = ShuntError("no route", "the routing table has no route that leads there", "add")
    facts = replace(SERVER, routes={4: error})
    found = bad(server(facts=facts))
    assert found[0].what == "no IPv4 route back to clients"
    assert found[0].level is Level.ERROR
