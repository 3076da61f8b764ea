# SPDX-License-Identifier: Apache-2.0
"""Maps masq and masq_nets: which devices lead out of the node, and who is masqueraded there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from shunt.agent.troubles import Troubles
from shunt.ipam.masquerade import SOURCE, kinds, source_of
from shunt.kern.maps import Map
from shunt.kern.netlink import InterfaceAddress
from shunt.lb.compile import mapped
from shunt.lb.errors import ShuntError
from shunt.lb.model import IPNetwork, Masquerade


class Masquerading:
    """The maps, brought to what is wanted. `troubles` belongs to whoever shows it."""

    def __init__(self, maps: Mapping[str, Map], troubles: Troubles) -> None:
        self._devices, self._nets = maps["masq"], maps["masq_nets"]
        self._troubles = troubles

    def sync(
        self,
        wanted: Masquerade | None,
        ifindexes: Mapping[str, int],
        addresses: Iterable[InterfaceAddress],
    ) -> None:
        """`ifindexes` are of all interfaces, `addresses` those of this host."""
        own = {
            ifindexes[name]: {ip: source_of(addresses, ifindexes[name], ip) for ip in (4, 6)}
            for name in (wanted.interfaces if wanted else ())
            if name in ifindexes
        }
        keys, _ = self._devices.items()
        self._devices.delete_many(keys[~np.isin(keys["ifindex"], list(own))])
        # First who is left alone: nobody is masqueraded that should not be, not for a moment.
        nets = kinds(wanted.sources, wanted.not_to) if wanted else {}
        ordered = sorted(nets.items(), key=lambda item: item[1] & SOURCE)
        self._write_nets(dict(ordered))
        for ifindex, found in own.items():
            key, value = self._devices.new_keys(1), self._devices.new_values(1)
            key["ifindex"] = ifindex
            for ip, address in found.items():
                if address is not None:
                    value[f"saddr{ip}"] = np.frombuffer(mapped(address), np.uint8)
            self._devices.update(key[0], value[0])
        lacking = _lacking(wanted, ifindexes, own) if wanted else None
        self._troubles.tell("masquerade", lacking)

    def _write_nets(self, nets: Mapping[IPNetwork, int]) -> None:
        new = self._nets.new_keys(len(nets))
        values = self._nets.new_values(len(nets))
        for i, (network, kind) in enumerate(nets.items()):
            new[i]["prefix_bits"] = network.prefixlen + (96 if network.version == 4 else 0)
            new[i]["addr"] = np.frombuffer(mapped(network.network_address), np.uint8)
            values[i]["kinds"] = kind
        for key, value in zip(new, values, strict=True):
            self._nets.update(key, value)
        kept = {key.tobytes() for key in new}
        for key in self._nets.items()[0]:
            if key.tobytes() not in kept:
                self._nets.delete(key)


def _lacking(
    wanted: Masquerade, ifindexes: Mapping[str, int], own: Mapping[int, Mapping[int, object]]
) -> ShuntError | None:
    """The last interface that has no address to masquerade with."""
    found: ShuntError | None = None
    # A node of one family has no use for the other's.
    families = {network.version for network in wanted.sources}
    for name in wanted.interfaces:
        has = own.get(ifindexes.get(name, 0), {})
        lacking = [f"IPv{ip}" for ip in families if not has.get(ip)]
        if lacking or not any(has.values()):
            found = ShuntError(
                f"{name} has no {' and no '.join(sorted(lacking)) or 'IP'} address",
                "new connections that leave by it are refused: nothing could be masqueraded",
                f"give it an address (`ip addr add ... dev {name}`)",
            )
    return found
