# SPDX-License-Identifier: Apache-2.0
"""Health checks by way of the VIP, through a real shuntd to real backends (lab/topology.py).

Each service of a dsr mode stands here twice: checked by way of its VIP, and (as NAME-own, with a
VIP of its own) at the backends' addresses. What clients could not reach fails the first alone.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from shunt.lab.netns import Namespace
from shunt.lab.scenario import SERVICES, LabService, dsr_vips
from shunt.lab.servers import ECHO_PORT, Servers, running
from shunt.lab.shuntd import Shuntd, attach_decap, daemons
from shunt.lab.topology import BPFFS, Host, Lab
from shunt.lb.model import Mode
from shunt.xdp import decap
from tests.netns.test_probe_types import GRPC, make_certificate

VIA = [s for s in SERVICES if s.mode is not Mode.NAT]
OWN = [replace(s, name=f"{s.name}-own", vip=s.vip + 100) for s in VIA]
IPIP = {s.name for s in VIA if s.mode is Mode.DSR_IPIP}
FAST = {"interval": "400ms", "timeout": "350ms", "rise": 1, "fall": 3, "panic_threshold": "0%"}
RULES = "all fwmark 0x53000000/0xff000000 lookup 5348"


@dataclass
class Scene:
    lab: Lab
    servers: dict[str, Servers]
    shuntd: Shuntd

    @property
    def node(self) -> Namespace:
        return self.lab.balancers[0].namespace

    def failing(self, host: Host) -> set[str]:
        """The services in which a backend is failing."""
        own = {str(address) for address in host.addresses}
        rows = [row for row in self.shuntd.backends() if row["address"] in own]
        return {row["service"] for row in rows if row["state"] == "failing"}

    def wait(self, host: Host, failing: set[str]) -> None:
        self.shuntd.wait_until(lambda: self.failing(host) == failing, f"{failing}", 30)

    def reasons(self, host: Host, service: str) -> str:
        own = {str(address) for address in host.addresses}
        rows = [r for r in self.shuntd.backends() if r["service"] == service]
        return str(next(row["reason"] for row in rows if row["address"] in own))

    def status(self) -> Any:
        return self.shuntd.client.get("status")


def document(service: LabService, lab: Lab, **check: Any) -> dict[str, Any]:
    return {**service.document(lab.backends), "health": {**FAST, **check}}


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab(balancer_count=1, backend_count=2))
        lab.add_vips(dsr_vips([*VIA, *OWN]))
        servers = stack.enter_context(running(lab.backends, lab.directory))
        for host in lab.backends:
            attach_decap(lab, host)
        documents = [document(service, lab, via="vip") for service in VIA]
        documents += [document(service, lab) for service in OWN]
        shuntd = stack.enter_context(daemons(lab, documents))["lb1"]
        shuntd.wait_up(60)
        yield Scene(lab, servers, shuntd)


@contextlib.contextmanager
def without_decap(scene: Scene, host: Host) -> Iterator[None]:
    with host.namespace.inside():
        decap.detach("eth0", BPFFS / f"{scene.lab.name}-{host.role}")
    try:
        yield
    finally:
        attach_decap(scene.lab, host)


def test_all_is_well(scene: Scene) -> None:
    assert scene.status()["checks"]["troubles"] == {}
    assert scene.failing(scene.lab.backends[0]) == scene.failing(scene.lab.backends[1]) == set()
    # The answers came through the program, as what is nobody's service's.
    assert scene.status()["reasons"]["PASS_NOT_OURS"]["packets"] > 0


def test_without_decapsulation_it_fails_by_way_of_the_vip_alone(scene: Scene) -> None:
    good, bad = scene.lab.backends
    with without_decap(scene, bad):
        scene.wait(bad, IPIP)
        assert scene.failing(good) == set()
        assert scene.reasons(bad, "ipip-6in4") == (
            "2001:db8:a::11 port 80: no answer within 0.35 s"
        )
    scene.wait(bad, set())


@pytest.mark.parametrize("service", VIA, ids=lambda s: s.name)
def test_without_its_vip_it_fails_by_way_of_the_vip_alone(
    scene: Scene, service: LabService
) -> None:
    good, bad = scene.lab.backends
    prefix = f"{service.vip}/{service.vip.max_prefixlen}"
    bad.namespace.ip(f"addr del {prefix} dev lo")
    try:
        scene.wait(bad, {service.name})
        assert scene.failing(good) == set()
    finally:
        bad.namespace.own(service.vip)
    scene.wait(bad, set())


def test_every_vip_of_a_service_must_answer(scene: Scene) -> None:
    good, bad = scene.lab.backends
    one, other = VIA[0], VIA[3]
    both = {**document(one, scene.lab, via="vip"), "vip": [str(one.vip), str(other.vip + 50)]}
    scene.lab.add_vips([other.vip + 50])
    before = scene.status()["generation"]
    scene.shuntd.write_services([both])
    scene.shuntd.wait_until(lambda: scene.status()["generation"] > before, "has both")
    scene.wait(bad, set())
    bad.namespace.ip(f"addr del {other.vip + 50}/128 dev lo")
    scene.wait(bad, {one.name})
    assert scene.reasons(bad, one.name) == f"{other.vip + 50} port 80: no answer within 0.35 s"
    assert scene.failing(good) == set()
    scene.shuntd.write_services([document(one, scene.lab, via="vip")])
    scene.wait(bad, set())


def test_a_vip_that_is_this_hosts_is_not_checked_and_status_says_so(scene: Scene) -> None:
    vip = VIA[0].vip
    scene.node.ip(f"addr add {vip}/32 dev lo")
    try:
        scene.shuntd.wait_until(
            lambda: scene.status()["checks"]["troubles"].get("local-vip", 0) > 3, "sees it"
        )
        assert scene.failing(scene.lab.backends[0]) == set()
        said = " ".join(scene.status()["problems"])
        assert f"service {VIA[0].name} is not checked: its VIP {vip} is an address of this" in said
    finally:
        scene.node.ip(f"addr del {vip}/32 dev lo")
    scene.shuntd.wait_until(lambda: scene.status()["problems"] == [], "is well again")


HTTPS = """
daemon off; pid {place}/tls.pid; error_log stderr;
events {{ }}
http {{
  access_log off;
  server {{
    listen 443 ssl; listen [::]:443 ssl;
    ssl_certificate {place}/cert.pem; ssl_certificate_key {place}/key.pem;
    location / {{ return 200 "fine"; }}
  }}
}}
"""
TYPES: dict[str, dict[str, Any]] = {
    "http": {"type": "http", "port": 80, "body": "be1"},
    "https": {"type": "https", "port": 443, "verify": "off", "body": "fine"},
    "grpc": {"type": "grpc", "port": 50051, "service": "shop.Cart"},
    "dns": {"type": "dns", "port": 5353, "query": "a.example", "answer": "192.0.2.1"},
    "udp": {"type": "udp", "port": ECHO_PORT, "send": "well?"},
}


@pytest.fixture
def all_types(scene: Scene) -> Iterator[None]:
    """Servers of every type on be1, and a service for each, of two VIPs."""
    host, place = scene.lab.backends[0], scene.lab.directory
    vips = {name: [VIA[0].vip + 30 + n, VIA[1].vip + 30 + n] for n, name in enumerate(TYPES)}
    scene.lab.add_vips([vip for pair in vips.values() for vip in pair])
    make_certificate(place)
    (place / "tls.conf").write_text(HTTPS.format(place=place))
    commands = [
        ["nginx", "-p", str(place), "-c", str(place / "tls.conf"), "-e", "stderr"],
        [sys.executable, "-c", GRPC.replace("127.0.0.1", "[::]"), str(place)],
        [
            *("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--pid-file="),
            *("--no-resolv", "--no-hosts", "--user=root", "--port=5353", "--bind-interfaces"),
            *(f"--listen-address={vip}" for vip in vips["dns"]),
            "--host-record=a.example,192.0.2.1",
        ],
    ]
    started = [host.namespace.start(argv, place / f"{argv[0][-5:]}.log") for argv in commands]
    services: list[dict[str, Any]] = [
        {
            "name": f"type-{name}",
            "vip": list(map(str, vips[name])),
            "ports": [80],
            "backends": [str(host.address4)],
            "health": {**FAST, **check, "via": "vip"},
        }
        for name, check in TYPES.items()
    ]
    try:
        scene.shuntd.write_services(services)
        yield
    finally:
        for service in services:
            (scene.shuntd.services / f"{service['name']}.yaml").unlink()
        for process in started:
            process.stop()


@pytest.mark.usefixtures("all_types")
def test_every_type_that_has_a_socket(scene: Scene) -> None:
    host = scene.lab.backends[0]
    names = {f"type-{name}" for name in TYPES}

    def well() -> bool:
        rows = scene.shuntd.client.get("health")["health"]
        return {r["service"] for r in rows if r["last_ok"]} >= names

    scene.shuntd.wait_until(well, "finds all well", 60)
    with without_decap(scene, host):
        scene.wait(host, IPIP | names)
    scene.shuntd.wait_until(well, "finds all well again", 30)


def test_nothing_stays_on_the_host(scene: Scene) -> None:
    node = scene.node

    def left() -> str:
        rules = node.run("ip", "rule").stdout + node.run("ip", "-6", "rule").stdout
        return (rules[rules.index("lookup 5348") :] if "lookup 5348" in rules else "") + node.run(
            "tc", "qdisc", "show", "dev", "lo"
        ).stdout.replace("qdisc noqueue 0: root refcnt 2 \n", "")

    assert RULES in node.run("ip", "rule").stdout
    # Killed: the next one finds what is there, and does not make it twice.
    scene.shuntd.kill()
    assert left()
    scene.shuntd.start()
    scene.shuntd.wait_up(60)
    assert node.run("ip", "-6", "rule").stdout.count(RULES) == 1
    scene.wait(scene.lab.backends[1], set())
    scene.shuntd.write_services([document(service, scene.lab) for service in VIA])
    scene.shuntd.wait_until(lambda: not left(), "takes away what no service wants")
    scene.shuntd.write_services([document(VIA[0], scene.lab, via="vip")])
    scene.shuntd.wait_until(lambda: bool(left()), "has it again")
    scene.shuntd.stop()
    assert left() == ""
    scene.shuntd.start()
    scene.shuntd.wait_up(60)
    scene.shuntd.kill()
    removed = scene.shuntd.cli("cleanup", "--bpffs", str(scene.shuntd.bpffs), "--yes").stdout
    assert "removed 2 rules that lead checks to the loopback device" in removed
    assert "removed the program shunt_check at the loopback device" in removed
    assert left() == ""
    scene.shuntd.start()
    scene.shuntd.wait_up(60)
