# SPDX-License-Identifier: Apache-2.0
"""SCTP with real sockets, in the namespaces of test_tc_datapath.py: the pod serves it.

With checksums left to the devices, but where XDP sends on what the client has sent.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from shunt.kern import features
from shunt.lab.napi import attach_pass
from shunt.lab.netns import Namespace, offloads
from tests.netns.reasons import packets
from tests.netns.shunt_host import Host
from tests.netns.test_tc_datapath import CLIENT_ADDR, FAMILIES, NODE_ADDR, POD_ADDR, a_node

IPPROTO_SCTP, PORT = 132, 3868
VIPS: dict[str, dict[int, str]] = {
    mode: {4: f"203.0.113.{n}", 6: f"2001:db8:a::{n}"}
    for n, mode in enumerate(("local", "nat", "dsr-l2"), 21)
}
OWN = {4: "10.8.0.1", 6: "fd08::1"}
OTHER = {4: "192.0.2.3", 6: "2001:db8:c::3"}
MASQUERADE: dict[str, Any] = {
    "interfaces": ["pod0"],
    "sources": ["192.0.2.0/24", "2001:db8:c::/64"],
    "not_to": [],
}
# Answers with who asked, then echoes what comes.
SERVER = """
import socket, sys, threading
def serve(sock, peer):
    sock.sendall(f"{peer[0]} {peer[1]}\\n".encode())
    while data := sock.recv(65536):
        sock.sendall(data)
    sock.close()
def listen(host):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, 132)
    listener.bind((host, int(sys.argv[1])))
    listener.listen(64)
    return listener
def accept(listener):
    while True:
        threading.Thread(target=serve, args=listener.accept(), daemon=True).start()
threads = [threading.Thread(target=accept, args=(listen(host),)) for host in sys.argv[2:]]
for thread in threads:
    thread.start()
print("ready", flush=True)
"""


@contextlib.contextmanager
def serving(pod: Namespace) -> Iterator[None]:
    """On its own addresses and on the VIPs that come to it as they are."""
    direct = VIPS["dsr-l2"].values()
    pod.own(*direct)
    argv = [sys.executable, "-c", SERVER, str(PORT), *POD_ADDR.values(), *direct]
    server = subprocess.Popen([*pod.enter, *argv], stdout=subprocess.PIPE)
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        yield
    finally:
        server.kill()
        server.wait()
        assert server.stdout is not None
        server.stdout.close()


@pytest.fixture(scope="module")
def node() -> Iterator[Host]:
    found = features.sctp()
    if not found.present:
        pytest.skip(f"needs sctp: {found.why}")
    with a_node("sctp", interfaces=["eth0", "pod0"]) as (host, pod), serving(pod):
        host.outside.ip(
            *(f"addr add {OTHER[ip]}/{32 if ip == 4 else 128} dev eth0" for ip in OTHER)
        )
        host.outside.ip(*(f"route add {POD_ADDR[ip]} via {NODE_ADDR[ip]}" for ip in (4, 6)))
        for mode, vips in VIPS.items():
            for ip in (4, 6):
                document = {"name": f"{mode}-{ip}", "vip": vips[ip], "ports": [f"{PORT}/sctp"]}
                host.write(f"{mode}-{ip}", {**document, "mode": mode, "backends": [POD_ADDR[ip]]})
        # A checksum that is still to be filled in would be lost by what XDP sends on; and what
        # XDP sends into a veth needs somebody who polls at its other end.
        offloads(host.outside, "eth0")
        polls = attach_pass(pod, "eth0")
        try:
            host.start(timeout_s=300)  # an emulated processor takes a minute to load it all
            yield host
        finally:
            os.close(polls)


def associate(host: Host, to: str, source: str = "", port: int = 0) -> socket.socket:
    """Bound to one address: an association has no others then."""
    ip = 6 if ":" in to else 4
    with host.outside.inside():
        made = socket.socket(
            socket.AF_INET6 if ip == 6 else socket.AF_INET, socket.SOCK_STREAM, IPPROTO_SCTP
        )
    made.settimeout(10)
    made.bind((source or CLIENT_ADDR[ip], port))
    try:
        made.connect((to, PORT))
    except OSError:
        made.close()
        raise
    return made


def echoed(client: socket.socket, size: int, message: int = 20_000) -> bool:
    """Whether `size` bytes come back as they were sent, which is in messages of so many."""
    sent = os.urandom(size)

    def send() -> None:
        for at in range(0, size, message):
            client.sendall(sent[at : at + message])

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    got = bytearray()
    while len(got) < size and (data := client.recv(65536)):
        got += data
    sender.join(10)
    return bytes(got) == sent


def peer(client: socket.socket) -> tuple[str, int]:
    address, port = client.recv(100).decode().split()
    return address, int(port)


@FAMILIES
@pytest.mark.parametrize("mode", VIPS)
def test_an_association(node: Host, mode: str, ip: int) -> None:
    with associate(node, VIPS[mode][ip]) as client:
        own = client.getsockname()[1]
        assert peer(client) == ((OWN if mode == "nat" else CLIENT_ADDR)[ip], own)
        assert echoed(client, 300_000)
    assert node.json("status")["problems"] == []


@FAMILIES
@pytest.mark.parametrize("mode", ["local", "nat"])
def test_it_is_known_by_its_state(node: Host, mode: str, ip: int) -> None:
    def row(port: int) -> dict[str, Any]:
        rows = node.json("nat", "list", f"{mode}-{ip}")
        (found,) = [found for found in rows if found["client_port"] == port]
        return found  # type: ignore[no-any-return]

    with associate(node, VIPS[mode][ip]) as client:
        own = client.getsockname()[1]
        assert peer(client)
        found = row(own)
        assert (found["protocol"], found["state"]) == ("sctp", "confirmed")
        assert (found["own_port"], found["backend_port"]) == (own, PORT)
    node.until(lambda: row(own)["state"] == "closing", "has seen the shutdown")


@FAMILIES
@pytest.mark.parametrize("mode", VIPS)
def test_many_short_associations(node: Host, mode: str, ip: int) -> None:
    for _ in range(10):
        with associate(node, VIPS[mode][ip]) as client:
            assert peer(client)


@FAMILIES
def test_a_port_that_another_client_has_is_refused(node: Host, ip: int) -> None:
    vip = VIPS["nat"][ip]
    with associate(node, vip) as client:
        assert peer(client)
        own = client.getsockname()[1]
        before = packets(node.json("status")).get("DROP_NAT_SCTP_PORT", 0)
        with pytest.raises(OSError, match=r"timed out|in progress"):
            refused(node, vip, OTHER[ip], own)
        assert packets(node.json("status"))["DROP_NAT_SCTP_PORT"] > before
        assert echoed(client, 10_000)
        with associate(node, vip, OTHER[ip], own + 1) as other:
            assert peer(other) == (OWN[ip], own + 1)


def refused(host: Host, vip: str, source: str, port: int) -> None:
    with host.outside.inside():
        family = socket.AF_INET6 if ":" in vip else socket.AF_INET
        made = socket.socket(family, socket.SOCK_STREAM, IPPROTO_SCTP)
    with made:
        made.settimeout(1.5)
        made.bind((source, port))
        made.connect((vip, PORT))


@FAMILIES
def test_associations_outlive_the_daemon(node: Host, ip: int) -> None:
    clients = [associate(node, vips[ip]) for vips in VIPS.values()]
    assert all(peer(client) for client in clients)
    assert node.process is not None
    node.process.kill()
    assert all(echoed(client, 10_000) for client in clients)
    node.start(timeout_s=300)
    assert all(echoed(client, 10_000) for client in clients)
    for client in clients:
        client.close()


@FAMILIES
@pytest.mark.parametrize("to", ["local", "pod"])
def test_what_leaves_the_node_has_its_address(node: Host, to: str, ip: int) -> None:
    """And the client's own port."""
    settings = yaml.safe_load(node.config.read_text())
    if "masquerade" not in settings:  # the last tests of this node
        generation = node.json("status")["generation"]
        node.config.write_text(yaml.safe_dump({**settings, "masquerade": MASQUERADE}))
        node.until(lambda: node.json("status")["generation"] > generation, "is in force")
    with associate(node, POD_ADDR[ip] if to == "pod" else VIPS[to][ip]) as client:
        assert peer(client) == (OWN[ip], client.getsockname()[1])
        assert echoed(client, 300_000)
