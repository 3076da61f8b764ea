# SPDX-License-Identifier: Apache-2.0
"""This host's ports in mode nat: taken towards whom, and who else uses them."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from socket import AF_INET, AF_INET6, SOCK_DGRAM, SOCK_STREAM, socket

import numpy as np
import pytest

from shunt.agent import nat_expiry
from shunt.agent.nat_ports import Destination, PortUse, listed, listeners, others, overlap
from shunt.kern.objects import Object
from shunt.lb.compile import Endpoint, mapped
from shunt.lb.model import ANY_PORT, Configuration, Mode, Port, Protocol, Service, Settings

TCP, UDP = Protocol.TCP, Protocol.UDP
OBJECT = Path(__file__).resolve().parents[2] / "xdp/lb.bpf.o"
HOST = frozenset({ip_address("10.9.0.1")})
SETTINGS = Settings(interfaces=("eth0",))


def service(vip: str, *ports: int, mode: Mode = Mode.NAT) -> Service:
    return Service("web", (ip_address(vip),), tuple(Port(p, TCP) for p in ports), mode)


def entries(
    use: PortUse, *flows: tuple[str, int, int, str], local: bool = False, track: int = 0
) -> None:
    with Object(OBJECT) as found:
        key, value = found.btf.struct("flow_key"), found.btf.struct("nat_rev_val")
    keys, values = np.zeros(len(flows), key), np.zeros(len(flows), value)
    for i, (backend, port, protocol, own) in enumerate(flows):
        keys[i]["saddr"] = np.frombuffer(mapped(ip_address(backend)), np.uint8)
        keys[i]["daddr"] = np.frombuffer(mapped(ip_address(own)), np.uint8)
        keys[i]["sport"], keys[i]["proto"], keys[i]["dport"] = port, protocol, 10000 + i
    values["back"]["ifindex"], values["track"] = 0 if local else 2, track
    use.add(keys, values)


def test_each_destination_has_ports_of_its_own() -> None:
    use = PortUse()
    entries(
        use,
        *[("10.0.0.1", 80, TCP, "10.9.0.1")] * 3,
        ("10.0.0.1", 81, TCP, "10.9.0.1"),
        ("10.0.0.1", 80, UDP, "10.9.0.1"),
        ("10.0.0.1", 80, TCP, "10.9.0.2"),
        *[("fd00::1", 80, TCP, "fd09::1")] * 2,
    )
    entries(use, ("10.0.0.1", 80, TCP, "10.9.0.1"))
    entries(use, ("10.0.0.7", 80, TCP, "192.0.2.1"), local=True)
    busiest = Destination(Endpoint(ip_address("10.0.0.1"), 80), TCP, ip_address("10.9.0.1"))
    assert use.busiest() == (busiest, 4)
    assert sorted(use.taken().values()) == [1, 1, 1, 2, 4]
    assert next(iter(use.taken())) == busiest
    assert PortUse().busiest() == (None, 0)


def test_masqueraded_flows_take_ports_towards_whom_they_are_for() -> None:
    use = PortUse()
    tracked = nat_expiry.TRACKED | nat_expiry.ANSWERED
    flows = [("192.0.2.80", 443, TCP, "10.9.0.1")] * 3 + [("192.0.2.80", 0, 1, "10.9.0.1")]
    entries(use, *flows, local=True, track=tracked | nat_expiry.MASQUERADED)
    entries(use, ("192.0.2.80", 443, TCP, "10.9.0.1"), local=True, track=tracked)
    sctp = ("192.0.2.80", 443, Protocol.SCTP, "10.9.0.1")
    entries(use, sctp, local=True, track=tracked | nat_expiry.MASQUERADED)
    assert {str(d): n for d, n in use.taken().items()} == {
        "192.0.2.80:443/tcp from 10.9.0.1": 3,
        "192.0.2.80/icmp from 10.9.0.1": 1,
    }


def test_many_destinations_are_told_apart() -> None:
    use = PortUse()
    flows = [(f"10.{a}.{b}.1", 80 + c, TCP, "10.9.0.1") for a in range(8) for b in range(50)
             for c in range(3)]  # fmt: skip
    entries(use, *flows)
    assert len(use.taken()) == len(flows)
    assert set(use.taken().values()) == {1}


@pytest.mark.parametrize(
    ("services", "listening", "says"),
    [
        ([service("203.0.113.1", 80, 10443)], [], ""),
        ([service("10.9.0.1", 80, ANY_PORT, 30000)], [(TCP, 9999), (UDP, 30000)], ""),
        ([service("10.9.0.1", 10443)], [], "frontend 10.9.0.1:10443/tcp of web"),
        ([service("203.0.113.1", 80)], [(UDP, 29999)], "a listener on 29999/udp"),
        ([service("10.9.0.1", 10443, mode=Mode.DSR_L2)], [(TCP, 10000)], ""),
        (
            [service("10.9.0.1", *range(10001, 10004))],
            [(TCP, 10000)],
            "frontend 10.9.0.1:10003/tcp of web and 1 more",
        ),
    ],
)
def test_who_else_uses_nats_ports(
    services: list[Service], listening: list[tuple[Protocol, int]], says: str
) -> None:
    configuration = Configuration(SETTINGS, tuple(services))
    error = overlap(configuration, HOST, frozenset(listening))
    assert (error is not None) == bool(says)
    if error is not None:
        assert says in error.why
        assert "10000-29999" in error.what
        assert "nat: {ports:" in error.fix


def test_these_are_left_out() -> None:
    services = (
        service("10.9.0.1", 80, 10443, ANY_PORT),
        service("203.0.113.1", 10444),
        service("10.9.0.1", 10445, mode=Mode.DSR_L2),
    )
    configuration = Configuration(SETTINGS, services)
    listening = frozenset({(UDP, 29999), (TCP, 30000), (TCP, 10000)})
    found = others(configuration, HOST, listening)
    assert found == {(TCP, 10443), (TCP, 10445), (TCP, 10000), (UDP, 29999)}
    alone = Configuration(SETTINGS, services[2:])
    assert others(alone, HOST, listening) == frozenset()  # nobody needs a port


def test_what_the_kernel_lists_as_waiting(tmp_path: Path) -> None:
    head = "  sl  local_address rem_address   st tx_queue rx_queue\n"
    (tmp_path / "tcp").write_text(
        f"{head}   0: 0100007F:2710 00000000:0000 0A 0:0\n"
        "   1: 0100007F:2711 0100007F:0050 01 0:0\n"
    )
    (tmp_path / "udp6").write_text(f"{head}   0: {'0' * 32}:0035 {'0' * 32}:0000 07 0:0\n")
    assert listed(tmp_path) == {(TCP, 10000), (UDP, 53)}


@pytest.mark.parametrize(("family", "host"), [(AF_INET, "127.0.0.1"), (AF_INET6, "::1")])
def test_who_waits_on_these_ports(family: int, host: str) -> None:
    with socket(family, SOCK_STREAM) as tcp, socket(family, SOCK_DGRAM) as udp:
        for one in (tcp, udp):
            one.bind((host, 0))
        tcp_port, udp_port = tcp.getsockname()[1], udp.getsockname()[1]
        waiting = {(TCP, tcp_port), (UDP, udp_port)}
        assert listeners(range(1, 65536)) & waiting == {(UDP, udp_port)}
        tcp.listen()
        assert listeners(range(1, 65536)) >= waiting
        assert listed() >= waiting
        assert listeners(range(tcp_port, tcp_port + 1)) & waiting == {(TCP, tcp_port)}
        assert not listeners(range(tcp_port + 1, tcp_port + 1)) & waiting
        for beside in (range(tcp_port - 1, tcp_port), range(tcp_port + 1, tcp_port + 2)):
            assert (TCP, tcp_port) not in listeners(beside)
        with socket(family, SOCK_STREAM) as client:
            client.connect((host, tcp_port))
            assert (TCP, client.getsockname()[1]) not in listeners(range(1, 65536))
        udp.connect((host, 9))
        assert (UDP, udp_port) not in listeners(range(1, 65536))
