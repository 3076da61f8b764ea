# SPDX-License-Identifier: Apache-2.0
"""This host's own addresses as they are written: `node/NETWORK` as a service's vip."""

from __future__ import annotations

from collections import defaultdict
from itertools import product
from typing import Generic, TypeVar

from shunt.ipam.node import overlap
from shunt.lb.model import ANY_PORT, IPNetwork, Mode, Port, Service

from . import values
from .shape import ServiceEntry
from .typed import Path, Reader, each

PREFIX = "node/"

Owner = TypeVar("Owner")


def networks_of(reader: Reader, path: Path, entry: ServiceEntry) -> dict[IPNetwork, Path]:
    """Of which addresses of this host are VIPs; what is refused is noted and left out."""
    found: dict[IPNetwork, Path] = {}
    for where, text in each((*path, "vip"), entry.vip):
        if not text.startswith(PREFIX):
            continue
        try:
            network = values.node_network(text.removeprefix(PREFIX))
        except values.Refused as error:
            reader.refuse(where, error.what, error.wants, error.fix)
            continue
        if other := next((n for n in found if overlap(n, network)), None):
            why = f"{other} at {reader.place(found[other])} has addresses of it"
            reader.error(where, f"node network {network} overlaps", why, "remove one of the two")
        found.setdefault(network, where)
    return found


def check(
    reader: Reader, networks: dict[IPNetwork, Path], mode: Mode | None, ports: tuple[Port, ...]
) -> None:
    """What cannot be on an address that this host has itself. A mode of None is not known."""
    for network, where in networks.items():
        if mode is not None and not mode.translates:
            what = f"{PREFIX}{network} in mode {mode}"
            why = "its backends would need this host's own addresses for their answers"
            reader.error(where, what, why, "use mode: nat, or mode: local for backends here")
        if any(port.port == ANY_PORT for port in ports):
            what = f"{PREFIX}{network} with every port"
            why = "this host could not be reached itself any more"
            reader.error(where, what, why, "list the ports")


class NodePorts(Generic[Owner]):
    """Who has which ports of this host's addresses, as services are looked at one by one."""

    def __init__(self) -> None:
        self._taken: dict[Port, list[tuple[IPNetwork, Owner]]] = defaultdict(list)

    def clash(self, service: Service) -> tuple[Port, IPNetwork, Owner] | None:
        """A port and network that could mean an address which another has, and that other."""
        for network, port in product(service.node, service.ports):
            for taken, owner in self._taken.get(port, ()):
                if overlap(network, taken):
                    return port, network, owner
        return None

    def add(self, service: Service, owner: Owner) -> None:
        """`owner` has its ports, then."""
        for network, port in product(service.node, service.ports):
            self._taken[port].append((network, owner))
