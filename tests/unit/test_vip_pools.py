# SPDX-License-Identifier: Apache-2.0
"""VIP pools: who gets which address, and what is said when nobody can."""

from ipaddress import IPv4Address, IPv6Network, ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shunt.agent.sources.file import FileSource, load
from shunt.agent.sources.store import State
from shunt.ipam.pools import Request, allocate, overlaps, size
from shunt.lb.errors import ShuntError
from shunt.lb.model import IPAddress, IPNetwork
from tests.unit.config_files import errors, three

SMALL = ip_network("203.0.113.8/29")
POOLS: dict[str, list[IPNetwork]] = {
    "small": [SMALL, ip_network("198.51.100.1/32")],
    "large": [ip_network("2001:db8::/64")],
}
addresses = st.sampled_from([*SMALL, IPv4Address("198.51.100.1"), ip_address("2001:db8::1")])
requests = st.builds(
    Request, st.sampled_from([f"s{n}" for n in range(12)]), st.sampled_from([*POOLS, "none"])
)


@given(st.lists(requests), st.dictionaries(requests, addresses), st.sets(addresses), st.data())
def test_what_allocation_promises(
    wanted: list[Request],
    held: dict[Request, IPAddress],
    taken: set[IPAddress],
    data: st.DataObject,
) -> None:
    owners = {address: request for request, address in held.items()}
    held = {request: address for address, request in owners.items()}  # one owner each
    found = allocate(POOLS, wanted, held, taken)
    assert found.given.keys() | found.refused.keys() == set(wanted)
    assert not found.given.keys() & found.refused.keys()
    assert len(set(found.given.values())) == len(found.given)
    for request, address in found.given.items():
        assert any(address in network for network in POOLS[request.pool])
        assert held.get(request, address) == address
        assert request in held or address not in taken
    for request in found.refused:
        inside = request.pool != "none" and any(
            held[request] in n for n in POOLS[request.pool] if request in held
        )
        assert not (request in held and inside)
    # The order makes no difference, and who comes later moves nobody.
    assert allocate(POOLS, data.draw(st.permutations(wanted)), held, taken).given == found.given
    later = allocate(POOLS, [*wanted, *data.draw(st.lists(requests))], held | found.given, taken)
    assert found.given.items() <= later.given.items()


def test_a_pool_is_used_up_to_its_last_address() -> None:
    wanted = [Request(f"s{n}", "small") for n in range(10)]
    found = allocate(POOLS, wanted, {}, ())
    assert size(POOLS["small"]) == 9
    assert set(found.given.values()) == {*SMALL, IPv4Address("198.51.100.1")}
    ((request, error),) = found.refused.items()
    assert request in wanted
    assert str(error).startswith("pool small has no free address\n  why: all of its 9 are given")


def test_a_large_pool_takes_no_time() -> None:
    pools: dict[str, list[IPNetwork]] = {"huge": [IPv6Network("2001:db8::/32")]}
    found = allocate(pools, [Request(f"s{n}", "huge") for n in range(100)], {}, ())
    assert len(set(found.given.values())) == 100
    assert size(pools["huge"]) == 2**96


def test_a_new_address_hardly_depends_on_the_others() -> None:
    """A node that starts with nothing gives what another gave long ago, but for collisions."""
    pools: dict[str, list[IPNetwork]] = {"p": [ip_network("10.0.0.0/16")]}
    alone = allocate(pools, [Request("web", "p")], {}, ())
    among = allocate(
        pools, [Request(f"s{n}", "p") for n in range(9)] + [Request("web", "p")], {}, ()
    )
    assert alone.given.items() <= among.given.items()


def test_overlaps_are_found() -> None:
    pools = {
        "a": [ip_network("10.0.0.0/24")],
        "b": [ip_network("10.0.1.0/24"), ip_network("10.0.0.128/25")],
        "c": [ip_network("10.0.2.0/24")],
    }
    assert overlaps(pools) == [("a", "b", ip_network("10.0.0.128/25"))]


NODE = "interfaces: [eth0]\npools:\n"
CASES = {
    "no network": (
        "  p: [10.0.0.0/33]",
        "3: pool network 10.0.0.0/33 is not a network",
        "pools.p[0] wants a network such as 203.0.113.0/28, or an address",
        "correct the line",
    ),
    "host bits": (
        "  p: 10.0.0.1/24",
        "3: pool network 10.0.0.1/24 has bits set beyond its prefix",
        "pools.p wants a network such as 203.0.113.0/28, or an address",
        "write 10.0.0.0/24",
    ),
    "nobody's": (
        "  p: 224.0.0.0/24",
        "3: pool network 224.0.0.0/24 is multicast",
        "pools.p wants a unicast network",
        "correct the line",
    ),
    "both families": (
        "  p: [10.0.0.0/24, '2001:db8::/64']",
        "3: pool p has networks of both families",
        "a service that asks for it wants one address, of a family it knows",
        "make it two pools, such as p and p6; a service may ask for both",
    ),
    "overlap": (
        "  p: 10.0.0.0/24\n  q: [10.0.1.0/24, 10.0.0.8/30]",
        "4: pools p and q overlap",
        "10.0.0.8/30 of q has addresses of p (shunt.yaml:3)",
        "give each pool addresses of its own",
    ),
    "name": (
        "  Public_1: 10.0.0.0/24",
        "3: pool Public_1 is no name",
        "pools wants names of 1 to 32 of a-z, 0-9 and '-', a letter or digit first and last",
        "correct the value; an example is public",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_pools(tmp_path: Path, case: str) -> None:
    text, what, why, fix = CASES[case]
    assert errors(tmp_path, NODE + text + "\n") == [three(f"shunt.yaml:{what}", why, fix)]


def test_an_empty_pool_is_refused(tmp_path: Path) -> None:
    (error,) = errors(tmp_path, NODE + "  p: []\n")
    assert error.startswith("shunt.yaml:3: p is empty\n")


def test_what_services_may_not_ask_for(tmp_path: Path) -> None:
    node = NODE + "  p: 10.0.0.0/31\n"
    found = errors(
        tmp_path,
        node,
        a="name: a\nvip: pool/q\nports: [80]\n",
        b="name: b\nvip: [pool/p, pool/p]\nports: [80]\n",
        c="name: c\nvip: [10.0.0.0, 10.0.0.1]\nports: [80]\n",
        d="name: d\nvip: pool/\nports: [80]\n",
    )
    assert [error.splitlines()[0] for error in found] == [
        "a.yaml:2: there is no pool q",
        "b.yaml:2: pool p has no free address",
        "b.yaml:2: pool p has no free address",
        "d.yaml:2: there is no pool ",
    ]


def test_an_address_that_is_given_is_nobody_elses(tmp_path: Path) -> None:
    (tmp_path / "services.d").mkdir()
    (tmp_path / "shunt.yaml").write_text(NODE + "  p: 10.0.0.0/30\n")
    files = {"a": "pool/p", "b": "[pool/p, 192.0.2.1]"}
    for name, vip in files.items():
        text = f"name: {name}\nvip: {vip}\nports: [80]\n"
        (tmp_path / "services.d" / f"{name}.yaml").write_text(text)
    source = FileSource(tmp_path / "shunt.yaml", tmp_path / "services.d")
    first = source.merged(State())
    assert first.configuration.pools[0].given == tuple(
        (request.service, address) for request, address in sorted(first.vips.items())
    )
    held = first.vips[Request("a", "p")]
    assert first.configuration.services[0].vips == (held,)
    text = f"name: c\nvip: {held}\nports: [81]\n"
    (tmp_path / "services.d" / "c.yaml").write_text(text)
    with pytest.raises(ShuntError, match=f"c.yaml:2: vip {held} is given to a"):
        source.merged(State({}, first.vips))
    # Without a memory of it, the explicit one stands, and a gets another.
    anew = load(tmp_path / "shunt.yaml", tmp_path / "services.d")
    assert held not in anew.services[0].vips
