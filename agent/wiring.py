# SPDX-License-Identifier: Apache-2.0
"""Map nexthops, and which of them each backend points at."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from shunt.agent.nexthops import NextHop, shared
from shunt.agent.tables import Tables
from shunt.lb.compile import mapped, unmapped
from shunt.lb.errors import ShuntError
from shunt.lb.model import IPAddress
from shunt.lb.pools import Ids

Key = tuple[int, IPAddress, IPAddress | None]
NO_NEXTHOP = 0  # the program asks the FIB


class Wiring:
    """Keeps the next hops in the maps as netlink tells them."""

    def __init__(self, tables: Tables, grace: Callable[[], None]) -> None:
        self.tables, self.grace = tables, grace
        self._records = tables.nexthops
        # dmac and mtu, which change together: one store.
        self._words: NDArray[np.uint64] = self._records.view(np.uint64).reshape(
            len(self._records), -1
        )[:, 0]
        self._index: dict[Key, int] = {}
        self._by_address: dict[IPAddress, int] = {}
        for i in np.flatnonzero(self._records["ifindex"]).tolist():
            saddr = self._records["saddr"][i].tobytes()
            key = (
                int(self._records["ifindex"][i]),
                unmapped(self._records["addr"][i].tobytes()),
                unmapped(saddr) if any(saddr) else None,
            )
            self._index[key] = i
        self._ids = Ids("nexthops", len(self._records), self._index.values())

    def index_of(self, address: IPAddress) -> int:
        """What a backend's record is to point at."""
        return self._by_address.get(address, NO_NEXTHOP)

    def sync(self, current: Mapping[IPAddress, NextHop | ShuntError]) -> None:
        """Write what changed. Next hops that no address has any more are freed.

        Raises: ShuntError if the map is full: then those without room use the FIB.
        """
        hops = {a: h for a, h in current.items() if isinstance(h, NextHop)}
        wanted = shared(hops.values())
        full: ShuntError | None = None
        for key, hop in wanted.items():
            if key not in self._index:
                try:
                    self._index[key] = self._ids.take()
                except ShuntError as e:
                    full = e
                    continue
                self._describe(self._index[key], hop)
            self._write(self._index[key], hop)
        self._by_address = {a: self._index.get(h.key, NO_NEXTHOP) for a, h in hops.items()}
        self._point()
        self._free(set(self._index) - set(wanted))
        if full is not None:
            raise full

    def _describe(self, i: int, hop: NextHop) -> None:
        """What stays as long as the element is this next hop."""
        self._words[i] = 0
        self._records["ifindex"][i] = hop.ifindex
        self._records["saddr"][i] = _raw(mapped(hop.saddr) if hop.saddr else bytes(16))
        self._records["addr"][i] = _raw(mapped(hop.via))

    def _write(self, i: int, hop: NextHop) -> None:
        if self._records["smac"][i].tobytes() != hop.smac:
            self._records["smac"][i] = _raw(hop.smac)
        dmac = int.from_bytes(hop.dmac or bytes(6), "little")
        word = dmac | hop.mtu << 48
        if self._words[i] != word:
            self._words[i] = word

    def _point(self) -> None:
        records = self.tables.backends
        for place in self.tables.placed.values():
            for endpoint, i in place.backends.items():
                index = self.index_of(endpoint.address)
                if records["nexthop"][i] != index:
                    records["nexthop"][i] = index

    def _free(self, keys: set[Key]) -> None:
        if not keys:
            return
        self.grace()  # no program uses what nothing points at any more
        for key in keys:
            i = self._index.pop(key)
            self._words[i] = 0
            self._records["ifindex"][i] = 0
            self._ids.release([i])


def _raw(data: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(data, np.uint8)
