# SPDX-License-Identifier: Apache-2.0
"""Decap on a real interface: what comes wrapped reaches real sockets, in every combination.

    balancer  ──────────── veth ────────────  backend
    10.9.0.1, fd09::1                         10.9.0.2, fd09::2; the VIPs on lo
                                              decap on its end

The balancer's namespace has no client in it: a raw socket plays both, wraps what the client would
say and hears the backend answer the client directly, as with direct server return.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from shunt.kern import links
from shunt.lab.netns import Namespace, veth
from shunt.xdp import decap
from tests.netns import iproute
from tests.netns.decap_pair import BACKEND_MAC, BALANCER_MAC, DEVICE, VIP, refused

CLIENT = {4: "192.0.2.1", 6: "2001:db8:c::1"}
BACKEND = {4: "10.9.0.2", 6: "fd09::2"}
SOURCE = {4: "198.18.3.4", 6: "100::3:4"}
PORT, CLIENT_PORT = 8080, 40000

combinations = pytest.mark.parametrize(
    ("inner", "outer"), [(4, 4), (6, 6), (4, 6), (6, 4)], ids=["4in4", "6in6", "4in6", "6in4"]
)


class Wire:
    """The balancer's end: wraps what a client says, hears what the backend answers."""

    def __init__(self, balancer: Namespace) -> None:
        with balancer.inside():
            self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
            self.socket.bind(("eth0", 0))
        self.socket.settimeout(3)

    def say(self, packet: Packet, outer: int, source: str = "", backend: str = "") -> None:
        source, backend = source or SOURCE[outer], backend or BACKEND[outer]
        envelope = IP(src=source, dst=backend) if outer == 4 else IPv6(src=source, dst=backend)
        frame = Ether(src=BALANCER_MAC, dst=BACKEND_MAC) / envelope / packet
        self.socket.send(bytes(frame))

    def hear(self, wanted: Callable[[Packet], bool]) -> Packet:
        """The next frame for the client that is wanted."""
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            packet = Ether(self.socket.recv(2000))
            if packet.src == BACKEND_MAC and wanted(packet):
                return packet
        raise TimeoutError("nothing came back")


@pytest.fixture
def wire(pair: tuple[Namespace, Namespace]) -> Iterator[Wire]:
    wire = Wire(pair[0])
    yield wire
    wire.socket.close()


def packets(pair: tuple[Namespace, Namespace], bpffs: Path) -> dict[str, int]:
    """What decap has counted in the backend, without the zeros."""
    with pair[1].inside():
        (found,) = decap.status(bpffs)
    return {name: count for name, count in found.packets.items() if count}


def server(backend: Namespace, version: int, kind: socket.SocketKind) -> socket.socket:
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with backend.inside():
        listener = socket.socket(family, kind)
    listener.settimeout(3)
    listener.bind((VIP[version], PORT))
    return listener


def said(version: int, transport: Packet) -> Packet:
    """What the client says to the VIP."""
    header = IP if version == 4 else IPv6
    return header(src=CLIENT[version], dst=VIP[version]) / transport


def datagram(version: int, payload: bytes) -> Packet:
    return said(version, UDP(sport=CLIENT_PORT, dport=PORT) / Raw(payload))


@pytest.mark.parametrize("mode", ["native", "generic"])
@combinations
def test_udp(
    inner: int, outer: int, mode: str, pair: Any, wire: Wire, attach: Any, bpffs: Path
) -> None:
    assert attach(mode=mode).mode == mode
    with server(pair[1], inner, socket.SOCK_DGRAM) as listener:
        wire.say(datagram(inner, b"hello"), outer)
        data, peer = listener.recvfrom(100)
        assert (data, peer[:2]) == (b"hello", (CLIENT[inner], CLIENT_PORT))
        listener.sendto(b"welcome", peer)
    answer = wire.hear(lambda p: UDP in p)
    assert (answer.payload.src, answer.payload.dst) == (VIP[inner], CLIENT[inner])
    assert bytes(answer[UDP].payload) == b"welcome"
    assert packets(pair, bpffs)["unwrapped"] == 1


@pytest.mark.parametrize("mode", ["native", "generic"])
@combinations
def test_tcp(
    inner: int, outer: int, mode: str, pair: Any, wire: Wire, attach: Any, bpffs: Path
) -> None:
    attach(mode=mode)
    ports: dict[str, Any] = {"sport": CLIENT_PORT, "dport": PORT}
    with server(pair[1], inner, socket.SOCK_STREAM) as listener:
        listener.listen()
        wire.say(said(inner, TCP(**ports, flags="S", seq=1000)), outer)
        answer = wire.hear(lambda p: TCP in p)
        assert str(answer[TCP].flags) == "SA"
        room = 1500 - (20 if outer == 4 else 40)  # of the link, beside the outer header
        assert dict(answer[TCP].options)["MSS"] == room - (40 if inner == 4 else 60)
        assert (answer.payload.src, answer.payload.dst) == (VIP[inner], CLIENT[inner])
        acked: dict[str, Any] = {**ports, "seq": 1001, "ack": answer[TCP].seq + 1}
        wire.say(said(inner, TCP(**acked, flags="A")), outer)
        with listener.accept()[0] as connection:
            connection.settimeout(3)
            assert connection.getpeername()[:2] == (CLIENT[inner], CLIENT_PORT)
            wire.say(said(inner, TCP(**acked, flags="PA") / Raw(b"hello")), outer)
            assert connection.recv(100) == b"hello"
            connection.sendall(b"welcome")
            answer = wire.hear(lambda p: TCP in p and len(p[TCP].payload) > 0)
    assert bytes(answer[TCP].payload) == b"welcome"
    assert packets(pair, bpffs)["unwrapped"] == 3


def nothing_comes(listener: socket.socket) -> None:
    listener.settimeout(0.2)
    with pytest.raises(TimeoutError):
        listener.recv(100)
    listener.settimeout(3)


@combinations
def test_without_decap_nothing_arrives(
    inner: int, outer: int, pair: Any, wire: Wire, attach: Any, bpffs: Path
) -> None:
    """So the tests above show what they claim; and detaching leaves things as they were."""
    with server(pair[1], inner, socket.SOCK_DGRAM) as listener:
        wire.say(datagram(inner, b"early"), outer)
        nothing_comes(listener)
        attach()
        wire.say(datagram(inner, b"now"), outer)
        assert listener.recv(100) == b"now"
        with pair[1].inside():
            decap.detach(DEVICE, bpffs)
            assert decap.status(bpffs) == []
            assert links.query(socket.if_nametoindex(DEVICE)).prog_id == 0
        assert list(bpffs.iterdir()) == []
        wire.say(datagram(inner, b"late"), outer)
        nothing_comes(listener)


def test_sources_are_changed_in_place(pair: Any, wire: Wire, attach: Any, bpffs: Path) -> None:
    attach()
    with server(pair[1], 4, socket.SOCK_DGRAM) as listener:
        wire.say(datagram(4, b"stranger"), 4, source="10.9.0.1")
        nothing_comes(listener)
        assert packets(pair, bpffs)["pass_source"] == 1
        changed = attach(["10.9.0.0/24", "fd09::/64"])
        assert [str(source) for source in changed.sources] == ["10.9.0.0/24", "fd09::/64"]
        wire.say(datagram(4, b"friend"), 4, source="10.9.0.1")
        assert listener.recv(100) == b"friend"
        wire.say(datagram(4, b"stranger"), 4)
        nothing_comes(listener)
    assert len(list(bpffs.iterdir())) == 1


def test_a_router_unwraps_what_is_its_own(pair: Any, wire: Wire, attach: Any, bpffs: Path) -> None:
    pair[1].sysctl({"ipv4.ip_forward": 1, "ipv6.conf.all.forwarding": 1})
    attach()
    with server(pair[1], 6, socket.SOCK_DGRAM) as listener:
        for outer, other in ((4, "10.9.0.77"), (6, "fd09::77")):
            wire.say(datagram(6, b"others"), outer, backend=other)
            nothing_comes(listener)
            wire.say(datagram(6, b"own"), outer)
            assert listener.recv(100) == b"own"
    counted = packets(pair, bpffs)
    assert (counted["unwrapped"], counted["pass_not_ours"]) == (2, 2)


def test_ordinary_traffic_passes_beside_it(pair: Any, attach: Any, bpffs: Path) -> None:
    pair[0].ip("address add 10.9.0.1/24 dev eth0", "address add fd09::1/64 dev eth0 nodad")
    attach()
    for address in ("10.9.0.2", "fd09::2"):
        pair[0].run("ping", "-c1", "-W2", address)
    assert packets(pair, bpffs).keys() == {"pass_not_tunnel"}


def test_one_name_in_two_namespaces_is_two_interfaces(pair: Any, attach: Any, bpffs: Path) -> None:
    """The lab's backends share one bpffs, and all call their interface eth0."""
    attach()
    # 6.1 renames before it takes down what one command asks both of.
    pair[0].ip(
        "link set dev eth0 down",
        f"link set dev eth0 name {DEVICE}",
        f"link set dev {DEVICE} up",
    )
    with pair[0].inside():
        decap.attach(DEVICE, ["10.0.0.0/8"], bpffs=bpffs)
    assert len(list(bpffs.iterdir())) == 2
    found = {}
    for namespace in pair:
        with namespace.inside():
            (found[namespace.name],) = decap.status(bpffs)
    sources = [[str(source) for source in each.sources] for each in found.values()]
    assert sources == [["10.0.0.0/8"], ["198.18.0.0/16", "100::/64"]]
    with pair[1].inside():
        decap.detach(DEVICE, bpffs)
    with pair[0].inside():
        assert len(decap.status(bpffs)) == 1


def test_the_pin_of_an_interface_that_went_is_replaced(pair: Any, attach: Any, bpffs: Path) -> None:
    attach()
    pair[1].ip(f"link delete {DEVICE}")
    with pair[1].inside():
        assert decap.status(bpffs) == []
    veth(pair[0], "eth0", pair[1], DEVICE, 1500)
    attach()
    assert [path.name for path in bpffs.iterdir()] == ["decap-eth0:9"]


# Errors -----------------------------------------------------------------------------------------


def test_an_interface_that_is_taken_is_left_to_its_holder(pair: Any, bpffs: Path) -> None:
    blob = Path(__file__).resolve().parents[2] / "tests/packets/headroom.bpf.o"
    iproute.run(pair[1], "ip", "link", "set", "dev", DEVICE, "xdp", "obj", str(blob), "sec", "xdp")
    error = refused(pair, lambda: decap.attach(DEVICE, bpffs=bpffs))
    assert DEVICE in error.what
    assert "shunt_headroom" in error.what
    assert list(bpffs.iterdir()) == []
    error = refused(pair, lambda: decap.detach(DEVICE, bpffs))
    assert "shunt_headroom" in error.why
    with pair[1].inside():
        assert links.query(socket.if_nametoindex(DEVICE)).prog_name == "shunt_headroom"


def test_errors_say_what_why_and_how_to_fix(pair: Any, attach: Any, bpffs: Path) -> None:
    error = refused(pair, lambda: decap.attach("nope", bpffs=bpffs))
    assert (error.what, DEVICE in error.why) == ("interface nope does not exist", True)
    error = refused(pair, lambda: decap.detach(DEVICE, bpffs))
    assert error.what == f"decap is not attached to {DEVICE}"
    error = refused(pair, lambda: decap.attach(DEVICE, ["10.0.0.1/8"], bpffs=bpffs))
    assert error.what == "10.0.0.1/8 is not a prefix to accept packets from"
    nine = [f"10.{i}.0.0/16" for i in range(9)]
    error = refused(pair, lambda: decap.attach(DEVICE, nine, bpffs=bpffs))
    assert error.what == "9 IPv4 sources are too many"
    attach(mode="native")
    error = refused(pair, lambda: decap.attach(DEVICE, mode="generic", bpffs=bpffs))
    assert error.what == f"decap is attached to {DEVICE} in mode native"


def test_the_program_goes_on_when_the_process_that_attached_it_has_ended(
    pair: Any, wire: Wire, bpffs: Path
) -> None:
    attach = f"from shunt.xdp import decap; decap.attach({DEVICE!r}, bpffs=Path({str(bpffs)!r}))"
    code = f"from pathlib import Path; {attach}"
    done = subprocess.run([*pair[1].enter, sys.executable, "-c", code], check=False)
    assert done.returncode == 0
    with server(pair[1], 4, socket.SOCK_DGRAM) as listener:
        wire.say(datagram(4, b"hello"), 6)
        assert listener.recv(100) == b"hello"
