# SPDX-License-Identifier: Apache-2.0
"""Masquerading, pure: whose source is replaced, towards whom not, and by which address."""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import ip_network

from shunt.kern.netlink import InterfaceAddress
from shunt.lb.model import IPAddress, IPNetwork

SOURCE, NOT_TO = 1, 2  # enum masq_net of bpf/abi.h; a test compares

# Nobody else's address is there: what is sent there is for many, or for this link.
_NEVER_TO = tuple(map(ip_network, ("224.0.0.0/4", "255.255.255.255/32", "ff00::/8")))


def kinds(sources: Iterable[IPNetwork], not_to: Iterable[IPNetwork]) -> dict[IPNetwork, int]:
    """What holds for addresses, by the longest prefix that they are in: SOURCE, NOT_TO, both."""
    of_kind: tuple[tuple[int, tuple[IPNetwork, ...]], ...] = (
        (SOURCE, tuple(sources)),
        (NOT_TO, (*not_to, *_NEVER_TO)),
    )
    prefixes = {network for _, networks in of_kind for network in networks}
    return {prefix: _kinds_of(prefix, of_kind) for prefix in prefixes}


def _kinds_of(prefix: IPNetwork, of_kind: Iterable[tuple[int, Iterable[IPNetwork]]]) -> int:
    found = 0
    for kind, networks in of_kind:
        if any(_is_part(prefix, network) for network in networks):
            found |= kind
    return found


def _is_part(small: IPNetwork, large: IPNetwork) -> bool:
    return small.prefixlen >= large.prefixlen and small.overlaps(large)


def source_of(
    addresses: Iterable[InterfaceAddress], ifindex: int, version: int
) -> IPAddress | None:
    """This host's address on a device, as others see it. Shape: in the kernel's order, of which
    the first primary one counts, as it does for the kernel."""
    for found in addresses:
        address = found.address
        if (
            (found.ifindex, address.version) == (ifindex, version)
            and found.usable
            and found.primary
            and not (address.is_link_local or address.is_loopback)
        ):
            return address
    return None
