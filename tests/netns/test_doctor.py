# SPDX-License-Identifier: Apache-2.0
"""Doctor on real hosts that are set up wrong: it says so, its fixes are pasted, all is well.

```
    client  192.0.2.2, 2001:db8:1::2  (and the gateway of the backend, and its neighbour)
      |eth0 10.9.0.1/24 fd09::1/64
      |
      |eth0 10.9.0.2/24 fd09::2/64
    backend                  the VIPs: 203.0.113.10, 2001:db8:a::10
```
"""

import os
import socket
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import pytest

from shunt.agent import facts
from shunt.agent.doctor import Finding, Level, check_balancer
from shunt.agent.doctor_backend import check_backend
from shunt.kern import neighbours
from shunt.kern.netlink import Netlink
from shunt.lab.netns import Namespace, veth
from shunt.lb.model import Backend, Configuration, Mode, Port, Protocol, Service, Settings
from shunt.xdp import decap
from tests.netns.shunt_host import CLIENT, EMPTY, Host

ROOT = Path(__file__).resolve().parents[2]
VIP, VIP6 = ip_address("203.0.113.10"), ip_address("2001:db8:a::10")


class Hosts:
    """The client's side and the host that doctor looks at."""

    def __init__(self, client: Namespace, here: Namespace, tools: Path) -> None:
        self.client, self.here, self.tools = client, here, tools

    def backend(self, mode: Mode) -> list[Finding]:
        with self.here.inside():
            return check_backend(facts.gather_backend(), [VIP, VIP6], mode)

    def paste(self, findings: Sequence[Finding]) -> None:
        """Run each fix literally, as root on this host would."""
        for finding in findings:
            path = f"{self.tools}:{os.environ['PATH']}"
            self.here.run("env", f"PATH={path}", "sh", "-ec", finding.fix)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    # The command `shunt` as the package installs it.
    shunt = tmp_path / "shunt"
    shunt.write_text(
        f'#!/bin/sh\nPYTHONPATH={ROOT}/build/py exec {sys.executable} -m shunt.cli.main "$@"\n'
    )
    shunt.chmod(shunt.stat().st_mode | stat.S_IXUSR)
    client = Namespace.create(f"shunt-dr-{os.getpid()}-client")
    try:
        here = Namespace.create(f"shunt-dr-{os.getpid()}-here")
        try:
            for namespace in (client, here):
                # The link-local address, from which neighbours are asked for, at once.
                namespace.sysctl({"ipv6.conf.default.accept_dad": 0})
            veth(client, "eth0", here, "eth0", 1500)
            for namespace, last in ((client, 1), (here, 2)):
                namespace.ip(
                    f"addr add 10.9.0.{last}/24 dev eth0",
                    f"addr add fd09::{last}/64 dev eth0 nodad",
                )
            client.sysctl({f"ipv{v}.neigh.eth0.retrans_time_ms": 300 for v in (4, 6)})
            client.ip("addr add 192.0.2.2/32 dev lo", "addr add 2001:db8:1::2/128 dev lo nodad")
            # IPv6 begins once the kernel has noticed that the link is up, within a second or so.
            client.run("ping", "-c", "1", "-w", "10", "-i", "0.2", "fd09::2")
            yield Hosts(client, here, tmp_path)
        finally:
            here.delete()
    finally:
        client.delete()


def bad(findings: Sequence[Finding]) -> list[Finding]:
    return [f for f in findings if f.level is not Level.OK]


def checks(findings: Sequence[Finding]) -> set[str]:
    return {f.check for f in bad(findings)}


def answers(hosts: Hosts, vip: str) -> bool:
    """Does the backend answer its neighbour's ARP or neighbour discovery for the VIP?"""
    with hosts.client.inside(), Netlink() as netlink:
        ifindex = netlink.link("eth0").ifindex
        address = ip_address(vip)
        neighbours.keep(netlink, ifindex, address)
        try:
            # The kernel asks three times and then gives up.
            found = None
            while found is None or found.state == neighbours.NUD_INCOMPLETE:
                time.sleep(0.05)
                found = neighbours.find(netlink, ifindex, address)
            return found.usable_mac is not None
        finally:
            hosts.client.ip(f"neigh del {vip} dev eth0")


def test_a_backend_of_dsr_l2(hosts: Hosts) -> None:
    hosts.here.ip(
        "addr add 203.0.113.10/24 dev eth0",
        "addr add 2001:db8:a::10/64 dev eth0 nodad",
        "route add default via 10.9.0.1",
        "route add default via fd09::1",
    )
    hosts.client.ip("route add 203.0.113.10 dev eth0", "route add 2001:db8:a::10 dev eth0")
    hosts.here.sysctl({"ipv4.conf.all.arp_ignore": 0, "ipv4.conf.all.arp_announce": 0})
    assert answers(hosts, str(VIP))
    assert answers(hosts, str(VIP6))
    findings = hosts.backend(Mode.DSR_L2)
    assert checks(findings) == {f"vip {VIP}", f"vip {VIP6}", "arp"}
    assert {f.level for f in bad(findings)} == {Level.ERROR}
    hosts.paste(bad(findings))
    assert bad(hosts.backend(Mode.DSR_L2)) == []
    # And it is so: the neighbour finds neither VIP here any more, but the host's own address.
    assert not answers(hosts, str(VIP))
    assert not answers(hosts, str(VIP6))
    assert answers(hosts, "10.9.0.2")


def test_the_vip_on_lo_alone_is_not_enough(hosts: Hosts) -> None:
    hosts.here.ip(
        "addr add 203.0.113.0/24 dev lo",  # a whole network by mistake
        "addr add 203.0.113.10/24 dev lo",
        "route add default via 10.9.0.1",
        "route add default via fd09::1",
    )
    findings = hosts.backend(Mode.DSR_L2)
    assert checks(findings) == {f"vip {VIP}", f"vip {VIP6}", "arp"}
    hosts.paste(bad(findings))
    assert bad(hosts.backend(Mode.DSR_L2)) == []


def announced_mss(hosts: Hosts, vip: str, client: str) -> int:
    """The MSS of the backend's SYN-ACK, as a client's connection sees it."""
    family = socket.AF_INET6 if ":" in vip else socket.AF_INET
    with hosts.here.inside(), socket.socket(family) as listener:
        listener.bind((vip, 80))
        listener.listen(1)
        with hosts.client.inside(), socket.socket(family) as connection:
            connection.bind((client, 0))
            connection.connect((vip, 80))
            return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)


def test_a_backend_of_dsr_ipip(hosts: Hosts) -> None:
    hosts.here.sysctl({"ipv4.conf.all.rp_filter": 1, "ipv4.conf.eth0.rp_filter": 1})
    findings = hosts.backend(Mode.DSR_IPIP)
    # Without a route back there is a word to fill in, so this one cannot be pasted.
    assert {"replies IPv4", "replies IPv6"} <= checks(findings)
    hosts.here.ip(
        "route add default via 10.9.0.1 metric 50 src 10.9.0.2", "route add default via fd09::1"
    )
    hosts.client.ip("route add 203.0.113.10 via 10.9.0.2", "route add 2001:db8:a::10 via fd09::2")
    findings = hosts.backend(Mode.DSR_IPIP)
    assert checks(findings) == {
        *(f"vip {VIP}", f"vip {VIP6}", "arp", "mss IPv4", "mss IPv6"),
        *("decapsulation IPv4", "decapsulation IPv6"),
    }
    hosts.paste([f for f in bad(findings) if f.check.startswith("vip ")])
    timestamps = 12  # an option of every segment
    assert announced_mss(hosts, str(VIP), "192.0.2.2") == 1460 - timestamps
    hosts.paste([f for f in bad(findings) if f.check.startswith("mss ")])
    # 1500 less an outer IPv6 header, an IP header, a TCP header.
    assert announced_mss(hosts, str(VIP), "192.0.2.2") == 1500 - 40 - 20 - 20 - timestamps
    assert announced_mss(hosts, str(VIP6), "2001:db8:1::2") == 1500 - 40 - 40 - 20 - timestamps
    rest = checks(hosts.backend(Mode.DSR_IPIP))
    assert rest == {"arp", "decapsulation IPv4", "decapsulation IPv6"}


def test_a_backend_of_dsr_geneve(hosts: Hosts) -> None:
    """Without the VIP anywhere. One command for both families."""
    hosts.here.ip("route add default via 10.9.0.1", "route add default via fd09::1")
    findings = hosts.backend(Mode.DSR_GENEVE)
    assert checks(findings) == {"geneve IPv4", "geneve IPv6"}
    assert len({f.fix for f in bad(findings)}) == 1
    bpffs = Path(f"/sys/fs/bpf/shunt-dr-{os.getpid()}")
    try:
        (fix,) = {f"{f.fix} --bpffs {bpffs}" for f in bad(findings)}
        hosts.paste([replace(findings[0], fix=fix)])
        assert bad(hosts.backend(Mode.DSR_GENEVE)) == []
        hosts.here.ip("addr del 10.9.0.2/24 dev eth0", "addr add 10.9.0.7/24 dev eth0")
        assert "address 10.9.0.2" in checks(hosts.backend(Mode.DSR_GENEVE))
    finally:
        decap.cleanup(bpffs)
        bpffs.rmdir()


def test_a_strict_filter_where_packets_come_in(hosts: Hosts) -> None:
    """A second interface, on which the load balancer is and clients are not."""
    hosts.here.ip(
        "link add name eth1 type veth peer name eth2",
        "link set dev eth1 up",
        "link set dev eth2 up",
        "addr add 10.8.0.1/24 dev eth1",
        "addr add 203.0.113.10/32 dev lo",
        "addr add 2001:db8:a::10/128 dev lo nodad",
        "route add default via 10.9.0.1",
        "route add default via fd09::1",
    )
    hosts.here.sysctl(
        {
            "ipv4.conf.all.arp_ignore": 1,
            "ipv4.conf.all.arp_announce": 2,
            "ipv4.conf.all.rp_filter": 1,
        }
    )
    findings = hosts.backend(Mode.DSR_L2)
    assert checks(findings) == {"rp_filter eth1"}
    hosts.paste(bad(findings))
    assert bad(hosts.backend(Mode.DSR_L2)) == []


def test_a_node_of_shuntd(hosts: Hosts) -> None:
    service = Service(
        "web",
        (VIP,),
        (Port(80, Protocol.TCP),),
        Mode.NAT,
        (Backend(ip_address("10.9.0.1")), Backend(ip_address("10.9.0.9"))),
    )
    configuration = Configuration(Settings(("eth0", "eth7")), (service,))

    def look() -> list[Finding]:
        with hosts.here.inside():
            return check_balancer(facts.gather_balancer(configuration), configuration)

    hosts.here.sysctl({"ipv4.ip_local_port_range": "20000 60999"})
    hosts.client.run("ethtool", "-K", "eth0", "tx", "on")
    findings = look()
    shown = {f.check: f for f in bad(findings) if f.check not in ("jit", "bpffs", "xdp_features")}
    expected = {"interface eth7", "offloads eth0", "nat ports", "sending eth0"}
    if not any(f.check == "xdp_features" and f.level is Level.OK for f in findings):
        expected.remove("sending eth0")
    assert shown.keys() == expected
    del shown["interface eth7"]
    hosts.paste(list(shown.values()))
    assert checks(look()) - {"jit", "bpffs", "xdp_features"} == {"interface eth7"}
    # A neighbour that was looked for and not found.
    with hosts.here.inside(), Netlink() as netlink:
        neighbours.keep(netlink, netlink.link("eth0").ifindex, ip_address("10.9.0.9"))
    end = time.monotonic() + 8
    while "backend 10.9.0.9" not in checks(look()) and time.monotonic() < end:
        time.sleep(0.2)
    (finding,) = [f for f in bad(look()) if f.check == "backend 10.9.0.9"]
    assert "does not answer on eth0" in finding.what


def test_a_veth_that_is_set_up_right(hosts: Hosts) -> None:
    configuration = Configuration(Settings(("eth0",)), ())
    hosts.client.run("ethtool", "-K", "eth0", "gro", "on")  # which makes a veth poll
    with hosts.here.inside():
        findings = check_balancer(facts.gather_balancer(configuration), configuration)
    assert checks(findings) <= {"jit", "bpffs", "xdp_features"}


# What the kernel's own routes answer differs from what shuntd sees, by the interface it came in on.
SPLIT = (
    "route add 10.30.0.0/16 via 10.9.0.77",
    "route add 10.30.0.0/16 via 10.9.0.2 table 100",
    "rule add iif eth0 lookup 100 priority 10",
)


def test_packets_that_ask_the_kernels_routes_are_counted_and_their_backend_named(own: Host) -> None:
    own.here.ip(*SPLIT)
    own.here.sysctl({"ipv4.ip_forward": 1})
    own.outside.run("ethtool", "-K", "eth0", "gro", "on")  # or it drops what XDP sends
    own.write("far", {"name": "far", "vip": EMPTY, "ports": ["54/udp"], "backends": ["10.30.0.5"]})
    own.start()
    own.until(lambda: own.backend("web", "10.9.0.2")["state"] == "up", "finds its backends up")

    def counted() -> float:
        *_, line = own.shunt("metrics").lines("shunt_fib_fallback_packets_total")
        return float(line.split()[-1])

    assert counted() == 0
    with own.outside.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.bind((CLIENT, 0))
        for _ in range(5):
            client.sendto(b"question", (EMPTY, 54))
    own.until(lambda: counted() == 5, "five packets asked the kernel")
    options = ("--config", str(own.config), "--services", str(own.services), "-o", "json")
    findings = {f["check"]: f for f in own.shunt("doctor", *options).json}
    found = findings["resolved 10.30.0.5"]
    assert found["level"] == "warn"
    assert "gateway 10.9.0.77" in found["what"]
    assert "5 packets have asked the kernel's routes" in found["why"]
    assert "ip neigh show 10.9.0.77" in found["fix"]
    # And once it answers, nothing more goes that way.
    own.outside.ip("addr add 10.9.0.77/24 dev eth0")
    own.until(
        lambda: "10.30.0.5" not in str(own.json("status")["nexthop_problems"]), "resolves", 60
    )
    with own.outside.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.bind((CLIENT, 0))
        client.sendto(b"question", (EMPTY, 54))
    own.until(lambda: own.backend("far", "10.30.0.5")["packets"] == 6, "the sixth packet")
    assert counted() == 5
