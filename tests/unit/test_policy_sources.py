# SPDX-License-Identifier: Apache-2.0
"""Source ranges: compiled rules say what the longest match in what was written says."""

from __future__ import annotations

import random
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest

from shunt.lb.model import IPAddress, IPNetwork, SourceRule
from shunt.policy.sources import Contradiction, compile_rules, digest, entries


def longest(address: IPAddress, rules: list[SourceRule], otherwise: bool) -> bool:
    matching = [r for r in rules if r.network.version == address.version and address in r.network]
    return max(matching, key=lambda r: r.network.prefixlen).allow if matching else otherwise


def networks(rnd: random.Random, version: int) -> list[IPNetwork]:
    bits = {4: 32, 6: 128}[version]
    found = []
    for _ in range(rnd.randrange(6)):
        prefix = bits - rnd.randrange(6)
        base = {4: int(IPv4Address("192.0.2.0")), 6: int(IPv6Address("2001:db8::"))}[version]
        value = (base + rnd.randrange(32)) >> bits - prefix << bits - prefix
        address = IPv4Address(value) if version == 4 else IPv6Address(value)
        found.append(ip_network(f"{address}/{prefix}"))
    return found


@pytest.mark.parametrize("seed", range(200))
def test_the_compiled_rules_say_the_same(seed: int) -> None:
    rnd = random.Random(seed)
    allow = {n for version in (4, 6) for n in networks(rnd, version)}
    deny = {n for version in (4, 6) for n in networks(rnd, version)} - allow
    rules = compile_rules(allow, deny)
    written = [SourceRule(n, True) for n in allow] + [SourceRule(n, False) for n in deny]
    for base in ("192.0.2.0", "2001:db8::"):
        for offset in range(40):
            address = ip_address(base) + offset
            want = longest(address, written, not allow)
            assert not rules or longest(address, list(rules), False) is want


def test_the_fewest_rules_are_kept() -> None:
    allow = [ip_network(n) for n in ("10.0.0.0/8", "10.1.0.0/16", "10.2.3.0/24")]
    deny = [ip_network("10.2.0.0/16")]
    assert [str(r.network) for r in compile_rules(allow, deny)] == [
        "0.0.0.0/0",
        "10.0.0.0/8",
        "10.2.0.0/16",
        "10.2.3.0/24",
        "::/0",
    ]


def test_nothing_written_is_no_rule() -> None:
    assert compile_rules([], []) == ()
    assert digest(()) == 0


def test_equal_policies_are_equal() -> None:
    some = [ip_network("10.0.0.0/8"), ip_network("2001:db8::/32")]
    one, other = compile_rules(some, []), compile_rules(reversed(some), [])
    assert (one, digest(one)) == (other, digest(other))
    assert digest(compile_rules(some, [])) != digest(compile_rules([], some))


def test_both_allowed_and_denied_is_a_contradiction() -> None:
    both = ip_network("10.0.0.0/8")
    with pytest.raises(Contradiction) as caught:
        compile_rules([both], [both])
    assert caught.value.network == both


def test_entries_are_as_the_map_has_them() -> None:
    bits, addresses, allow = entries(compile_rules([ip_network("10.0.0.0/8")], []))
    assert bits.tolist() == [96, 104, 0]
    assert addresses[1].tobytes() == bytes(10) + b"\xff\xff\x0a" + bytes(3)
    assert allow.tolist() == [0, 1, 0]
