# SPDX-License-Identifier: Apache-2.0
"""Map echo: the VIPs that answer echo requests, which is those with a backend that lives."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

import numpy as np

from shunt.agent.tables import Placed
from shunt.kern.maps import Map, Records
from shunt.lb.compile import Target, mapped, unmapped
from shunt.lb.model import IPAddress, Service


def answers(service: Service, vip: IPAddress, default: bool) -> bool:
    """Whether a VIP of a service answers. An address of this host's own does that anyway."""
    if any(vip in network for network in service.node):
        return False
    return default if service.echo is None else service.echo


class Echo:
    """The map, and who answers for which VIP. Of several services of a VIP one is enough."""

    def __init__(self, table: Map) -> None:
        self._table = table
        keys, values = table.items()
        self.there = {
            unmapped(key["vip"].tobytes()): int(value["svc"])
            for key, value in zip(keys, values, strict=True)
        }
        self._vips: dict[str, tuple[IPAddress, ...]] = {}  # for which a target answers
        self._by_vip: dict[IPAddress, tuple[str, ...]] = {}  # targets, by name

    def update(
        self,
        names: Iterable[str] | None,
        want: Mapping[str, Target],
        placed: Mapping[str, Placed],
        answers: Callable[[str, IPAddress], bool],
    ) -> int:
        """Bring the map to what these targets want now (None: all). Returns how many changed.

        `answers` says of a service whether it lets a VIP answer. The first target of a VIP, by
        name, is the one for which answers are counted.

        Raises: ShuntError if the map is full; some of the new ones may answer then.
        """
        touched: set[IPAddress] = set()
        if names is None:
            names = {*want, *self._vips}
            touched |= self.there.keys()
        for name in names:
            target, before = want.get(name), self._vips.pop(name, ())
            for vip in before:
                self._by_vip[vip] = tuple(n for n in self._by_vip[vip] if n != name)
            if target and any(m.up for m in target.members):
                service = name.rpartition("/")[0]
                vips = {f.vip for f in target.frontends}
                now = self._vips[name] = tuple(vip for vip in vips if answers(service, vip))
                for vip in now:
                    self._by_vip[vip] = tuple(sorted((*self._by_vip.get(vip, ()), name)))
                touched.update(now)
            touched.update(before)
        return self._sync(touched, placed)

    def _sync(self, touched: Iterable[IPAddress], placed: Mapping[str, Placed]) -> int:
        """How many changed."""
        gone: list[IPAddress] = []
        new: dict[IPAddress, int] = {}
        for vip in touched:
            who = self._by_vip.get(vip)
            svc = placed[who[0]].svc if who else None
            if not who:
                self._by_vip.pop(vip, None)
            if self.there.get(vip) == svc:
                continue
            if svc is None:
                gone.append(vip)
            else:
                new[vip] = svc
        if gone:
            self._table.delete_many(self._keys(gone))
            for vip in gone:
                del self.there[vip]
        if new:
            values = self._table.new_values(len(new))
            values["svc"] = list(new.values())
            self._table.update_many(self._keys(new), values)
            self.there |= new
        return len(gone) + len(new)

    def _keys(self, vips: Collection[IPAddress]) -> Records:
        keys = self._table.new_keys(len(vips))
        keys["vip"] = np.frombuffer(b"".join(map(mapped, vips)), np.uint8).reshape(-1, 16)
        return keys
