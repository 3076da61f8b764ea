# SPDX-License-Identifier: Apache-2.0
"""Source ranges of a service: from what is allowed and denied to the entries of map sources.

The longest prefix that a client's address is in decides. What is in none is denied if anything is
allowed, and allowed if not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Network, IPv6Network

import numpy as np
from numpy.typing import NDArray

from shunt.lb.model import IPNetwork, SourceRule

MAPPED_BITS = 96  # of an IPv4 address in IPv6 form before its own
Allowed = NDArray[np.uint32]
EVERYTHING: tuple[IPNetwork, ...] = (IPv4Network("0.0.0.0/0"), IPv6Network("::/0"))


class Contradiction(ValueError):
    """A network is both allowed and denied."""

    def __init__(self, network: IPNetwork) -> None:
        super().__init__(str(network))
        self.network = network


def compile_rules(allow: Iterable[IPNetwork], deny: Iterable[IPNetwork]) -> tuple[SourceRule, ...]:
    """The fewest rules that say the same, one for all of each family among them; none if empty.

    Shape: sorted, so that equal policies are equal.
    Raises: Contradiction.
    """
    verdicts: dict[IPNetwork, bool] = {}
    for networks, verdict in ((allow, True), (deny, False)):
        for network in networks:
            if verdicts.setdefault(network, verdict) is not verdict:
                raise Contradiction(network)
    if not verdicts:
        return ()
    otherwise = not any(verdicts.values())
    for network in EVERYTHING:
        verdicts.setdefault(network, otherwise)
    kept: dict[IPNetwork, bool] = {}
    for network in sorted(verdicts, key=lambda n: n.prefixlen):
        if not network.prefixlen or _nearest(network, kept) is not verdicts[network]:
            kept[network] = verdicts[network]
    rules = (SourceRule(network, verdict) for network, verdict in kept.items())
    return tuple(sorted(rules, key=lambda r: (r.network.version, r.network)))


def _nearest(network: IPNetwork, kept: dict[IPNetwork, bool]) -> bool:
    """What holds for the network because of a larger one."""
    for _ in range(network.prefixlen):
        network = network.supernet()
        if network in kept:
            return kept[network]
    raise AssertionError("everything is kept first")


def entries(rules: Sequence[SourceRule]) -> tuple[NDArray[np.uint32], NDArray[np.uint8], Allowed]:
    """As map sources has them. Shape: (prefix bits, (n, 16) address bytes, allow), a row each."""
    bits = np.zeros(len(rules), np.uint32)
    addresses = np.zeros((len(rules), 16), np.uint8)
    for n, (network, _) in enumerate(rules):
        raw = network.network_address.packed
        mapped = bytes(10) + b"\xff\xff" + raw if network.version == 4 else raw
        bits[n] = network.prefixlen + (MAPPED_BITS if network.version == 4 else 0)
        addresses[n] = np.frombuffer(mapped, np.uint8)
    return bits, addresses, np.array([rule.allow for rule in rules], np.uint32)


def digest(rules: Sequence[SourceRule]) -> int:
    """Of 64 bits, equal for equal rules; 0 for none."""
    if not rules:
        return 0
    text = "\n".join(f"{rule.network} {rule.allow}" for rule in rules)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") | 1
