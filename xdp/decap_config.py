# SPDX-License-Identifier: Apache-2.0
"""What a decap program is told: sources and addresses, to and from struct decap_config."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

import numpy as np

from shunt.lb.compile import mapped
from shunt.lb.errors import ShuntError
from shunt.lb.model import IPAddress, Settings

Network = IPv4Network | IPv6Network


def default_sources() -> tuple[Network, ...]:
    """Where the load balancers' outer headers come from, unless configured otherwise."""
    settings = Settings(interfaces=())
    return settings.ipip_source4, settings.ipip_source6


def prefixes(sources: Iterable[Network | str]) -> tuple[Network, ...]:
    """Raises: ShuntError."""
    found = []
    for source in sources:
        try:
            found.append(ip_network(source))
        except ValueError as error:
            raise ShuntError(
                f"{source} is not a prefix to accept packets from",
                str(error),
                "give the load balancers' `ipip` sources, such as 198.18.0.0/16 or 100::/64",
            ) from error
    return tuple(found)


def own_addresses(addresses: Iterable[IPAddress | str]) -> tuple[IPAddress, ...]:
    """Each once. Raises: ShuntError."""
    found = []
    for address in addresses:
        try:
            found.append(ip_address(address))
        except ValueError as error:
            raise ShuntError(
                f"{address} is not an address of this host",
                str(error),
                "give those that the services listen on, each by --address",
            ) from error
    return tuple(dict.fromkeys(found))


def configure(
    config: Any, sources: tuple[Network, ...], addresses: tuple[IPAddress, ...] = ()
) -> None:
    """Fill struct decap_config.

    Raises: ShuntError if there are more sources or addresses than it holds.
    """
    for version in (4, 6):
        chosen = [source for source in sources if source.version == version]
        own = [address for address in addresses if address.version == version]
        rows = config[f"source{version}"]
        for what, given in (("sources", chosen), ("addresses", own)):
            if len(given) > len(rows):
                raise ShuntError(
                    f"{len(given)} IPv{version} {what} are too many",
                    f"the program compares each packet with {len(rows)} at most",
                    "give fewer, larger prefixes" if given is chosen else "give fewer",
                )
        for i, address in enumerate(own):
            config[f"address{version}"][i] = np.frombuffer(mapped(address), np.uint8)
        config[f"own{version}"] = len(own)
        for row, source in zip(rows, chosen, strict=False):
            row["addr"] = np.frombuffer(mapped(source.network_address), np.uint8)
            row["mask"] = np.frombuffer(mapped(source.netmask), np.uint8)
        config[f"count{version}"] = len(chosen)


def read_sources(config: Any) -> Iterator[Network]:
    """The inverse of configure, of the sources."""
    for version, size in ((4, 4), (6, 16)):
        for row in config[f"source{version}"][: int(config[f"count{version}"])]:
            ones = sum(int(byte).bit_count() for byte in row["mask"][16 - size :])
            address = IPv6Address(row["addr"].tobytes())
            yield ip_network((address.ipv4_mapped or address, ones))


def read_addresses(config: Any) -> Iterator[IPAddress]:
    """The same of the addresses."""
    for version in (4, 6):
        for raw in config[f"address{version}"][: int(config[f"own{version}"])]:
            address = IPv6Address(raw.tobytes())
            yield address.ipv4_mapped or address
