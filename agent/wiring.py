# SPDX-License-Identifier: Apache-2.0
"""Map nexthops, and which of them each backend points at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

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
        self._current: Mapping[IPAddress, NextHop | ShuntError] = {}
        # Of each next hop in use, by its identity: those behind one gateway are one object. It is
        # held beside its index, so that no other object can have the identity.
        self._known: dict[int, tuple[NextHop, int]] = {}
        for i in np.flatnonzero(self._records["ifindex"]).tolist():
            saddr = self._records["saddr"][i].tobytes()
            key = (
                int(self._records["ifindex"][i]) | int(self._records["tags"][i]) << 32,
                unmapped(self._records["addr"][i].tobytes()),
                unmapped(saddr) if any(saddr) else None,
            )
            self._index[key] = i
        self._ids = Ids("nexthops", len(self._records), self._index.values())

    def index_of(self, address: IPAddress) -> int:
        """What a backend's record is to point at."""
        hop = self._current.get(address)
        if not isinstance(hop, NextHop):
            return NO_NEXTHOP
        known = self._known.get(id(hop))
        return known[1] if known else self._index.get(hop.key, NO_NEXTHOP)

    def sync(
        self,
        current: Mapping[IPAddress, NextHop | ShuntError],
        changed: Iterable[IPAddress] | None = None,
    ) -> None:
        """Write what changed: for all addresses, or where it is known, of which.

        Next hops that no address has any more are freed.

        Raises: ShuntError if the map is full: then those without room use the FIB.
        """
        self._current = current
        hops = {id(hop): hop for hop in current.values() if isinstance(hop, NextHop)}
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
        self._known = {i: (hop, self._index.get(hop.key, NO_NEXTHOP)) for i, hop in hops.items()}
        self._point(self.tables.known() if changed is None else self.tables.at(changed))
        self._free(self._index.keys() - wanted.keys())
        if full is not None:
            raise full

    def _describe(self, i: int, hop: NextHop) -> None:
        """What stays as long as the element is this next hop."""
        self._words[i] = 0
        self._records["ifindex"][i] = hop.way & 0xFFFFFFFF
        self._records["tags"][i] = hop.way >> 32
        self._records["saddr"][i] = _raw(mapped(hop.saddr) if hop.saddr else bytes(16))
        self._records["addr"][i] = _raw(mapped(hop.via))

    def _write(self, i: int, hop: NextHop) -> None:
        if self._records["smac"][i].tobytes() != hop.smac:
            self._records["smac"][i] = _raw(hop.smac)
        dmac = int.from_bytes(hop.dmac or bytes(6), "little")
        word = dmac | hop.mtu << 48
        if self._words[i] != word:
            self._words[i] = word

    def _point(self, which: NDArray[np.bool_]) -> None:
        records = self.tables.backends
        ids = np.flatnonzero(which)
        wanted = [self.index_of(unmapped(raw.tobytes())) for raw in records["addr"][ids]]
        index = np.array(wanted, records["nexthop"].dtype)
        differ = records["nexthop"][ids] != index
        records["nexthop"][ids[differ]] = index[differ]

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
