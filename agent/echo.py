# SPDX-License-Identifier: Apache-2.0
"""Map echo: the VIPs with a backend that lives, and whether they answer echo requests."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

import numpy as np

from shunt.agent.tables import Placed
from shunt.kern.maps import Map, Records
from shunt.lb.compile import Target, mapped, unmapped
from shunt.lb.model import IPAddress, Service, Settings

AT_TC = 1 << 30  # VIP_AT_TC of bpf/abi.h; a test compares


def answers(service: Service, vip: IPAddress, default: bool) -> bool | None:
    """Whether a VIP of a service answers. None: an address of this host's own, which the stack
    answers for, and which has fragments of the host's own."""
    if any(vip in network for network in service.node):
        return None
    return default if service.echo is None else service.echo


def decides(settings: Settings) -> tuple[bool, bool]:
    """What the map hangs on of the node's settings."""
    return settings.echo, settings.xdp_mode == "off"


class Said(NamedTuple):
    """By a target, of a VIP of its own."""

    name: str
    answers: bool
    at_tc: bool  # its packets are TC's


class Echo:
    """The map, and who answers for which VIP. Of several services of a VIP one is enough."""

    def __init__(self, table: Map) -> None:
        self._table = table
        keys, values = table.items()
        self.there = {
            unmapped(key["vip"].tobytes()): int(value["svc"])
            for key, value in zip(keys, values, strict=True)
        }
        self._vips: dict[str, tuple[IPAddress, ...]] = {}  # by target
        self._by_vip: dict[IPAddress, tuple[Said, ...]] = {}  # in the order of names

    def update(
        self,
        names: Iterable[str] | None,
        want: Mapping[str, Target],
        placed: Mapping[str, Placed],
        answers: Callable[[str, IPAddress], bool | None],
        at_tc: Callable[[Target], bool] = lambda _target: False,
    ) -> int:
        """Bring the map to what these targets want now (None: all). Returns how many changed.

        `answers` says of a service whether it lets a VIP answer; None: it is not in the map. The
        first target of a VIP that does, by name, is the one for which answers are counted.

        Raises: ShuntError if the map is full; some of the new ones may answer then.
        """
        touched: set[IPAddress] = set()
        if names is None:
            names = {*want, *self._vips}
            touched |= self.there.keys()
        for name in names:
            target, before = want.get(name), self._vips.pop(name, ())
            for vip in before:
                self._by_vip[vip] = tuple(s for s in self._by_vip[vip] if s.name != name)
            if target and any(m.up for m in target.members):
                service = name.rpartition("/")[0]
                does = {f.vip: answers(service, f.vip) for f in target.frontends}
                here = {vip: bool(does[vip]) for vip in does if does[vip] is not None}
                self._vips[name] = tuple(here)
                for vip, answer in here.items():
                    said = Said(name, answer, at_tc(target))
                    self._by_vip[vip] = tuple(sorted((*self._by_vip.get(vip, ()), said)))
                touched.update(here)
            touched.update(before)
        return self._sync(touched, placed)

    def _sync(self, touched: Iterable[IPAddress], placed: Mapping[str, Placed]) -> int:
        """How many changed."""
        gone: list[IPAddress] = []
        new: dict[IPAddress, int] = {}
        for vip in touched:
            said = self._by_vip.get(vip)
            svc = None
            if said:
                first = next((s.name for s in said if s.answers), None)
                svc = placed[first].svc if first else 0
                svc |= AT_TC if any(s.at_tc for s in said) else 0
            else:
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
