# SPDX-License-Identifier: Apache-2.0
"""The program that sends checks' packets to the backend that their mark names."""

from __future__ import annotations

import socket
import struct
import subprocess
from collections.abc import Iterator

import numpy as np
import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from shunt.kern.objects import Object
from shunt.kern.testrun import RanTc, run_tc
from shunt.xdp import check
from tests.packets.balancer import BACKEND_MAC, CONFIG, Flag, Mode, Reason, mac, mapped
from tests.packets.frames import OWN_MAC, network, tcp, udp, verify
from tests.packets.private import in_namespace
from tests.packets.test_vlan import ONE, TWO, Tags, untag, word

UNSPEC, SHOT, REDIRECT = -1, 2, 7
MARK, BACKEND, SVC, HOP, EGRESS = 0x53000000, 3, 2, 5, 7
NODE = {4: "10.0.0.254", 6: "fd00::fe"}
VIP = {4: "203.0.113.1", 6: "2001:db8:a::1"}
ADDRESS = {4: "10.0.0.1", 6: "fd00::1"}

versions = pytest.mark.parametrize("version", [4, 6])
combinations = pytest.mark.parametrize(
    ("inner", "outer"), [(4, 4), (6, 6), (4, 6), (6, 4)], ids=["4in4", "6in6", "4in6", "6in4"]
)


class Path:
    """The loaded program, with tables that a test writes."""

    def __init__(self) -> None:
        self.object = Object(check.OBJECT)
        config = self.object.variable(".rodata", "config")
        for number in ("4", "6"):
            config[f"saddr{number}"] = mapped(CONFIG[f"ipip_saddr{number}"])
            config[f"spread{number}"] = CONFIG[f"ipip_spread{number}"]
        config["mark"] = MARK
        self.object.load()

    def put(self, mode: str, version: int, *, mtu: int = 1500, tags: Tags = ()) -> None:
        maps = {name: self.object.maps[name].mapped() for name in ("svc", "backends", "nexthops")}
        maps["svc"]["mode"][SVC] = Mode[mode]
        record, hop = maps["backends"], maps["nexthops"]
        record["addr"][BACKEND], record["svc"][BACKEND] = mapped(ADDRESS[version]), SVC
        record["nexthop"][BACKEND] = HOP
        record["flags"][BACKEND] = Flag.KNOWN | (Flag.IPV6 if version == 6 else 0)
        hop["dmac"][HOP], hop["smac"][HOP] = mac(BACKEND_MAC), mac(OWN_MAC)
        hop["mtu"][HOP], hop["ifindex"][HOP], hop["tags"][HOP] = mtu, EGRESS, word(tags)

    def run(self, packet: Packet, mark: int = MARK | BACKEND) -> RanTc:
        return run_tc(self.object.programs[check.PROGRAM].fd, bytes(packet), mark)


@pytest.fixture
def path() -> Iterator[Path]:
    made = Path()
    yield made
    made.object.close()


def asked(version: int) -> Packet:
    """A check's SYN, as it comes to the loopback device."""
    frame = tcp(NODE[version], VIP[version])
    return Ether(src="00:00:00:00:00:00", dst="00:00:00:00:00:00") / network(frame)


@combinations
def test_it_is_wrapped_as_clients_packets_are(path: Path, inner: int, outer: int) -> None:
    path.put("DSR_IPIP", outer)
    packet = asked(inner)
    ran = path.run(packet)
    assert (ran.verdict, ran.mark) == (REDIRECT, 0)
    out = verify(ran.data)
    assert (out.dst, out.src) == (BACKEND_MAC, OWN_MAC)
    envelope = out[IP] if outer == 4 else out[IPv6]
    assert envelope.dst == ADDRESS[outer]
    assert envelope.src.startswith("198.18." if outer == 4 else "100::")
    assert bytes(envelope.payload) == bytes(network(packet))
    assert (envelope.ttl if outer == 4 else envelope.hlim) == 64


@versions
def test_dsr_l2_changes_the_macs_alone(path: Path, version: int) -> None:
    path.put("DSR_L2", version)
    packet = asked(version)
    ran = path.run(packet)
    assert ran.verdict == REDIRECT
    out = Ether(ran.data)
    assert (out.dst, out.src) == (BACKEND_MAC, OWN_MAC)
    assert bytes(network(out)) == bytes(network(packet))


@pytest.mark.parametrize("tags", [ONE, TWO], ids=["one", "two"])
def test_vlan_tags_of_the_next_hop_are_put_on(path: Path, tags: Tags) -> None:
    """As they are on the wire: a test run does not show the outermost."""
    heard: list[bytes] = []

    def listen() -> None:
        subprocess.run(["ethtool", "-K", "v0", "tx", "off"], check=True, capture_output=True)
        path.put("DSR_IPIP", 4, tags=tags)
        path.object.maps["nexthops"].mapped()["ifindex"][HOP] = socket.if_nametoindex("v0")
        check.attach(path.object.programs[check.PROGRAM].fd)
        with (
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as wire,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking,
        ):
            wire.bind(("v1", 0))
            wire.settimeout(5)
            wire.setsockopt(263, 8, 1)  # SOL_PACKET, PACKET_AUXDATA: with the tag kept aside
            asking.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, MARK | BACKEND)
            asking.sendto(b"well?", (VIP[4], 80))
            while not heard:
                data, [(_, _, aside)], _, _ = wire.recvmsg(2000, 200)
                tci, kind = struct.unpack_from("=HH", aside, 16)
                if data[:6] == mac(BACKEND_MAC).tobytes():
                    heard.append(data[:12] + struct.pack("!HH", kind, tci) + data[12:])

    in_namespace(
        listen,
        [
            "link add v0 type veth peer name v1",
            "link set v0 up",
            "link set v1 up",
            f"route add {VIP[4]} dev lo",
        ],
        {"ipv6/conf/all/disable_ipv6": "1"},
    )
    found, frame = untag(heard[0])
    assert found == [(provider, 0, number) for provider, _, number in tags]
    assert frame[IP].dst == ADDRESS[4]


def test_what_has_another_mark_is_left_alone(path: Path) -> None:
    path.put("DSR_IPIP", 4)
    for mark in (0, BACKEND, 0x52000000 | BACKEND, 0x54000000 | BACKEND):
        ran = path.run(asked(4), mark)
        assert (ran.verdict, ran.mark, ran.data) == (UNSPEC, mark, bytes(asked(4)))


def test_what_cannot_be_sent_is_dropped_and_counted(path: Path) -> None:
    def why(packet: Packet, mark: int = MARK | BACKEND) -> Reason:
        before = path.object.maps["reasons"].totals()["packets"]
        assert path.run(packet, mark).verdict == SHOT
        (reason,) = np.flatnonzero(path.object.maps["reasons"].totals()["packets"] - before)
        return Reason(reason)

    path.put("NAT", 4)
    assert why(asked(4)) == Reason.DROP_BAD_TABLE
    path.put("DSR_IPIP", 4)
    assert why(asked(4), MARK | BACKEND + 1) == Reason.DROP_NO_BACKEND
    assert why(asked(4), MARK | 0xFFFFFF) == Reason.DROP_NO_BACKEND  # no such id
    datagram = udp(NODE[4], VIP[4], payload=bytes(1500 - 48))
    assert path.run(datagram).verdict == REDIRECT
    assert why(udp(NODE[4], VIP[4], payload=bytes(1500 - 47))) == Reason.DROP_TOO_BIG
    path.object.maps["nexthops"].mapped()["dmac"][HOP] = 0  # unresolved
    assert why(asked(4)) == Reason.DROP_NO_NEXTHOP
