# SPDX-License-Identifier: Apache-2.0
"""Configurations that are right: what they mean, defaults, and which files are read."""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path

import pytest

from shunt.agent.sources.file import ConfigErrors, FileSource, load
from shunt.kern.inotify import Watch
from shunt.lb.model import (
    Backend,
    Configuration,
    HealthCheck,
    Limits,
    Mode,
    Port,
    Protocol,
    Service,
    Settings,
)

TCP, UDP = Protocol.TCP, Protocol.UDP
V4, V6 = IPv4Address, IPv6Address


def write(place: Path, settings: str = "interfaces: [eth0]\n", **services: str) -> Path:
    (place / "shunt.yaml").write_text(settings)
    (place / "services.d").mkdir(exist_ok=True)
    for name, text in services.items():
        (place / "services.d" / f"{name}.yaml").write_text(text)
    return place


def loaded(place: Path) -> Configuration:
    return load(place / "shunt.yaml", place / "services.d")


def one(place: Path, text: str, settings: str = "interfaces: [eth0]\n") -> Service:
    (service,) = loaded(write(place, settings, one=text)).services
    return service


def test_only_interfaces_are_required(tmp_path: Path) -> None:
    assert loaded(write(tmp_path)) == Configuration(Settings(interfaces=("eth0",)), ())


def test_a_service_is_four_lines(tmp_path: Path) -> None:
    text = """
name: web
vip: 203.0.113.10
ports: [80, 443]
backends: [10.0.0.1, 10.0.0.2]
"""
    assert one(tmp_path, text) == Service(
        name="web",
        vips=(V4("203.0.113.10"),),
        ports=(Port(80, TCP), Port(443, TCP)),
        mode=Mode.DSR_IPIP,
        backends=(Backend(V4("10.0.0.1")), Backend(V4("10.0.0.2"))),
        health=HealthCheck("tcp", None, 2.0, 1.0, 2, 3),
        tcp_idle_s=8000.0,
        udp_idle_s=60.0,
        udp_window_s=10.0,
        slots_per_backend=100,
    )


def test_every_setting(tmp_path: Path) -> None:
    text = """
interfaces: [eth0, bond0.100]
xdp: generic
hash_seed: 0xffffffffffffffff
mode: nat
ipip: {source4: 198.19.0.0/16, source6: "2001:db8::/48"}
nat: {ports: 1024-65535}
budgets: {inserts: 1, answers: 0, samples: 3}
limits: {frontends: 16, services: 17, slots: 1024, backends: 18, nexthops: 19, sources: 20,
  rates: 21, server_ids: 24, flows: 22, nat: 23}
"""
    assert loaded(write(tmp_path, text)).settings == Settings(
        interfaces=("eth0", "bond0.100"),
        xdp_mode="generic",
        hash_seed=2**64 - 1,
        ipip_source4=IPv4Network("198.19.0.0/16"),
        ipip_source6=IPv6Network("2001:db8::/48"),
        nat_port_min=1024,
        nat_port_max=65535,
        limits=Limits(16, 17, 1024, 18, 19, 20, 21, 24, 22, 23),
        inserts_per_s=1,
        answers_per_s=0,
        samples_per_s=3,
    )


def test_every_key_of_a_service(tmp_path: Path) -> None:
    text = """
- name: shop/dns.internal
  vip: [203.0.113.10, "2001:db8::10"]
  ports: [53/udp, 53/tcp]
  mode: dsr-l2
  backends:
    - "[2001:db8::1]"
    - 2001:db8::2
    - 10.0.0.1
    - {address: 10.0.0.3, port: 53, weight: 3}
    - "[2001:db8::3]:53"
  health: {type: tcp, port: 8080, interval: 500ms, timeout: 0.25, rise: 1, fall: 9}
  idle: {tcp: 2h, udp: 1m}
  udp_window: 1d
  slots_per_backend: 200
"""
    service = one(tmp_path, text)
    assert service == Service(
        name="shop/dns.internal",
        vips=(V4("203.0.113.10"), V6("2001:db8::10")),
        ports=(Port(53, UDP), Port(53, TCP)),
        mode=Mode.DSR_L2,
        # In a DSR mode the frontend's own port, written out, is the same as none.
        backends=(
            Backend(V6("2001:db8::1")),
            Backend(V6("2001:db8::2")),
            Backend(V4("10.0.0.1")),
            Backend(V4("10.0.0.3"), 0, 3),
            Backend(V6("2001:db8::3")),
        ),
        health=HealthCheck("tcp", 8080, 0.5, 0.25, 1, 9),
        tcp_idle_s=7200.0,
        udp_idle_s=60.0,
        udp_window_s=86400.0,
        slots_per_backend=200,
    )
    assert service.protocols() == (TCP, UDP)
    assert [str(frontend) for frontend in service.frontends()] == [
        "203.0.113.10:53/udp",
        "203.0.113.10:53/tcp",
        "[2001:db8::10]:53/udp",
        "[2001:db8::10]:53/tcp",
    ]
    assert service.region_slots() == 1024  # 5 * 200, rounded up


def test_nat_keeps_the_backends_port(tmp_path: Path) -> None:
    text = "{name: a, vip: 203.0.113.1, ports: 80, mode: nat, backends: ['10.0.0.1:80', 10.0.0.2]}"
    assert one(tmp_path, text).backends == (Backend(V4("10.0.0.1"), 80), Backend(V4("10.0.0.2")))


def test_single_values_stand_for_lists(tmp_path: Path) -> None:
    text = "{name: a, vip: 203.0.113.1, ports: 53/udp, backends: 10.0.0.1}"
    long = "{name: a, vip: [203.0.113.1], ports: [53/udp], backends: [10.0.0.1]}"
    assert one(tmp_path, text, "interfaces: eth0") == one(tmp_path, long, "interfaces: [eth0]")


@pytest.mark.parametrize(
    ("ports", "health", "expected"),
    [
        ("80", "", HealthCheck()),
        ("53/udp", "", None),
        ("80", "health: none", None),
        ("80", "health: tcp", HealthCheck()),
        ("53/udp", "health: {port: 53}", HealthCheck(port=53)),
    ],
)
def test_health(tmp_path: Path, ports: str, health: str, expected: HealthCheck | None) -> None:
    text = f"name: a\nvip: 203.0.113.1\nports: [{ports}]\n{health}\n"
    assert one(tmp_path, text).health == expected


@pytest.mark.parametrize(
    ("settings", "own", "mode"),
    [
        ("", "", Mode.DSR_IPIP),
        ("mode: nat", "", Mode.NAT),
        ("mode: nat", "mode: dsr-l2", Mode.DSR_L2),
    ],
)
def test_mode_of_the_node_and_of_the_service(
    tmp_path: Path, settings: str, own: str, mode: Mode
) -> None:
    text = f"name: a\nvip: 203.0.113.1\nports: [80]\n{own}\n"
    assert one(tmp_path, text, f"interfaces: eth0\n{settings}\n").mode is mode


def test_no_backends_and_no_services_are_allowed(tmp_path: Path) -> None:
    text = "name: a\nvip: 203.0.113.1\nports: [80]\nbackends: []\n"
    service = one(tmp_path, text)
    assert (service.backends, service.region_slots()) == ((), 1)
    write(tmp_path, one="# name: a\n")
    assert loaded(tmp_path).services == ()


def test_the_same_port_with_both_protocols_is_two_frontends(tmp_path: Path) -> None:
    write(
        tmp_path,
        a="{name: a, vip: 203.0.113.1, ports: 53}",
        b="{name: b, vip: 203.0.113.1, ports: 53/udp}",
        c="{name: c, vip: 203.0.113.2, ports: 53}",
    )
    assert len(loaded(tmp_path).services) == 3


def test_words_and_numbers_that_yaml_takes_for_something_else(tmp_path: Path) -> None:
    # In YAML 1.1 the first three are a boolean, a date and a number in base 60.
    text = """
- {name: no, vip: 203.0.113.1, ports: 80}
- {name: 2001-01-01, vip: 203.0.113.2, ports: 80}
- {name: c, vip: 2001:10:20:30:40:50:51:52, ports: "80"}
- {name: 7, vip: 203.0.113.3, ports: 1_000}
"""
    services = loaded(write(tmp_path, one=text)).services
    assert [service.name for service in services] == ["2001-01-01", "7", "c", "no"]
    assert services[2].vips == (V6("2001:10:20:30:40:50:51:52"),)
    assert services[1].ports == (Port(1000, TCP),)


def test_anchors_aliases_and_merged_keys(tmp_path: Path) -> None:
    text = """
- &web
  name: a
  vip: 203.0.113.1
  ports: [80]
  backends: &servers [10.0.0.1, 10.0.0.2]
- <<: *web
  name: b
  vip: 203.0.113.2
- {name: c, vip: 203.0.113.3, ports: [81], backends: *servers}
- {<<: [{name: d}, *web], vip: 203.0.113.4}
"""
    services = loaded(write(tmp_path, one=text)).services
    assert [(s.name, str(s.vips[0]), s.ports[0].port, len(s.backends)) for s in services] == [
        ("a", "203.0.113.1", 80, 2),
        ("b", "203.0.113.2", 80, 2),
        ("c", "203.0.113.3", 81, 2),
        ("d", "203.0.113.4", 80, 2),
    ]


def test_equal_whatever_the_files(tmp_path: Path) -> None:
    """Services come sorted by name, however they are spread; results hash and compare."""
    entries = [f"name: s{at}\n  vip: 203.0.113.{at}\n  ports: [80]\n" for at in range(5)]
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    together = loaded(write(tmp_path / "1", all="".join(f"- {e}" for e in reversed(entries))))
    apart = loaded(
        write(tmp_path / "2", **{f"f{9 - at}": f"- {e}" for at, e in enumerate(entries)})
    )
    assert together == apart
    assert hash(together) == hash(apart)
    assert [service.name for service in together.services] == ["s0", "s1", "s2", "s3", "s4"]


def test_only_yaml_files_that_are_not_hidden_are_read(tmp_path: Path) -> None:
    write(tmp_path, web="{name: web, vip: 203.0.113.1, ports: 80}")
    directory = tmp_path / "services.d"
    ignored = ["web.yaml~", ".web.yaml", ".web.yaml.swp", "#web.yaml#", "web.yml", "README", "4913"]
    ignored += ["web.yaml.dpkg-new", ".yaml"]
    for name in ignored:
        (directory / name).write_text("this: [is not")
    assert [service.name for service in loaded(tmp_path).services] == ["web"]


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "shunt.yaml").write_bytes(b"\xef\xbb\xbfinterfaces: [eth0]\n")
    assert loaded(tmp_path).settings.interfaces == ("eth0",)


def test_all_or_nothing_on_reload(tmp_path: Path) -> None:
    write(tmp_path, good="{name: good, vip: 203.0.113.1, ports: 80}")
    source = FileSource(tmp_path / "shunt.yaml", tmp_path / "services.d")
    before = source.load()
    write(tmp_path, bad="{name: bad, vip: 203.0.113.2, ports: 0}")
    with pytest.raises(ConfigErrors):
        source.load()
    write(tmp_path, bad="{name: bad, vip: 203.0.113.2, ports: 80}")
    after = source.load()
    assert [service.name for service in after.services] == ["bad", "good"]
    assert after.services[1] == before.services[0]


def test_what_concerns_the_source_when_watched(tmp_path: Path) -> None:
    """With a real watch: the way editors write, and what they leave beside it."""
    write(tmp_path, web="{name: web, vip: 203.0.113.1, ports: 80}")
    source = FileSource(tmp_path / "shunt.yaml", tmp_path / "services.d")
    services = tmp_path / "services.d"
    with Watch(source.paths()) as watch:
        (services / ".web.yaml.swp").write_text("x")
        (services / "notes.txt").write_text("x")
        assert not source.concerns(watch.read())
        (services / "web.yaml.new").write_text("{name: web, vip: 203.0.113.2, ports: 80}")
        (services / "web.yaml.new").rename(services / "web.yaml")
        assert source.concerns(watch.read())
        (tmp_path / "shunt.yaml.new").write_text("interfaces: [eth1]")
        (tmp_path / "shunt.yaml.new").rename(tmp_path / "shunt.yaml")
        assert source.concerns(watch.read())
        (services / "web.yaml").unlink()
        assert source.concerns(watch.read())
        services.rename(tmp_path / "away")
        assert source.concerns(watch.read())


def test_backends_of_dsr_geneve_have_ports_of_their_own(tmp_path: Path) -> None:
    """Of either family, whatever the VIP's; without one it is the frontend's."""
    text = (
        "name: web\nvip: [203.0.113.10, '2001:db8::10']\nports: [80, 443]\nmode: dsr-geneve\n"
        "backends: ['10.0.0.1:8080', '[fd00::2]:8081', 10.0.0.3]\n"
    )
    service = one(tmp_path, text)
    assert (service.mode, service.mode.translates) == (Mode.DSR_GENEVE, False)
    assert [str(b) for b in service.backends] == ["10.0.0.1:8080", "[fd00::2]:8081", "10.0.0.3"]
