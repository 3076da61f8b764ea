# SPDX-License-Identifier: Apache-2.0
"""Masqueraded flows that run out of ports say so: where, how many, and before it comes to that."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from tests.netns.shunt_host import Host
from tests.netns.test_masquerade import MASQUERADE, OWN
from tests.netns.test_tc_datapath import FAMILIES, NODE_ADDR, POD_ADDR, a_node

PORTS = 1024  # as few as nat can have
FLOWS = 1500


@pytest.fixture(scope="module")
def node() -> Iterator[Host]:
    settings: dict[str, Any] = {"masquerade": MASQUERADE, "nat": {"ports": f"10000-{9999 + PORTS}"}}
    with a_node("mp", xdp="off", interfaces=["eth0", "pod0"], **settings) as (host, _pod):
        for ip in (4, 6):
            host.outside.ip(f"route add {POD_ADDR[ip]} via {NODE_ADDR[ip]}")
        host.start()
        yield host


def ask(node: Host, ip: int, to: int) -> None:
    """Datagrams of as many flows to one port of the other host."""
    with node.outside.inside():
        for port in range(20000, 20000 + FLOWS):
            with socket.socket(
                socket.AF_INET6 if ip == 6 else socket.AF_INET, socket.SOCK_DGRAM
            ) as s:
                s.bind(("", port))
                s.sendto(b"x", (POD_ADDR[ip], to))


@FAMILIES
def test_ports_towards_one_destination_run_out(node: Host, ip: int) -> None:
    ask(node, ip, 5300)
    to = f"[{POD_ADDR[6]}]:5300" if ip == 6 else f"{POD_ADDR[4]}:5300"

    def whole() -> list[Any]:
        rows = [row for row in node.json("nat", "list", "--top") if row["backend"] == to]
        return [row for row in rows if row["taken"] + row["refused"] == FLOWS]

    node.until(lambda: bool(whole()), "has looked at every flow")
    (row,) = whole()
    assert (row["protocol"], row["own"], row["ports"]) == ("udp", OWN[ip], PORTS)
    assert 0.9 * PORTS < row["taken"] <= PORTS  # 32 are tried at random for each flow
    assert "of nat's ports are taken towards one destination" in node.shunt("status").out
    used = [
        line.split()[1]
        for line in node.shunt("metrics").out.splitlines()
        if line.startswith("shunt_nat_ports_used_ratio ")
    ]
    assert [float(one) > 0.9 for one in used] == [True]


@FAMILIES
def test_ports_that_processes_wait_on_are_left_out(node: Host, ip: int) -> None:
    """Also those that began after shuntd did."""
    family, own = (socket.AF_INET6 if ip == 6 else socket.AF_INET), 10000 + ip
    with node.here.inside():
        waiting = socket.socket(family, socket.SOCK_DGRAM)
    with waiting:
        waiting.bind(("", own))
        node.until(lambda: f"a listener on {own}/udp" in node.shunt("status").out, "has seen it")
        ask(node, ip, 5301)
        rows = node.json("nat", "list", "--limit", "10000")
    to = POD_ADDR[ip], 5301
    taken = {row["own_port"] for row in rows if (row["vip"], row["vip_port"]) == to}
    assert len(taken) > 0.9 * PORTS
    assert own not in taken
