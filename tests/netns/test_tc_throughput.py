# SPDX-License-Identifier: Apache-2.0
"""iperf3 through TC to backends on the node, with every offload that the devices have.

The node is that of test_tc_datapath.py. Segments of up to 64 KiB with checksums that nobody has
filled in come by, are translated as they are, and arrive.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shunt.lab.netns import Namespace
from tests.netns.shunt_host import Host
from tests.netns.test_tc_datapath import NODE_ADDR, POD_ADDR, a_node

VIP = {4: "203.0.113.5", 6: "2001:db8:a::5"}
PORT, LISTEN, SECONDS = 80, 5201, 1
MTU = 1500
OFFLOADS = {"tx-checksumming", "scatter-gather", "tcp-segmentation-offload"}
Scene = tuple[Host, dict[str, Namespace]]
PLACES = pytest.mark.parametrize("place", ["node", "pod"])
FAMILIES = pytest.mark.parametrize("ip", [4, 6])


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with a_node("tci", xdp="off") as (host, pod):
        for n, (place, backends) in enumerate((("node", NODE_ADDR), ("pod", POD_ADDR))):
            for ip, address in backends.items():
                for proto in ("", "/udp"):
                    backend = f"{address}:{LISTEN}" if ip == 4 else f"[{address}]:{LISTEN}"
                    name = f"{place}-{ip}{proto.replace('/', '-')}"
                    service = {"vip": VIP[ip], "ports": [f"{PORT + n}{proto}"], "mode": "local"}
                    more = {"name": name, "backends": [backend], "health": "none"}
                    host.write(name, service | more)
        host.start()
        yield host, {"node": host.here, "pod": pod}


def iperf3(scene: Scene, place: str, ip: int, *options: str) -> Any:
    """What the client has to say in the end, of a test against a server of its own."""
    host, places = scene
    log = host.directory / "iperf3.log"
    log.unlink(missing_ok=True)
    server = places[place].start(["iperf3", "-s", "-1", "-p", str(LISTEN), "--forceflush"], log)
    try:
        host.until(lambda: "listening" in server.log_tail(), "iperf3 listens")
        port = PORT + (place == "pod")
        argv = ["iperf3", "-J", "-c", VIP[ip], "-p", str(port), "-t", str(SECONDS), *options]
        done = host.outside.run(*argv, check=False)
    finally:
        server.stop()
    said = json.loads(done.stdout)
    assert "error" not in said, said["error"]
    return said["end"]


def counted(host: Host, reason: str) -> tuple[int, int]:
    """Packets and bytes."""
    found = host.json("status")["reasons"].get(reason, {"packets": 0, "bytes": 0})
    return found["packets"], found["bytes"]


def wrong_checksums(*namespaces: Namespace) -> int:
    """Segments and datagrams that the stacks refused for theirs, since they were made."""
    total = 0
    for namespace in namespaces:
        with namespace.inside():
            lines = Path("/proc/thread-self/net/snmp").read_text().splitlines()
            six = Path("/proc/thread-self/net/snmp6").read_text().splitlines()
        for name in ("Tcp:", "Udp:"):
            head, values = (line.split() for line in lines if line.startswith(name))
            total += int(values[head.index("InCsumErrors")])
        total += sum(int(line.split()[1]) for line in six if "InCsumErrors" in line)
    return total


@pytest.mark.parametrize("way", ["to the server", "to the client"])
@PLACES
@FAMILIES
def test_tcp(scene: Scene, place: str, ip: int, way: str) -> None:
    host, places = scene
    reason, reverse = (
        ("SENT_TO_BACKEND", ()) if way == "to the server" else ("SENT_TO_CLIENT", ("-R",))
    )
    before = counted(host, reason)
    said = iperf3(scene, place, ip, *reverse)
    assert said["sum_received"]["bits_per_second"] > 0
    assert said["sum_received"]["bytes"] >= said["sum_sent"]["bytes"] * 0.5
    packets, size = (b - a for a, b in zip(before, counted(host, reason), strict=True))
    assert size >= said["sum_received"]["bytes"]
    assert size / packets > 2 * MTU, "no packet of many segments came by"
    assert wrong_checksums(host.here, host.outside, *places.values()) == 0


@PLACES
@FAMILIES
def test_udp(scene: Scene, place: str, ip: int) -> None:
    host, places = scene
    said = iperf3(scene, place, ip, "-u", "-b", "20M", "-l", "1200")["sum"]
    assert said["bits_per_second"] > 0
    assert said["packets"] - said["lost_packets"] > said["packets"] / 2
    assert wrong_checksums(host.here, host.outside, *places.values()) == 0


def test_the_devices_have_their_offloads(scene: Scene) -> None:
    host, places = scene
    ends = (
        (host.here, "eth0"),
        (host.here, "pod0"),
        (host.outside, "eth0"),
        (places["pod"], "eth0"),
    )
    for namespace, device in ends:
        shown = namespace.run("ethtool", "-k", device).stdout.splitlines()
        on = {
            name
            for name, _, state in (line.partition(":") for line in shown)
            if "on" in state.split()
        }
        assert on >= OFFLOADS


def test_nothing_was_dropped(scene: Scene) -> None:
    host, _ = scene
    found = {n: c["packets"] for n, c in host.json("status")["reasons"].items() if c["packets"]}
    assert {n for n in found if "DROP" in n} == set(), found
