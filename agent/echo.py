# SPDX-License-Identifier: Apache-2.0
"""Map echo: the VIPs that answer echo requests, which is those with a backend that lives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from shunt.agent.tables import Placed
from shunt.kern.maps import Map, Records
from shunt.lb.compile import Target, mapped, unmapped
from shunt.lb.model import IPAddress


class Echo:
    """The map, and who answers for which VIP. Of several services of a VIP one is enough."""

    def __init__(self, table: Map) -> None:
        self._table = table
        keys, values = table.items()
        self.there = {
            unmapped(key["vip"].tobytes()): int(value["svc"])
            for key, value in zip(keys, values, strict=True)
        }
        self._vips: dict[str, frozenset[IPAddress]] = {}  # for which a target answers
        self._by_vip: dict[IPAddress, dict[str, int]] = defaultdict(dict)  # targets' service ids

    def update(
        self,
        names: Iterable[str] | None,
        want: Mapping[str, Target],
        placed: Mapping[str, Placed],
        answers: Callable[[str], bool],
    ) -> int:
        """Bring the map to what these targets want now (None: all). Returns how many changed.

        `answers` says of a service whether it lets its VIPs answer. The first target of a VIP, by
        name, is the one for which answers are counted.

        Raises: ShuntError if the map is full; some of the new ones may answer then.
        """
        touched: set[IPAddress] = set()
        if names is None:
            names = {*want, *self._vips}
            touched |= self.there.keys()
        for name in names:
            target, before = want.get(name), self._vips.pop(name, frozenset[IPAddress]())
            for vip in before:
                self._by_vip[vip].pop(name, None)
            if target and answers(name.rpartition("/")[0]) and any(m.up for m in target.members):
                now = self._vips[name] = frozenset(f.vip for f in target.frontends)
                for vip in now:
                    self._by_vip[vip][name] = placed[name].svc
                touched |= now
            touched |= before
        return sum(self._sync(vip) for vip in touched)

    def _sync(self, vip: IPAddress) -> bool:
        """Whether anything changed."""
        who = self._by_vip.get(vip)
        svc = who[min(who)] if who else None
        if not who:
            self._by_vip.pop(vip, None)
        if self.there.get(vip) == svc:
            return False
        key = self._key(vip)
        if svc is None:
            self._table.delete(key)
            del self.there[vip]
        else:
            value = self._table.new_values(1)
            value["svc"] = svc
            self._table.update(key, value)
            self.there[vip] = svc
        return True

    def _key(self, vip: IPAddress) -> Records:
        key = self._table.new_keys(1)
        key["vip"] = np.frombuffer(mapped(vip), np.uint8)
        return key
