# SPDX-License-Identifier: Apache-2.0
"""The lab itself, without Shunt: what the other tests and the demo take for granted.

The topology is drawn in lab/topology.py. The load balancers' part is played by their kernels:
a plain route to a backend rewrites the MAC addresses and nothing else, as dsr-l2 does.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from shunt.lab.netns import NETNS_DIR, Namespace
from shunt.lab.reports import Kind, Plan, Reason, Target
from shunt.lab.servers import BIG_BYTES, ECHO_PORT, Servers, running
from shunt.lab.topology import (
    CLIENT4,
    CLIENT6,
    Host,
    Lab,
    remove_leftovers,
)
from shunt.lab.traffic import Traffic, requests_of
from shunt.lb.model import IPAddress

DSR = (ip_address("203.0.113.20"), ip_address("2001:db8:a::20"))
NAT = (ip_address("198.51.100.30"), ip_address("2001:db8:b::30"))


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        lab.add_vips(DSR + NAT)
        yield lab


@pytest.fixture(scope="module")
def servers(lab: Lab) -> Iterator[dict[str, Servers]]:
    with running(lab.backends, lab.directory) as servers:
        yield servers


@pytest.fixture
def by_hand(lab: Lab) -> Iterator[Callable[[Host, Host], None]]:
    """by_hand(balancer, backend): this load balancer forwards every VIP to this backend."""
    changed: list[Host] = []

    def forward(balancer: Host, backend: Host) -> None:
        changed.append(balancer)
        balancer.namespace.ip(
            *(f"route replace {v} via {backend.addresses[v.version == 6]}" for v in DSR + NAT)
        )

    yield forward
    for balancer in changed:
        balancer.namespace.ip(*(f"route flush {vip}" for vip in DSR + NAT))
    lab.announce(lab.balancers)


def udp_socket(namespace: Namespace, vip: IPAddress, port: int = 0) -> socket.socket:
    with namespace.inside():
        sock = socket.socket(
            socket.AF_INET if vip.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM
        )
    sock.settimeout(2)
    sock.bind(("" if vip.version == 4 else "::", port))
    sock.connect((str(vip), ECHO_PORT))
    return sock


def ask(sock: socket.socket) -> str:
    """Who answers on this socket."""
    sock.send(b"who")
    return sock.recv(100).decode().split()[0]


def http(namespace: Namespace, *addresses: object) -> str:
    urls = [f"http://[{a}]/" if ":" in str(a) else f"http://{a}/" for a in addresses]
    return namespace.run("curl", "-sS", "-m3", *urls).stdout


@pytest.mark.usefixtures("servers")
def test_every_backend_answers_http_with_its_own_name(lab: Lab) -> None:
    for host in lab.backends:
        answers = http(lab.client, *host.addresses)
        assert answers == f"{host.role} {CLIENT4}\n{host.role} {CLIENT6}\n"
    url = f"http://{lab.backends[0].address4}/big"
    assert len(lab.client.run("curl", "-sS", "-m3", url).stdout) >= BIG_BYTES


@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize("vip", DSR)
def test_a_backend_answers_the_client_directly_from_the_vip(
    lab: Lab, by_hand: Callable[[Host, Host], None], vip: IPAddress
) -> None:
    for balancer in lab.balancers:
        by_hand(balancer, lab.backends[2])
    assert http(lab.client, vip).split()[0] == "be3"
    with udp_socket(lab.client, vip) as sock:
        assert ask(sock) == "be3"  # a connected socket takes answers from the VIP alone


@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize("vip", DSR + NAT)
def test_ecmp_uses_both_nodes_and_keeps_a_five_tuple_on_its_own(
    lab: Lab, by_hand: Callable[[Host, Host], None], vip: IPAddress
) -> None:
    for balancer, backend in zip(lab.balancers, lab.backends, strict=False):
        by_hand(balancer, backend)
    sockets = [udp_socket(lab.client, vip) for _ in range(40)]
    try:
        first = [ask(sock) for sock in sockets]
        # The router must look at the packet, and not at the hash its socket left on it: a new
        # socket with the old one's five-tuple has another such hash.
        ports = [sock.getsockname()[1] for sock in sockets]
        for sock in sockets:
            sock.close()
        sockets = [udp_socket(lab.client, vip, port) for port in ports]
        assert [ask(sock) for sock in sockets] == first
    finally:
        for sock in sockets:
            sock.close()
    assert min(Counter(first)["be1"], Counter(first)["be2"]) >= 5, first


@pytest.mark.usefixtures("servers")
@pytest.mark.parametrize(("vip", "stays"), [(DSR[0], False), (NAT[0], True), (NAT[1], True)])
def test_a_returning_node_takes_live_flows_from_the_plain_group_only(
    lab: Lab, by_hand: Callable[[Host, Host], None], vip: IPAddress, stays: bool
) -> None:
    for balancer, backend in zip(lab.balancers, lab.backends, strict=False):
        by_hand(balancer, backend)
    sockets = [udp_socket(lab.client, vip) for _ in range(30)]
    try:
        lab.announce(lab.balancers[1:])
        started = time.monotonic()
        # A bucket counts as unused if it was last used within the clock tick it moved in.
        while time.monotonic() < started + 0.1:
            assert {ask(sock) for sock in sockets} == {"be2"}
        lab.announce(lab.balancers)
        after = Counter(ask(sock) for sock in sockets)
    finally:
        for sock in sockets:
            sock.close()
    assert (after["be1"] == 0) is stays
    assert after.total() == 30


@pytest.mark.usefixtures("servers")
def test_an_unplugged_node_is_cut_off_and_comes_back(lab: Lab) -> None:
    host = lab.balancers[0]
    ping = ("ping", "-c1", "-W1", str(host.address4))
    assert lab.client.run(*ping, check=False).returncode == 0
    lab.unplug(host)
    assert lab.client.run(*ping, check=False).returncode != 0
    lab.plug_in(host)
    assert lab.client.run(*ping, check=False).returncode == 0


def test_nobody_else_gets_the_frames_of_an_unplugged_node(lab: Lab) -> None:
    gone, other = lab.balancers
    ping = ("ping", "-c1", "-W1")
    lab.client.run(*ping, str(gone.address4))  # the router knows its MAC
    with other.namespace.inside():
        seen = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
    with seen:
        lab.unplug(gone)
        try:
            assert lab.client.run(*ping, str(gone.address4), check=False).returncode != 0
        finally:
            lab.plug_in(gone)
        lab.client.run(*ping, str(other.address4))
        receivers = []
        while other.address4 not in receivers:
            receivers.append(ip_address(seen.recv(2048)[16:20]))
    assert gone.address4 not in receivers


def test_an_outer_header_fits_between_load_balancer_and_backend(lab: Lab) -> None:
    backend = lab.backends[0].address6
    inner, outer, icmp = 1500, 40, 8
    size = inner + outer - 40 - icmp
    # Several: the first may come before the neighbour is known.
    done = lab.balancers[0].namespace.run(
        "ping", "-c5", "-i0.2", "-W1", "-Mdo", f"-s{size}", str(backend), check=False
    )
    assert done.returncode == 0, done.stdout
    done = lab.client.run("ping", "-c1", "-W1", "-Mdo", f"-s{size}", str(backend), check=False)
    assert done.returncode != 0, "the client's link takes more than 1500 bytes"


def plan(*vips: IPAddress) -> Plan:
    return Plan(
        targets=tuple(
            Target(name=f"v{vip.version}", address=str(vip), tcp_flows=10, udp_flows=3)
            for vip in vips
        ),
        request_timeout_s=1.0,
        stall_timeout_s=1.0,
        udp_retry_s=0.2,
    )


@pytest.mark.usefixtures("servers")
def test_quiet_traffic_loses_nothing(lab: Lab, by_hand: Callable[[Host, Host], None]) -> None:
    for balancer in lab.balancers:
        by_hand(balancer, lab.backends[0])
    with Traffic(lab.client, plan(*DSR), lab.directory) as traffic:
        traffic.wait_established()
        traffic.wait_until(lambda t: requests_of(t.answers()) > 50, "50 requests answered")
        flows = traffic.live()
        traffic.stop()
    assert traffic.failures() == []
    assert {(f.backend, f.peer) for f in flows} == {("be1", str(CLIENT4)), ("be1", str(CLIENT6))}
    kinds = Counter((target, kind) for target, kind, _ in traffic.answers())
    assert kinds == {(target, kind): 1 for target in ("v4", "v6") for kind in Kind}


@pytest.mark.usefixtures("servers")
def test_traffic_sees_a_udp_flow_move(lab: Lab, by_hand: Callable[[Host, Host], None]) -> None:
    for balancer in lab.balancers:
        by_hand(balancer, lab.backends[0])
    with Traffic(lab.client, plan(DSR[1]), lab.directory) as traffic:
        traffic.wait_established()
        for balancer in lab.balancers:
            by_hand(balancer, lab.backends[1])
        traffic.wait_until(lambda t: len(t.failures()) >= 13, "every flow is lost")
    lost = Counter((f.kind, f.reason) for f in traffic.failures() if f.flow)
    assert lost == {(Kind.UDP_FLOW, Reason.MOVED): 3, (Kind.TCP_FLOW, Reason.RESET): 10}


def test_traffic_sees_a_backend_hang_and_die(
    lab: Lab, servers: dict[str, Servers], by_hand: Callable[[Host, Host], None]
) -> None:
    for balancer in lab.balancers:
        by_hand(balancer, lab.backends[3])
    victim = servers["be4"]
    with Traffic(lab.client, plan(DSR[0]), lab.directory) as traffic:
        traffic.wait_established()
        for process in victim.processes:
            os.kill(process.pid, signal.SIGSTOP)
        traffic.wait_until(lambda t: not t.live(), "every flow is lost")
        assert {f.reason for f in traffic.failures()} == {Reason.STALLED}
        for process in victim.processes:
            os.kill(process.pid, signal.SIGCONT)
        traffic.wait_established()
        lost = len(traffic.failures())
        victim.kill()
        traffic.wait_until(lambda t: not t.live(), "every flow is lost")
        later = {(f.kind, f.reason) for f in traffic.failures()[lost:]}
        assert later & {(Kind.TCP_FLOW, Reason.CLOSED), (Kind.TCP_FLOW, Reason.RESET)}
        traffic.wait_until(
            lambda t: any(f.reason is Reason.REFUSED for f in t.failures()[lost:]), "refusals"
        )
    victim.start()
    victim.wait_ready()


def test_two_labs_stand_side_by_side_and_leave_nothing() -> None:
    with Lab(balancer_count=1, backend_count=1) as one, Lab(backend_count=1) as two:
        names = [path.name for path in NETNS_DIR.iterdir()]
        assert f"{one.name}-lb1" in names
        assert f"{two.name}-lb2" in names
        late = two.add_backend()
        assert late.role == "be2"
        ping = ("ping", "-c3", "-i0.2", "-W1", str(late.address6))
        assert two.client.run(*ping, check=False).returncode == 0
        with running(two.backends, two.directory) as servers:
            pids = [p.pid for s in servers.values() for p in s.processes]
    assert not [pid for pid in pids if Path("/proc", str(pid)).exists()]
    for lab in (one, two):
        assert not [path for path in NETNS_DIR.iterdir() if path.name.startswith(lab.name + "-")]
        assert not lab.directory.exists()


def test_what_a_killed_lab_leaves_is_removed_by_the_next() -> None:
    script = """
import time
from shunt.lab.servers import running
from shunt.lab.topology import Lab
with Lab(balancer_count=1, backend_count=1) as lab, running(lab.backends, lab.directory) as s:
    print(lab.name, *(p.pid for p in s["be1"].processes), flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout
        name, *pids = process.stdout.readline().decode().split()
        assert len(pids) == 2
        assert not _of(name, remove_leftovers()), "a lab in use was removed"
        process.kill()
    deadline = time.monotonic() + 5
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not [pid for pid in pids if runs(pid)], "its servers live on"
    assert len(_of(name, remove_leftovers())) == 6
    assert not _of(name, NETNS_DIR.iterdir())
    assert not Path("/run", name).exists()


def runs(pid: str) -> bool:
    """Not gone, and not merely waiting for init to take note of it."""
    try:
        return Path("/proc", pid, "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _of(name: str, paths: Iterable[str | Path]) -> list[str]:
    """Those of one lab: `name` may be the beginning of another's."""
    names = [Path(path).name for path in paths]
    return [n for n in names if n == name or n.startswith(name + "-")]
