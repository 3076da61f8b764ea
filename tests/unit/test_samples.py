# SPDX-License-Identifier: Apache-2.0
"""Sampled packets: what their first bytes say, and watchers that are slower than the packets."""

import asyncio
import random
import socket
from pathlib import Path

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.layers.sctp import SCTP
from scapy.packet import Packet

from shunt.agent import unix_socket
from shunt.agent.samples import QUEUED, Subscription, describe
from shunt.agent.unix_socket import listen
from shunt.agent.views import error_of_text
from shunt.lb.errors import ShuntError

ETHER = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
V4 = IP(src="192.0.2.1", dst="203.0.113.10", ttl=7)
V6 = IPv6(src="2001:db8::1", dst="2001:db8::10", hlim=9)
ENDS4 = {"source": "192.0.2.1", "destination": "203.0.113.10", "ttl": 7}
ENDS6 = {"source": "2001:db8::1", "destination": "2001:db8::10", "ttl": 9}
PORTS = {"source_port": 4242, "destination_port": 80}


@pytest.mark.parametrize(
    ("packet", "shown"),
    [
        (V4 / TCP(sport=4242, dport=80, flags="SA"),
         {**ENDS4, **PORTS, "protocol": "tcp", "tcp_flags": ["syn", "ack"]}),
        (V4 / UDP(sport=4242, dport=80), {**ENDS4, **PORTS, "protocol": "udp"}),
        (V6 / TCP(sport=4242, dport=80, flags="R"),
         {**ENDS6, **PORTS, "protocol": "tcp", "tcp_flags": ["rst"]}),
        (V6 / UDP(sport=4242, dport=80), {**ENDS6, **PORTS, "protocol": "udp"}),
        (V4 / ICMP(), {**ENDS4, "protocol": "icmp"}),
        (IP(src="192.0.2.1", dst="203.0.113.10", ttl=7, options=b"\x01" * 8)
         / UDP(sport=4242, dport=80), {**ENDS4, **PORTS, "protocol": "udp"}),
        (IP(src="192.0.2.1", dst="203.0.113.10", ttl=7, frag=3, proto=17) / (b"\x10" * 40),
         {**ENDS4, "protocol": "udp"}),
        (Dot1Q(vlan=7) / V4 / UDP(sport=4242, dport=80), {**ENDS4, **PORTS, "protocol": "udp"}),
        (IP(src="192.0.2.1", dst="203.0.113.10", ttl=7, proto=132) / b"x",
         {**ENDS4, "protocol": "sctp"}),
        (V4 / SCTP(sport=4242, dport=80), {**ENDS4, **PORTS, "protocol": "sctp"}),
        (IP(src="192.0.2.1", dst="203.0.113.10", ttl=7, proto=133) / b"x",
         {**ENDS4, "protocol": "133"}),
        (ARP(), {"ethertype": "0x0806"}),
    ],
)  # fmt: skip
def test_what_a_frame_says(packet: Packet, shown: dict[str, object]) -> None:
    assert describe(bytes(ETHER / packet)) == shown


def test_a_frame_cut_anywhere_is_no_trouble() -> None:
    frame = bytes(ETHER / Dot1Q(vlan=7) / V4 / TCP(sport=4242, dport=80))
    for length in range(len(frame)):
        found = describe(frame[:length])
        assert found.get("source", "192.0.2.1") == "192.0.2.1"
    rng = random.Random(1)
    for _ in range(5000):
        describe(rng.randbytes(rng.randrange(96)))


def test_a_slow_watcher_loses_the_oldest_and_is_told() -> None:
    async def watch() -> tuple[list[bytes], int]:
        subscription = Subscription()
        for n in range(QUEUED + 10):
            subscription.put(n.to_bytes(2, "big"))
        subscription.close()
        return [record async for record in subscription], subscription.lost

    seen, lost = asyncio.run(watch())
    assert lost == 10
    assert seen == [n.to_bytes(2, "big") for n in range(10, QUEUED + 10)]


def test_a_watcher_waits_for_what_comes() -> None:
    async def watch() -> list[bytes]:
        subscription = Subscription()
        asyncio.get_running_loop().call_later(0.01, subscription.put, b"a")
        asyncio.get_running_loop().call_later(0.02, subscription.close)
        return [record async for record in subscription]

    assert asyncio.run(watch()) == [b"a"]


def test_an_errors_text_and_its_parts() -> None:
    for error in (
        ShuntError("web.yaml:3: bad", "because\nof two lines", "do: this"),
        ShuntError("only what"),
        ShuntError("what", fix="fix"),
    ):
        assert error_of_text(str(error)) == {
            "what": error.what, "why": error.why, "fix": error.fix,
        }  # fmt: skip


def test_a_socket_is_the_groups_if_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chowned = []
    monkeypatch.setattr(unix_socket, "GROUP", "daemon")  # which every Debian has, as number 1
    monkeypatch.setattr("os.chown", lambda path, uid, gid: chowned.append((Path(path), uid, gid)))
    private = tmp_path / "run"
    private.mkdir(mode=0o750)
    with listen(private / "s") as listening:
        assert listening.getsockname() == str(private / "s")
    assert chowned == [(private / "s", -1, 1), (private, -1, 1)]


def test_where_nobody_can_listen(tmp_path: Path) -> None:
    with pytest.raises(ShuntError, match="too long") as caught:
        listen(tmp_path / ("x" * 110))
    assert "107" in caught.value.why
    with pytest.raises(ShuntError, match="cannot listen"):
        listen(tmp_path / "absent" / "s")
    (tmp_path / "file").write_text("")
    with pytest.raises(ShuntError, match="in the way"):
        listen(tmp_path / "file")
    with listen(tmp_path / "s"), pytest.raises(ShuntError, match="another daemon"):
        listen(tmp_path / "s")
    with listen(tmp_path / "s") as again:  # what is left is stale, and replaced
        assert again.family == socket.AF_UNIX
