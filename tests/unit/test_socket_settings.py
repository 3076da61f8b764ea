# SPDX-License-Identifier: Apache-2.0
"""`sockets:` of shunt.yaml and of a service; which ports this host's addresses have."""

from __future__ import annotations

from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from shunt.agent.socket_upkeep import words
from shunt.agent.sources.file import load
from shunt.ipam.node import node_ports, resolve
from shunt.kern import cgroup
from shunt.lb.compile import Condition, compile_target
from shunt.lb.model import Mode, Port, Protocol, Service, Settings
from tests.unit.config_files import SETTINGS, errors

TCP, UDP, SCTP = Protocol.TCP, Protocol.UDP, Protocol.SCTP


def settings(tmp_path: Path, text: str) -> Settings:
    (tmp_path / "shunt.yaml").write_text(f"interfaces: [eth0]\n{text}")
    (tmp_path / "services.d").mkdir(exist_ok=True)
    return load(tmp_path / "shunt.yaml", tmp_path / "services.d").settings


@pytest.mark.parametrize(
    ("text", "cover", "exclude", "node_ports"),
    [
        ("", "host", (), "reserve"),
        ("sockets: all\n", "all", (), "reserve"),
        ("sockets: off\n", "off", (), "reserve"),
        ("sockets: {cover: all, node_ports: share}\n", "all", (), "share"),
        ("sockets: {exclude: /a.slice/b}\n", "host", ("/a.slice/b",), "reserve"),
        ("sockets: {exclude: [/a//b/, /c]}\n", "host", ("/a/b", "/c"), "reserve"),
    ],
)
def test_sockets_of_the_node(
    tmp_path: Path, text: str, cover: str, exclude: tuple[str, ...], node_ports: str
) -> None:
    found = settings(tmp_path, text)
    assert (found.sockets, found.sockets_exclude) == (cover, exclude)
    assert found.node_ports == node_ports


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("sockets: some\n", "sockets some is not accepted"),
        ("sockets: {cover: some}\n", "cover some is not accepted"),
        ("sockets: {exclude: [a/b]}\n", "control group a/b is not one to exclude"),
        ("sockets: {exclude: [//]}\n", "control group // is not one to exclude"),
        ("sockets: {exclude: [/a/../..]}\n", "control group /a/../.. is not one to exclude"),
        ("sockets: {exclude: [/a, /a/]}\n", "control group /a stands twice"),
        (
            f"sockets: {{exclude: [{', '.join(f'/{n}' for n in range(257))}]}}\n",
            "exclude has 257 control groups",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (error,) = errors(tmp_path, SETTINGS + text)
    assert told in error
    assert "  fix: " in error


def test_sockets_of_a_service(tmp_path: Path) -> None:
    (tmp_path / "services.d").mkdir()
    for switch, want in (("off", False), ("on", True)):
        document = f"name: a\nvip: 203.0.113.1\nports: 80\nsockets: {switch}\n"
        (tmp_path / "services.d/a.yaml").write_text(document)
        (tmp_path / "shunt.yaml").write_text("interfaces: [eth0]\n")
        (service,) = load(tmp_path / "shunt.yaml", tmp_path / "services.d").services
        assert service.sockets is want
        target = compile_target(service, TCP, lambda _name, _endpoint: Condition())
        assert target.options.sockets is want


def test_ports_of_this_hosts_addresses() -> None:
    def service(name: str, node: tuple[str, ...], *ports: tuple[int, Protocol]) -> Service:
        networks = tuple(ip_network(each) for each in node)
        vips = (ip_address("203.0.113.9"),)
        return Service(name, vips, tuple(Port(*p) for p in ports), Mode.NAT, node=networks)

    services = [
        service("a", ("10.0.0.0/8",), (30080, TCP), (30053, UDP), (30038, SCTP)),
        service("b", ("10.0.0.0/8", "fd00::/8"), (30090, TCP)),
        service("c", (), (30070, TCP)),
        service("d", ("192.0.2.0/24",), (30060, TCP)),  # this host has no such address
    ]
    own = [ip_address(a) for a in ("10.1.2.3", "fd00::1", "127.0.0.1", "203.0.113.9")]
    found = node_ports(resolve(services, own))
    assert found == {
        (4, Port(30080, TCP)),
        (4, Port(30053, UDP)),
        (4, Port(30090, TCP)),
        (6, Port(30090, TCP)),
    }
    bits = words(found)
    there = {
        (i >> 10, (i & 1023) << 6 | bit)
        for i, word in enumerate(bits.tolist())
        for bit in range(64)
        if word >> bit & 1
    }
    assert there == {(0, 30080), (1, 30053), (0, 30090), (2, 30090)}


def test_control_groups_by_their_paths(tmp_path: Path) -> None:
    """A directory's number is its identity, on whatever file system it is."""
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "c").mkdir()
    by_id = cgroup.paths(tmp_path)
    assert set(by_id.values()) == {"/", "/a", "/a/b", "/c"}
    assert [by_id[i] for i in cgroup.line(tmp_path, "/a/b")] == ["/a", "/a/b"]
    assert cgroup.line(tmp_path, "/") == cgroup.line(tmp_path, "") == []
    with pytest.raises(FileNotFoundError):
        cgroup.line(tmp_path, "/a/x")
