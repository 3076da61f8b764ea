# SPDX-License-Identifier: Apache-2.0
"""`node/NETWORK`: which of a host's addresses a service gets, and what is said when it can't be."""

from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shunt.agent.sources.file import FileSource
from shunt.agent.sources.store import State
from shunt.ipam.node import covers, overlap, resolve, trouble
from shunt.lb.model import Frontend, IPNetwork, Mode, Port, Protocol, Service
from tests.unit.config_files import SETTINGS, errors, three

NETWORKS = [
    ip_network(text)
    for text in (
        *("0.0.0.0/0", "10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32", "127.0.0.0/8", "127.0.0.1/32"),
        *("126.0.0.0/7", "169.254.0.0/16", "169.254.1.0/24", "168.0.0.0/6", "192.0.2.0/24"),
        *("::/0", "fd00::/8", "fd00::1/128", "::1/128", "::/96"),
    )
]
ADDRESSES = [
    ip_address(text)
    for text in (
        *("10.0.0.1", "10.1.0.1", "10.1.2.3", "127.0.0.1", "127.9.9.9", "169.254.1.1"),
        *("169.254.2.2", "192.0.2.1", "203.0.113.1", "fd00::1", "fd01::1", "::1", "::2"),
    )
]
NODE_PORT = (Port(30080, Protocol.TCP),)


def service(name: str, *node: str, vips: tuple[str, ...] = (), ports: int = 30080) -> Service:
    return Service(
        name,
        tuple(map(ip_address, vips)),
        (Port(ports, Protocol.TCP),),
        Mode.LOCAL,
        node=tuple(map(ip_network, node)),
    )


def chosen(*node: str) -> set[str]:
    (found,) = resolve([service("a", *node)], ADDRESSES)
    return set(map(str, found.vips))


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_a_network_overlaps_with_what_could_mean_the_same_address(network: IPNetwork) -> None:
    for other in NETWORKS:
        both = [a for a in ADDRESSES if covers(network, a) and covers(other, a)]
        if both:
            assert overlap(network, other)
        assert overlap(network, other) == overlap(other, network)


def test_default_is_every_address_but_loopback_and_link_local_ones() -> None:
    """S13: all node addresses of the family. S14: loopback is a choice."""
    assert chosen("0.0.0.0/0") == {"10.0.0.1", "10.1.0.1", "10.1.2.3", "192.0.2.1", "203.0.113.1"}
    assert chosen("::/0") == {"fd00::1", "fd01::1", "::2"}
    assert chosen("127.0.0.0/8") == {"127.0.0.1", "127.9.9.9"}
    assert chosen("127.0.0.1/32", "::1/128") == {"127.0.0.1", "::1"}
    assert chosen("169.254.1.0/24") == {"169.254.1.1"}
    assert chosen("10.1.0.0/16", "192.0.2.1/32") == {"10.1.0.1", "10.1.2.3", "192.0.2.1"}


def test_an_address_that_a_service_names_itself_stays_that_services_for_its_ports() -> None:
    explicit = service("named", vips=("10.0.0.1",))
    other_port = service("elsewhere", vips=("192.0.2.1",), ports=443)
    asking = service("np", "0.0.0.0/0")
    found = {s.name: s for s in resolve([asking, explicit, other_port], ADDRESSES)}
    frontends = {f.vip for f in found["np"].frontends()}
    assert ip_address("10.0.0.1") not in frontends
    assert ip_address("192.0.2.1") in frontends
    assert found["named"] is explicit
    assert found["np"].yields == {Frontend(ip_address("10.0.0.1"), 30080, Protocol.TCP)}
    told = trouble(found["np"])
    assert told is not None
    assert told.what == "service np does not answer on 10.0.0.1:30080/tcp"


def test_without_an_address_there_is_no_frontend_and_a_trouble() -> None:
    (found,) = resolve([service("np", "198.18.0.0/15")], ADDRESSES)
    assert list(found.frontends()) == []
    told = trouble(found)
    assert told is not None
    assert (told.what, told.why) == (
        "service np has no address of this host",
        "none is in 198.18.0.0/15",
    )
    assert trouble(service("plain", vips=("10.0.0.1",))) is None


def test_services_that_do_not_ask_are_left_as_they_are() -> None:
    plain = [service("a", vips=("10.0.0.1",)), service("b", vips=("10.0.0.2",))]
    assert all(one is other for one, other in zip(resolve(plain, ADDRESSES), plain, strict=True))


@given(st.sets(st.sampled_from(ADDRESSES)), st.lists(st.sampled_from(NETWORKS), max_size=4))
def test_an_address_has_one_service_at_most(
    addresses: set[object], networks: list[IPNetwork]
) -> None:
    apart: list[IPNetwork] = []
    for network in networks:  # as the configuration demands of one port
        if not any(overlap(network, other) for other in apart):
            apart.append(network)
    services = [
        service("named", vips=("10.0.0.1", "10.0.0.9")),
        *(service(f"n{i}", str(network)) for i, network in enumerate(apart)),
    ]
    found = resolve(services, addresses)  # type: ignore[arg-type]
    all_of_them = [f for s in found for f in s.frontends()]
    assert len(set(all_of_them)) == len(all_of_them)
    # Nothing is taken that the host does not have, and nothing that is asked for is left out.
    asked = {a for a in addresses for n in apart if covers(n, a)}  # type: ignore[arg-type]
    named = set(services[0].vips)
    assert {f.vip for f in all_of_them} == named | asked


NODE = "name: np\nvip: node/10.0.0.0/8\nports: [30080]\nmode: local\n"
OTHER = "name: other\nvip: node/10.1.0.0/16\nports: [30080]\nmode: local\n"
CASES = {
    "not a network": (
        NODE.replace("10.0.0.0/8", "ten"),
        "2: node network ten is not a network",
        "vip wants an address, or a network such as 10.0.0.0/8",
        "correct the line",
    ),
    "bits": (
        NODE.replace("10.0.0.0/8", "10.0.0.1/8"),
        "2: node network 10.0.0.1/8 has bits set beyond its prefix",
        "vip wants an address, or a network such as 10.0.0.0/8",
        "write 10.0.0.0/8",
    ),
    "link-local": (
        NODE.replace("10.0.0.0/8", "fe80::/10"),
        "2: node network fe80::/10 is link-local",
        "vip wants a network of addresses that name this host alone",
        "correct the line",
    ),
    "twice": (
        NODE.replace("node/10.0.0.0/8", "[node/10.0.0.0/8, node/10.1.0.0/16]"),
        "2: node network 10.1.0.0/16 overlaps",
        "10.0.0.0/8 at np.yaml:2 has addresses of it",
        "remove one of the two",
    ),
    "mode": (
        NODE.replace("local", "dsr-ipip"),
        "2: node/10.0.0.0/8 in mode dsr-ipip",
        "its backends would need this host's own addresses for their answers",
        "use mode: nat, or mode: local for backends here",
    ),
    "every port": (
        NODE.replace("[30080]", "any").replace("local", "nat") + "health: none\n",
        "2: node/10.0.0.0/8 with every port",
        "this host could not be reached itself any more",
        "list the ports",
    ),
    "family": (
        NODE + "backends: ['[fd00::2]:80']\n",
        "5: backend [fd00::2]:80 is not of its VIP's family",
        "mode local cannot reach it from 10.0.0.0/8 (np.yaml:2)",
        "give an IPv4 backend, or use mode: nat",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_refused(tmp_path: Path, case: str) -> None:
    text, what, why, fix = CASES[case]
    assert errors(tmp_path, np=text) == [three(f"np.yaml:{what}", why, fix)]


def test_two_services_may_not_share_a_port_of_one_address(tmp_path: Path) -> None:
    """S18: the same port with different addresses or protocols coexists."""
    assert errors(tmp_path, np=NODE, other=OTHER) == [
        three(
            "other.yaml:2: port 30080/tcp of node/10.1.0.0/16 is taken",
            "np (np.yaml:2) has that port on addresses which are in both networks",
            "give each service a network, port or protocol of its own",
        )
    ]
    for apart in ("10.1.0.0/16->192.0.2.0/24", "30080->30080/udp", "10.1.0.0/16->127.0.0.0/8"):
        old, _, new = apart.partition("->")
        assert errors(tmp_path, np=NODE, other=OTHER.replace(old, new)) == []


def test_a_service_of_the_api_gives_way_to_a_file(tmp_path: Path) -> None:
    (tmp_path / "shunt.yaml").write_text(SETTINGS)
    (tmp_path / "services.d").mkdir()
    (tmp_path / "services.d" / "np.yaml").write_text(NODE)
    kept = {
        name: {"name": name, "vip": vip, "ports": [30080], "mode": "local"}
        for name, vip in (("one", "node/10.1.0.0/16"), ("two", "node/192.0.2.0/24"))
    }
    source = FileSource(tmp_path / "shunt.yaml", tmp_path / "services.d")
    loaded = source.merged(State(kept, {}))
    assert [s.name for s in loaded.configuration.services] == ["np", "two"]
    (error,) = loaded.aside["one"]
    assert error.what == "port 30080/tcp of node/10.1.0.0/16 is taken"
    assert "np (" in error.why
