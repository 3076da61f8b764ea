# SPDX-License-Identifier: Apache-2.0
"""From what the maps hold to what they should: ordered writes. Decides; writes nothing.

Every prefix of a plan is safe to stop at: what a write refers to is there before it, and what it
takes away is no longer referred to. Ids and regions are taken from their pools while planning; if
the plan cannot be made (a full table), they are given back and nothing has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from ipaddress import IPv6Address

import numpy as np
from numpy.typing import NDArray

from shunt.agent.options import DropSources, PutSources, ask
from shunt.agent.quic import DropServerId, PutServerId
from shunt.agent.tables import NO_REGION, Placed, Tables
from shunt.agent.writes import (
    ClearBackend,
    ClearService,
    DropFrontend,
    GiveRegion,
    Grace,
    NameService,
    NewRegion,
    PatchSlots,
    PutBackend,
    PutFrontend,
    PutService,
    SetBackend,
    Write,
    WriteRegion,
)
from shunt.lb import slots as slot
from shunt.lb.compile import Condition, Endpoint, Member, Target, shares
from shunt.lb.errors import ShuntError
from shunt.lb.model import Frontend, Protocol
from shunt.lb.pools import full

# Referents before referrers. What is alike stands together, and can be written together.
_ORDER = (
    (NameService,),
    (PutBackend, SetBackend),
    (PutSources, PutServerId),
    (NewRegion, WriteRegion, PatchSlots),
    (PutService,),
    (PutFrontend,),
)
_RANK: dict[type, int] = {kind: rank for rank, kinds in enumerate(_ORDER) for kind in kinds}


@dataclass
class _Draft:
    """Writes in the order in which they must be done, and what to give back on failure."""

    going_in: list[Write] = field(default_factory=list)
    # Of services that nobody serves any more: what leads there goes to other services first.
    emptying: list[Write] = field(default_factory=list)
    closing: list[Write] = field(default_factory=list)
    dropping: list[Write] = field(default_factory=list)
    after: list[Write] = field(default_factory=list)
    service_ids: list[int] = field(default_factory=list)
    backend_ids: list[int] = field(default_factory=list)
    regions: list[tuple[int, int]] = field(default_factory=list)

    def writes(self) -> list[Write]:
        """The plan."""
        self.going_in.sort(key=lambda write: _RANK[type(write)])
        waiting: list[Write] = [Grace(), *self.after] if self.after or self.dropping else []
        return [*self.going_in, *self.emptying, *self.closing, *self.dropping, *waiting]


class Planner:
    """Plans against one set of tables."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables

    def plan(
        self,
        want: Mapping[str, Target],
        now_ns: int,
        condition: Callable[[str, Endpoint], Condition],
        only: Iterable[str] | None = None,
        gone: Callable[[str, Endpoint], bool] = lambda _name, _endpoint: False,
    ) -> list[Write]:
        """Writes that turn what the maps hold into `want`; all targets, or those of `only`.

        With `only`, `want` may leave the others out, and nothing is done for each of them.

        `condition` tells of endpoints that are no longer configured; `gone` which of those have
        nothing left to lose.

        Raises: ShuntError if a table is too small. Nothing has changed then.
        """
        t = self.tables
        draft = _Draft()
        names = {*want, *t.placed} if only is None else set(only)
        try:
            self._check_room(want, names)
            for name in sorted(names):
                if name in want:
                    self._place(want[name], draft, now_ns, condition, gone)
            for name in sorted(names):
                if name in t.placed and name not in want:
                    self._remove(t.placed[name], draft)
        except ShuntError:
            t.service_ids.release(draft.service_ids)
            t.backend_ids.release(draft.backend_ids)
            for region in draft.regions:
                t.regions.give(*region)
            raise
        if only is None:
            owned = {f for target in want.values() for f in target.frontends}
            for frontend in t.stale_frontends:
                if frontend not in owned:
                    draft.dropping.append(DropFrontend(frontend, ""))
            in_use = {t.source_set(place.svc) for place in t.placed.values()}
            draft.after += [DropSources(i) for i in sorted(t.source_sets.there - in_use)]
            services = {place.svc for place in t.placed.values()} | set(draft.service_ids)
            for svc in sorted(t.server_ids.there.keys() - services):  # a crash left them
                self._drop_server_ids(svc, draft)
        self._move_frontends(draft)
        return draft.writes()

    def _check_room(self, want: Mapping[str, Target], names: Collection[str]) -> None:
        t = self.tables
        used = len(t.frontends) - len(t.stale_frontends)
        for name in names:
            used -= len(t.placed[name].frontends) if name in t.placed else 0
            used += len(want[name].frontends) if name in want else 0
        if used > t.frontends.capacity:
            raise full("frontends", t.frontends.capacity)
        sources = sum(len(want[name].options.sources) for name in names if name in want)
        if sources:
            others = [t.source_set(p.svc) for p in t.placed.values() if p.name not in names]
            sources += int(np.isin(t.maps["sources"].items()[0]["set"], others).sum())
            if sources > t.maps["sources"].spec.entries:
                raise full("sources", t.maps["sources"].spec.entries)
        new = 0  # server ids, which come before old ones go
        for name in names:
            if name in want and want[name].options.quic:
                known = t.server_ids.of(t.placed[name].svc) if name in t.placed else {}
                new += sum(member.server_id not in known for member in want[name].members)
        if new and len(t.server_ids) + new > t.server_ids.capacity:
            raise full("server_ids", t.server_ids.capacity)

    def _place(
        self,
        target: Target,
        draft: _Draft,
        now_ns: int,
        condition: Callable[[str, Endpoint], Condition],
        gone: Callable[[str, Endpoint], bool],
    ) -> None:
        t = self.tables
        place = t.placed.get(target.name)
        if place is None:
            svc = t.service_ids.take()
            draft.service_ids.append(svc)
            place = Placed(svc, target.name)
            draft.going_in.append(NameService(svc, target.name))
        ids = [self._member(target, place, member, draft) for member in target.members]
        leaving: list[Endpoint] = []
        if place.backends:
            staying = {member.endpoint for member in target.members}
            leaving = [endpoint for endpoint in place.backends if endpoint not in staying]
        self._server_ids(target, place, ids, draft)
        self._slots(target, place, ids, draft, now_ns)
        for frontend in _ordered(target.frontends - place.frontends):
            draft.going_in.append(PutFrontend(frontend, target.name, place.svc))
        for frontend in _ordered(place.frontends - target.frontends):
            draft.dropping.append(DropFrontend(frontend, target.name))
        for endpoint in leaving:
            self._leave(target, place, endpoint, draft, condition, gone)

    def _member(self, target: Target, place: Placed, member: Member, draft: _Draft) -> int:
        """Its id."""
        t, flag = self.tables, self.tables.flag
        flags = flag.known | (flag.up if member.up else 0) | (flag.drained if member.drained else 0)
        if isinstance(member.endpoint.address, IPv6Address):
            flags |= flag.ipv6
        i = place.backends.get(member.endpoint) if place.backends else None
        if i is None:
            i = t.backend_ids.take()
            draft.backend_ids.append(i)
            draft.going_in.append(
                PutBackend(target.name, place.svc, member.endpoint, i, flags, member.override)
            )
        elif (t.backends["flags"][i], t.backends["weight"][i]) != (flags, member.override):
            # Who takes no more new flows loses its slots first: as long as a slot names it, a
            # socket that draws that slot would have to look for another one.
            closes = not member.takes_new_flows and self._is_open(i)
            writes = draft.closing if closes else draft.going_in
            writes.append(SetBackend(i, flags, member.override))
        return i

    def _is_open(self, backend: int) -> bool:
        """Whether it takes new flows, as far as the maps tell."""
        flag, flags = self.tables.flag, int(self.tables.backends["flags"][backend])
        return bool(flags & flag.up) and not flags & (flag.drained | flag.removed)

    def _server_ids(self, target: Target, place: Placed, ids: Sequence[int], draft: _Draft) -> None:
        have = self.tables.server_ids.of(place.svc)
        want: dict[bytes, int] = {}
        if target.options.quic:
            want = {m.server_id: i for m, i in zip(target.members, ids, strict=True)}
        for server_id, i in want.items():
            if have.get(server_id) != i:
                draft.going_in.append(PutServerId(place.svc, server_id, i))
        for server_id in have.keys() - want.keys():
            draft.dropping.append(DropServerId(place.svc, server_id))

    def _drop_server_ids(self, svc: int, draft: _Draft) -> None:
        draft.dropping += [DropServerId(svc, i) for i in self.tables.server_ids.of(svc)]

    def _leave(
        self,
        target: Target,
        place: Placed,
        endpoint: Endpoint,
        draft: _Draft,
        condition: Callable[[str, Endpoint], Condition],
        gone: Callable[[str, Endpoint], bool],
    ) -> None:
        """A backend out of the configuration: connections may end in peace, UDP moves at once."""
        t, flag = self.tables, self.tables.flag
        i = place.backends[endpoint]
        if not target.protocol.connects or gone(target.name, endpoint):
            draft.after.append(ClearBackend(target.name, endpoint, i))
            return
        flags = int(t.backends["flags"][i]) | flag.removed
        flags = flags | flag.up if condition(target.name, endpoint).up else flags & ~flag.up
        if flags != t.backends["flags"][i]:
            draft.after.append(SetBackend(i, flags, int(t.backends["weight"][i])))

    def _slots(
        self,
        target: Target,
        place: Placed,
        ids: Sequence[int],
        draft: _Draft,
        now_ns: int,
    ) -> None:
        t = self.tables
        asked = ask(t, target, place.svc, in_force=place.log2 != NO_REGION)
        draft.going_in += asked.before
        draft.after += asked.after
        owner_ids, table = shares(target, ids)
        first, log2 = place.first, place.log2
        emptied = log2 != NO_REGION and not owner_ids.any()
        writes = draft.emptying if emptied else draft.going_in
        if log2 == NO_REGION:
            log2 = target.log2
            first = self._take_region(log2, draft)
            compact = table.astype(np.uint8 if len(owner_ids) <= 256 else np.uint32)
            draft.going_in.append(NewRegion(first, owner_ids, compact))
        else:
            table = owner_ids[table]
            words, times = t.words[place.slots()], t.changed[place.slots()]
            shrink = log2 > target.log2 and slot.may_shrink(words, log2 - target.log2)
            if log2 < target.log2 or shrink:
                log2 = target.log2
                first = self._take_region(log2, draft)
                words, times = slot.resize(words, log2), slot.resize(times, log2)
                words, moved = self._retable(target, place, words, table)
                times = np.where(moved, np.uint64(now_ns), times)
                writes.append(WriteRegion(first, words, times))
                draft.after.append(GiveRegion(place.first, place.log2, target.name))
            else:
                table = np.repeat(table, 1 << (log2 - target.log2))
                words, moved = self._retable(target, place, words, table)
                index = np.flatnonzero(moved)
                if len(index):
                    writes.append(PatchSlots(target.name, index, words[index], now_ns))
        service = PutService(
            target.name, place.svc, first, log2, target.mode.name, target.protocol,
            target.idle_ns, asked.flags, asked.record,
        )  # fmt: skip
        if service != self._service(place):
            writes.append(service)

    def _service(self, place: Placed) -> PutService | None:
        record = self.tables.svc[place.svc]
        if not record["mode"]:
            return None
        mode = self.tables.modes(int(record["mode"])).name
        return PutService(
            place.name, place.svc, place.first, place.log2, mode,
            Protocol(int(record["proto"])), int(record["idle_ns"]),
            int(record["flags"]), self.tables.svc_options[place.svc].tobytes(),
        )  # fmt: skip

    def _retable(
        self, target: Target, place: Placed, words: slot.Words, table: NDArray[np.integer]
    ) -> tuple[slot.Words, slot.Mask]:
        if target.mode.translates:  # its flows are all remembered: slots need no past
            after = slot.settled(table)
            return after, after != words
        found, moved = slot.retable(words, table)
        had_affinity = self.tables.svc["flags"][place.svc] & self.tables.svc_flag["AFFINITY"]
        if had_affinity and not target.options.affinity_ns:
            # Its flows may be elsewhere than their slots say: they are looked up until they end.
            loose = slot.state(found) == slot.State.SETTLED
            found, moved = np.where(loose, slot.linger(found), found), moved | loose
        return found, moved

    def _take_region(self, log2: int, draft: _Draft) -> int:
        first = self.tables.regions.take(log2)
        draft.regions.append((first, log2))
        return first

    def _remove(self, place: Placed, draft: _Draft) -> None:
        for frontend in _ordered(place.frontends):
            draft.dropping.append(DropFrontend(frontend, place.name))
        self._drop_server_ids(place.svc, draft)
        draft.after.append(ClearService(place.name, place.svc))
        for endpoint, i in place.backends.items():
            draft.after.append(ClearBackend(place.name, endpoint, i))
        if place.log2 != NO_REGION:
            draft.after.append(GiveRegion(place.first, place.log2))
        if sources_of := self.tables.source_set(place.svc):
            draft.after.append(DropSources(sources_of))

    def _move_frontends(self, draft: _Draft) -> None:
        """A frontend that goes from one service to another is replaced, never absent."""
        dropped = {w.frontend: w for w in draft.dropping if isinstance(w, DropFrontend)}
        for n, write in enumerate(draft.going_in) if dropped else ():
            if isinstance(write, PutFrontend) and (old := dropped.get(write.frontend)):
                draft.dropping.remove(old)
                draft.going_in[n] = PutFrontend(
                    write.frontend, write.name, write.svc, replaces=old.name
                )


def _ordered(frontends: Set[Frontend]) -> Collection[Frontend]:
    """In an order that is always the same."""
    return sorted(frontends, key=str) if len(frontends) > 1 else frontends
