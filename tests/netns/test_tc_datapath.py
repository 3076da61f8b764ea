# SPDX-License-Identifier: Apache-2.0
"""Mode local with real sockets: a server on the node, and one in a namespace behind it.

```
    client: eth0 192.0.2.2 ------ eth0 192.0.2.1 :node: pod0 10.8.0.1 ------ eth0 10.8.0.2 :pod
            2001:db8:c::2         2001:db8:c::1         fd08::1              fd08::2
                                  shuntd; TCP 8080, UDP 5300                 the same
            VIPs 203.0.113.x, 2001:db8:a::x via the node
```
Checksums are left to the devices wherever they do that, so that half-made ones are seen.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from shunt.kern import tc
from shunt.lab.netns import Namespace, cable
from tests.netns.shunt_host import Host

HERE = {4: "203.0.113.1", 6: "2001:db8:a::1"}  # its backend is a process of the node's own
POD = {4: "203.0.113.2", 6: "2001:db8:a::2"}
NODE_ADDR = {4: "192.0.2.1", 6: "2001:db8:c::1"}
POD_ADDR = {4: "10.8.0.2", 6: "fd08::2"}
CLIENT_ADDR = {4: "192.0.2.2", 6: "2001:db8:c::2"}
FAMILIES = pytest.mark.parametrize("ip", [4, 6])
PLACES = pytest.mark.parametrize("vips", [HERE, POD], ids=["node", "pod"])

# Answers with who asked, and whom: "ADDRESS PORT"; TCP also echoes what comes.
SERVER = """
import socket, sys, threading
family = socket.AF_INET6
def tcp():
    listener = socket.create_server(("::", 8080), family=family, dualstack_ipv6=True, backlog=512)
    while True:
        threading.Thread(target=serve, args=listener.accept(), daemon=True).start()
def serve(sock, peer):
    sock.sendall(f"{peer[0].removeprefix('::ffff:')} {peer[1]}\\n".encode())
    while data := sock.recv(65536):
        sock.sendall(data)
    sock.close()
def udp(host):
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((host, 5300))
    while True:
        data, peer = sock.recvfrom(65536)
        sock.sendto(f"{peer[0]} {peer[1]}\\n".encode() + data, peer)
for host in sys.argv[1:]:
    threading.Thread(target=udp, args=(host,), daemon=True).start()
print("ready", flush=True)
tcp()
"""


@contextlib.contextmanager
def a_node(name: str, **settings: object) -> Iterator[tuple[Host, Namespace]]:
    made: list[Namespace] = []
    directory = Path(tempfile.mkdtemp(prefix="shunt-tc-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        for end in ("node", "client", "pod"):
            made.append(Namespace.create(f"shunt-{name}-{os.getpid()}-{end}"))
            stack.callback(made[-1].delete)
        node, client, pod = made
        cable(node, "eth0", client, "eth0")
        cable(node, "pod0", pod, "eth0")
        node.ip(
            "addr add 192.0.2.1/24 dev eth0", "addr add 2001:db8:c::1/64 dev eth0 nodad",
            "addr add 10.8.0.1/24 dev pod0", "addr add fd08::1/64 dev pod0 nodad",
        )  # fmt: skip
        client.ip(
            "addr add 192.0.2.2/24 dev eth0", "addr add 2001:db8:c::2/64 dev eth0 nodad",
            "route add 203.0.113.0/24 via 192.0.2.1", "route add 2001:db8:a::/64 via 2001:db8:c::1",
        )  # fmt: skip
        pod.ip(
            "addr add 10.8.0.2/24 dev eth0", "addr add fd08::2/64 dev eth0 nodad",
            "route add default via 10.8.0.1", "route add default via fd08::1",
        )  # fmt: skip
        node.sysctl({"ipv4.ip_forward": 1, "ipv6.conf.all.forwarding": 1})
        for namespace, addresses in ((node, NODE_ADDR), (pod, POD_ADDR)):
            server = subprocess.Popen(
                [*namespace.enter, sys.executable, "-c", SERVER, *addresses.values()],
                stdout=subprocess.PIPE,
            )
            stack.callback(server.wait)
            stack.callback(server.kill)
            assert server.stdout is not None
            stack.callback(server.stdout.close)
            assert server.stdout.readline() == b"ready\n"
        host = Host(node, client, directory)
        host.bpffs = host.bpffs.with_name(f"shunt-{name}-{os.getpid()}")
        stack.callback(host.close)
        host.services.mkdir()
        host.config.write_text(
            yaml.safe_dump(
                {
                    "interfaces": ["eth0"],
                    "limits": {"slots": 65536, "nat": 16384},
                    **settings,
                }
            )
        )
        yield host, pod


def describe(host: Host, mode: str = "local", only: str = "") -> None:
    """The services, by the ports that the servers really have."""
    for name, vips, backends in (("here", HERE, NODE_ADDR), ("pod", POD, POD_ADDR)):
        for ip in (4, 6) if only in ("", name) else ():
            for kind, port, own in (("tcp", 80, 8080), ("udp", "53/udp", 5300)):
                address = backends[ip] if ip == 4 else f"[{backends[ip]}]"
                host.write(
                    f"{name}-{ip}-{kind}",
                    {
                        "name": f"{name}-{ip}-{kind}",
                        "vip": vips[ip],
                        "ports": [port],
                        "mode": mode,
                        "backends": [f"{address}:{own}"],
                    },
                )


@pytest.fixture(scope="module")
def node() -> Iterator[Host]:
    with a_node("tcl") as (host, _):
        describe(host)
        host.start()
        yield host


@pytest.fixture(scope="module")
def remote() -> Iterator[Host]:
    """No XDP, and the pod is another host: mode nat. Nothing is routed."""
    with a_node("tcr", xdp="off", interfaces=["eth0", "pod0"]) as (host, _):
        host.here.sysctl({"ipv4.ip_forward": 0, "ipv6.conf.all.forwarding": 0})
        describe(host, mode="nat", only="pod")
        host.start()
        yield host


def connect(host: Host, vip: str, port: int = 80, timeout: float = 10) -> socket.socket:
    with host.outside.inside():
        return socket.create_connection((vip, port), timeout)


def echoed(client: socket.socket, size: int) -> bool:
    """Whether `size` bytes come back as they were sent."""
    sent = os.urandom(size)
    threading.Thread(target=client.sendall, args=(sent,), daemon=True).start()
    got = bytearray()
    while len(got) < size and (data := client.recv(65536)):
        got += data
    return bytes(got) == sent


@FAMILIES
@PLACES
def test_tcp(node: Host, vips: dict[int, str], ip: int) -> None:
    with connect(node, vips[ip]) as client:
        address, port = client.getsockname()[:2]
        assert client.recv(100).decode().split() == [address, str(port)], "not the client's own"
        assert address == CLIENT_ADDR[ip]
        # Segments of many packets' size, with checksums for the device to fill in.
        assert echoed(client, 3_000_000)


@FAMILIES
@PLACES
def test_udp(node: Host, vips: dict[int, str], ip: int) -> None:
    with node.outside.inside():
        client = socket.socket(socket.AF_INET6 if ip == 6 else socket.AF_INET, socket.SOCK_DGRAM)
    with client:
        client.settimeout(10)
        client.connect((vips[ip], 53))  # takes answers from there alone
        for size in (0, 1, 1000):
            client.send(b"x" * size)
            line, _, rest = client.recv(2000).partition(b"\n")
            assert line.decode().split()[0] == CLIENT_ADDR[ip]
            assert rest == b"x" * size


@FAMILIES
def test_many_short_connections(node: Host, ip: int) -> None:
    for _ in range(300):
        with connect(node, HERE[ip]) as client:
            assert client.recv(100)


def test_status_and_translations(node: Host) -> None:
    with connect(node, POD[4]) as client:
        assert client.recv(100)
        shown = node.json("status")
        (interface,) = shown["interfaces"]
        assert interface["tc"] in {"tcx", "clsact"}
        assert f"TC by {interface['tc']}" in node.shunt("status").out
        assert shown["problems"] == []
        for reason in ("SENT_TO_BACKEND", "SENT_TO_CLIENT", "PASS_TO_TC"):
            assert shown["reasons"][reason]["packets"] > 0
        rows = node.json("nat", "list", "pod-4-tcp")
        port = client.getsockname()[1]
        (row,) = [row for row in rows if row["client_port"] == port]
        assert (row["client"], row["own"], row["own_port"]) == (
            CLIENT_ADDR[4],
            CLIENT_ADDR[4],
            port,
        )
        assert (row["state"], row["backend"]) == ("confirmed", "10.8.0.2:8080")


@FAMILIES
def test_explain_tells_what_tc_does(node: Host, ip: int) -> None:
    """Behind XDP, and on the way out; of a connection that is there, and of a new one."""
    vip, backend = (f"[{a[ip]}]" if ip == 6 else a[ip] for a in (POD, POD_ADDR))
    own = f"[{CLIENT_ADDR[ip]}]" if ip == 6 else CLIENT_ADDR[ip]
    with connect(node, POD[ip]) as client:
        assert client.recv(100)
        here = f"{own}:{client.getsockname()[1]}"
        known = node.json("explain", "--from", here, "--to", f"{vip}:80", "--flags", "ack")
        fresh = node.json("explain", "--from", f"{own}:9", "--to", f"{vip}:80")
        back = ("explain", "--from", f"{backend}:8080", "--to", here, "--flags", "ack")
        reply = node.json(*back, "--leaving")
        assert "out by eth0" in node.shunt(*back, "--leaving").out
        other = ("explain", "--from", f"{backend}:8081", "--to", here, "--leaving")
        assert "goes on as it is" in node.shunt(*other).out
    for found, known_already in ((known, True), (fresh, False)):
        steps = {step["step"]: step for step in found["steps"]}
        assert (found["verdict"], found["reason"]) == ("pass", "SENT_TO_BACKEND")
        assert found["service"] == f"pod-{ip}-tcp"
        assert (found["out"]["destination"], found["out"]["destination_port"]) == (
            POD_ADDR[ip],
            8080,
        )
        assert steps["program"]["text"] == "TC, behind XDP"
        assert steps["nat-flow"]["facts"]["found"] is known_already
        assert steps["backend"]["facts"]["state"] == "up"
        assert steps["nexthop"]["facts"]["interface"] == "pod0"
    assert (reply["verdict"], reply["reason"]) == ("pass", "SENT_TO_CLIENT")
    assert (reply["out"]["source"], reply["out"]["source_port"]) == (POD[ip], 80)


def test_connections_outlive_the_daemon(node: Host) -> None:
    """kill -9, a while without any agent, and a start: of connections that never pause."""
    open_ones = [connect(node, vips[ip]) for vips in (HERE, POD) for ip in (4, 6)]
    assert all(client.recv(100) for client in open_ones)
    failed: list[str] = []
    stop = threading.Event()

    def talk(client: socket.socket) -> None:
        while not stop.is_set():
            client.sendall(b"x" * 64)
            got = b""
            while len(got) < 64:
                data = client.recv(64)
                if not data:
                    failed.append("closed")
                    return
                got += data

    threads = [threading.Thread(target=talk, args=(client,), daemon=True) for client in open_ones]
    for thread in threads:
        thread.start()
    assert node.process is not None
    node.process.kill()
    with connect(node, HERE[4]) as fresh:  # new ones, too
        assert fresh.recv(100)
    node.start()
    with connect(node, POD[6]) as fresh:
        assert fresh.recv(100)
    node.process.stop()
    node.start()
    stop.set()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads), "an answer is missing"
    assert failed == []
    assert all(echoed(client, 100_000) for client in open_ones)
    for client in open_ones:
        client.close()


@FAMILIES
def test_tcp_to_another_host(remote: Host, ip: int) -> None:
    with connect(remote, POD[ip]) as client:
        own = {4: "10.8.0.1", 6: "fd08::1"}[ip]
        address, port = client.recv(100).decode().split()
        assert address == own
        assert 10000 <= int(port) <= 29999
        assert echoed(client, 3_000_000)
    (interface, _) = remote.json("status")["interfaces"]
    assert (interface["mode"], interface["tc"] != "none") == ("none", True)
    assert remote.json("status")["problems"] == []
    assert "no XDP, TC by" in remote.shunt("status").out


@FAMILIES
def test_udp_to_another_host(remote: Host, ip: int) -> None:
    with remote.outside.inside():
        client = socket.socket(socket.AF_INET6 if ip == 6 else socket.AF_INET, socket.SOCK_DGRAM)
    with client:
        client.settimeout(10)
        client.connect((POD[ip], 53))
        for size in (0, 1, 1000):
            client.send(b"x" * size)
            assert client.recv(2000).partition(b"\n")[2] == b"x" * size


@FAMILIES
def test_a_connection_to_another_host_outlives_the_daemon(remote: Host, ip: int) -> None:
    with connect(remote, POD[ip]) as client:
        assert client.recv(100)
        assert remote.process is not None
        remote.process.kill()
        assert echoed(client, 100_000)
        with connect(remote, POD[ip]) as fresh:
            assert fresh.recv(100)
        remote.start()
        assert echoed(client, 100_000)


def test_a_connection_outlives_its_backends_removal() -> None:
    """No backend that is configured has that one's port; what it answers comes from the VIP."""
    with a_node("tcb") as (host, _):
        pod = {"name": "pod", "vip": POD[4], "ports": [80], "mode": "local"}
        gone, other = (f"{POD_ADDR[4]}:{port}" for port in (8080, 8081))
        host.write("pod", {**pod, "backends": [gone]})
        host.start()
        with connect(host, POD[4]) as client:
            assert client.recv(100)
            host.write("pod", {**pod, "backends": [other]})
            host.until(lambda: host.backend("pod", gone)["state"] == "removed", "is removed")
            assert echoed(client, 100_000)


def test_the_programs_go_with_the_last_service_and_cleanup_leaves_nothing() -> None:
    with a_node("tcg") as (host, _):
        describe(host)
        with host.here.inside():
            ifindex = socket.if_nametoindex("eth0")
        host.start()
        assert host.json("status")["interfaces"][0]["tc"] != "none"
        for path in host.services.iterdir():
            path.unlink()
        host.until(lambda: host.json("status")["interfaces"][0]["tc"] == "none", "detaches")
        describe(host)
        host.until(lambda: host.json("status")["interfaces"][0]["tc"] != "none", "attaches")
        with connect(host, HERE[4]) as client:
            assert client.recv(100)
        assert host.process is not None
        host.process.stop()
        assert (host.bpffs / "tc").is_dir()
        done = host.shunt("cleanup", "--yes", "--bpffs", str(host.bpffs))
        assert done.code == 0, done.err
        assert not host.bpffs.exists()
        with host.here.inside():
            assert "clsact" not in tc.qdiscs(ifindex)
