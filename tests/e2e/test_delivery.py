# SPDX-License-Identifier: Apache-2.0
"""How traffic gets to a VIP: the ways that docs/operations.md describes, each with real programs.

```
    client ---- router ---- switch ---- lb1, lb2    shuntd, equal configuration; keepalived
                                 '----- be1, be2    HTTP and echo servers, every VIP on lo
```

lab/topology.py draws it in full. A route, or two of equal cost, lead to VIPs of a prefix of their
own. VIPs that keepalived moves are addresses of the segment itself: whoever has them on `eth0`
answers ARP and neighbour solicitations for them, and its XDP program takes the packets.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address

import pytest

from shunt.lab.netns import Process
from shunt.lab.reports import Plan, Target
from shunt.lab.scenario import LabService
from shunt.lab.shuntd import Shuntd
from shunt.lab.topology import Host, Lab
from shunt.lab.traffic import Traffic
from shunt.lb.model import Mode
from tests.scenes import balanced_lab, nothing_lost

ROUTED = (
    LabService("routed-v4", Mode.DSR_IPIP, ip_address("203.0.113.10"), 4),
    LabService("routed-v6", Mode.DSR_L2, ip_address("2001:db8:a::20"), 6),
)
MOVED = (
    LabService("moved-v4", Mode.DSR_L2, ip_address("10.0.0.50"), 4),
    LabService("moved-v6", Mode.DSR_IPIP, ip_address("2001:db8:2::50"), 6),
)
# As docs/operations.md shows it, but for the times: a second is long in a test.
KEEPALIVED = """\
global_defs {{
    vrrp_version 3
    script_user root
    enable_script_security
}}
vrrp_script forwards {{
    script "/usr/bin/test -e {bpffs}/links/eth0"
    interval 1
    fall 1
    rise 1
}}
vrrp_sync_group vips {{ group {{ v4 v6 }} }}
vrrp_instance v4 {{
    interface eth0
    state BACKUP
    nopreempt
    virtual_router_id 50
    priority {priority}
    advert_int 0.2
    garp_master_delay 1
    virtual_ipaddress {{ 10.0.0.50/32 }}
    track_script {{ forwards }}
}}
vrrp_instance v6 {{
    interface eth0
    state BACKUP
    nopreempt
    virtual_router_id 50
    priority {priority}
    advert_int 0.2
    garp_master_delay 1
    virtual_ipaddress {{ 2001:db8:2::50/128 }}
    track_script {{ forwards }}
}}
"""


class Keepalived:
    """Real keepalived on one load balancer."""

    def __init__(self, lab: Lab, daemon: Shuntd, priority: int) -> None:
        self.daemon, self.host = daemon, daemon.host
        self.directory = lab.directory / self.host.role
        self.config = self.directory / "keepalived.conf"
        self.config.write_text(KEEPALIVED.format(bpffs=daemon.bpffs, priority=priority))
        self.config.chmod(0o644)
        self.process: Process | None = None

    def start(self) -> None:
        files = [f"--{n}={self.directory}/{n}" for n in ("pid", "vrrp_pid")]
        argv = ["keepalived", "--dont-fork", "--log-console", "--vrrp", f"--use-file={self.config}"]
        self.process = self.host.namespace.start([*argv, *files], self.directory / "vrrp.log")

    def stop(self) -> None:
        """In peace: the other one is told."""
        if self.process:
            self.process.stop()

    def holds(self) -> bool:
        """Both VIPs are addresses of eth0."""
        shown = self.host.namespace.run("ip", "-j", "addr", "show", "dev", "eth0").stdout
        have = {address["local"] for address in json.loads(shown)[0]["addr_info"]}
        return have.issuperset(str(s.vip) for s in MOVED)


@dataclass
class Scene:
    lab: Lab
    daemons: dict[str, Shuntd]

    @contextlib.contextmanager
    def traffic(self, services: tuple[LabService, ...]) -> Iterator[Traffic]:
        targets = tuple(
            Target(
                name=s.name,
                address=str(s.vip),
                http_rate=10,
                udp_rate=0,
                tcp_flows=40,
                udp_flows=0,
                message_interval_s=0.3,
            )
            for s in services
        )
        plan = Plan(targets=targets, request_timeout_s=15.0, stall_timeout_s=15.0)
        with Traffic(self.lab.client, plan, self.lab.directory) as traffic:
            traffic.wait_established(30)
            yield traffic

    def carried(self) -> dict[str, int]:
        """Packets that each node took for the services, ever."""
        return {role: self.carried_by(role) for role in self.daemons}

    def carried_by(self, role: str) -> int:
        shown = self.daemons[role].client.get("services")["services"]
        return sum(service["packets"] for service in shown)

    def carries(self, traffic: Traffic) -> set[str]:
        """Who takes packets now, after the flows were answered anew."""
        traffic.wait_answered(30)
        before = self.carried()
        traffic.wait_answered(30)
        return {role for role, packets in self.carried().items() if packets > before[role]}


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with balanced_lab(ROUTED + MOVED, backend_count=2) as (lab, started):
        yield Scene(lab, started)


@pytest.fixture
def pair(scene: Scene) -> Iterator[list[Keepalived]]:
    """On both nodes; the VIPs are with the first."""
    both = [
        Keepalived(scene.lab, daemon, priority)
        for daemon, priority in zip(scene.daemons.values(), (150, 100), strict=True)
    ]
    try:
        both[0].start()
        wait_for_holder(both, both[0])
        both[1].start()
        yield both
    finally:
        for one in both:
            if one.process:
                one.process.popen.terminate()  # both at once
        for one in both:
            one.stop()


def wait_for_holder(pair: list[Keepalived], holder: Keepalived) -> None:
    """Until the VIPs are there, and nowhere else."""
    holder.daemon.wait_until(
        lambda: [one for one in pair if one.holds()] == [holder],
        f"and keepalived gives {holder.host.role} the VIPs",
        30,
    )


def neighbour(lab: Lab, address: str) -> str:
    """The MAC address that the router has for an address of the segment."""
    shown = lab.router.run("ip", "-j", "neigh", "show", address, "dev", "lan").stdout
    return str(next((n.get("lladdr", "") for n in json.loads(shown)), ""))


def mac(host: Host) -> str:
    return host.namespace.mac("eth0")


def test_by_a_static_route(scene: Scene) -> None:
    first, second = scene.lab.balancers
    for service in ROUTED:
        scene.lab.route(service.vip, first)
    with scene.traffic(ROUTED) as traffic:
        assert scene.carries(traffic) == {"lb1"}
        with nothing_lost(traffic, timeout_s=30):
            for service in ROUTED:
                scene.lab.route(service.vip, second)
            assert scene.carries(traffic) == {"lb2"}
    for service in ROUTED:
        scene.lab.router.ip(f"route del {service.vip}")


def test_by_routes_of_equal_cost(scene: Scene) -> None:
    with scene.traffic(ROUTED) as traffic:
        assert scene.carries(traffic) == {"lb1", "lb2"}
        with nothing_lost(traffic, timeout_s=30):
            scene.lab.announce(scene.lab.balancers[1:])
            assert scene.carries(traffic) == {"lb2"}
            scene.lab.announce(scene.lab.balancers)
            assert scene.carries(traffic) == {"lb1", "lb2"}


def move(pair: list[Keepalived], there: Keepalived) -> None:
    """By hand, as an operator does: the holder's keepalived ends, and starts again."""
    (other,) = (one for one in pair if one is not there)
    other.stop()
    wait_for_holder(pair, there)
    other.start()


def test_who_holds_a_vip_answers_for_it_and_xdp_takes_its_packets(
    scene: Scene, pair: list[Keepalived]
) -> None:
    """Before it moves, after it moved in peace, and when it is back."""
    with scene.traffic(MOVED) as traffic, nothing_lost(traffic, timeout_s=30):
        for there in (pair[0], pair[1], pair[0]):
            if not there.holds():
                move(pair, there)
            assert scene.carries(traffic) == {there.host.role}
            for service in MOVED:
                assert neighbour(scene.lab, str(service.vip)) == mac(there.host)
            # Nobody listens on the node: its own stack would have reset every connection.
            assert there.host.namespace.run("ss", "-Hltn").stdout == ""


def test_a_vip_whose_node_is_lost(scene: Scene, pair: list[Keepalived]) -> None:
    lost, other = pair
    with scene.traffic(MOVED) as traffic, nothing_lost(traffic, timeout_s=30):
        scene.lab.unplug(lost.host)
        wait_for_holder(pair, other)
        assert scene.carries(traffic) == {other.host.role}
        # It has seen its backends fail, and is given nothing before it has seen them well.
        scene.lab.plug_in(lost.host)
        for host in scene.lab.backends:
            lost.daemon.wait_backend(host, up=True, timeout_s=30)
        assert scene.carries(traffic) == {other.host.role}
        move(pair, lost)
        assert scene.carries(traffic) == {lost.host.role}


def test_a_vip_stays_while_shuntd_is_away(scene: Scene, pair: list[Keepalived]) -> None:
    daemon = pair[0].daemon
    with scene.traffic(MOVED) as traffic, nothing_lost(traffic, timeout_s=30):
        daemon.kill()
        for _ in range(3):
            traffic.wait_answered(30)
        assert [one.holds() for one in pair] == [True, False]
        daemon.start()
        daemon.wait_up(30)


def test_a_vip_leaves_a_node_without_the_program(scene: Scene, pair: list[Keepalived]) -> None:
    """Until keepalived notices, the node's own stack resets what it gets: move the VIP first."""
    daemon = pair[0].daemon
    with scene.traffic(MOVED) as traffic:
        daemon.power_off()  # what `shunt cleanup` removes
        wait_for_holder(pair, pair[1])
        traffic.wait_established(30)
        before = scene.carried_by("lb2")
        traffic.wait_answered(30)
        assert scene.carried_by("lb2") > before
    daemon.start()
    daemon.wait_up(30)
