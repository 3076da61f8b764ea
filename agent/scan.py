# SPDX-License-Identifier: Apache-2.0
"""The scan: ages remembered flows, finds what still differs, and lets slots settle.

One round reads the flow maps in batches, so that it can be spread over time. A slot passes from
moving to lingering before a round, and from lingering to settled after one that began later and
found no exception in it: by then no program runs that saw it moving, so nothing can have been
inserted behind the scan's back.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shunt.agent.nat_expiry import (
    MARGIN_NS,
    NOBODYS,
    SHORT_IDLE_NS,
    idle_of_nobodys,
    judge_nat,
)
from shunt.agent.nat_ports import PortUse
from shunt.agent.tables import Placed, Tables
from shunt.kern import flows as flowtable
from shunt.kern.memory import sparse
from shunt.kern.rcu import synchronize
from shunt.lb import slots as slot
from shunt.lb.compile import Target

# Of map flows' lines, read at a time.
FLOW_LINES = 1 << 16
_ID = np.uint64(0xFFFFFFFF)


@dataclass
class Round:
    """What one round has found."""

    began_ns: int
    regions: dict[str, tuple[int, int]]  # of the targets with slots not settled
    flows: int = 0
    clients: int = 0  # of services with affinity
    exceptions: int = 0
    nat: int = 0
    ports: PortUse = field(default_factory=PortUse)
    deleted: int = 0
    busy: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))
    named: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, np.bool_))


class Scanner:
    """Rounds over one set of tables."""

    def __init__(self, tables: Tables, grace: Callable[[], None] = synchronize) -> None:
        self.tables, self.grace = tables, grace
        self.last: Round | None = None

    def run(self, want: Mapping[str, Target], now_ns: int) -> Round:
        """A whole round at once; for tests and small tables."""
        steps = self.steps(want, lambda: now_ns)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                found: Round = end.value
                return found

    def steps(
        self, want: Mapping[str, Target], clock: Callable[[], int], batch: int = 4096
    ) -> Generator[None, None, Round]:
        """A round that yields after each batch; its value is the Round."""
        t = self.tables
        began = clock()
        self._quieten(want, began)
        self.grace()
        regions = {name: (t.placed[name].first, t.placed[name].log2) for name in t.unsettled}
        found = Round(began, regions)
        found.busy = sparse(len(t.words), np.bool_)
        found.named = np.zeros(len(t.backends), np.bool_)
        for index, flows in t.flows.batches(FLOW_LINES):
            self._flows(index, flows, found, clock())
            yield
        yield from self._nat(found, clock, batch)
        self._settle(found)
        self._release(found)
        self.last = found
        return found

    def _quieten(self, want: Mapping[str, Target], now_ns: int) -> None:
        """Moving slots whose window has passed linger; those that could not remember wait on."""
        t = self.tables
        known = t.known()
        for name in list(t.unsettled):
            place = t.placed[name]
            where = place.slots()
            words, changed = t.words[where], t.changed[where]
            marked = np.flatnonzero(t.restarts[where])
            if len(marked):
                # Cleared before the time is taken: a later mark is found by a later round.
                t.restarts[where][marked] = 0
                changed[marked] = np.where(
                    slot.state(words[marked]) == slot.State.MOVING, now_ns, changed[marked]
                )
            window = want[name].window_ns if name in want else 0
            index = np.flatnonzero(slot.quiet(words, changed, now_ns, window, known))
            if len(index):
                changed[index] = now_ns
                words[index] = slot.linger(words[index])

    def _flows(self, index: Any, flows: Any, found: Round, now_ns: int) -> None:
        t = self.tables
        ids = flowtable.backends(flows["word"])
        svc = t.backends["svc"][ids].astype(np.intp)
        region = t.svc["region"][svc]
        log2 = region & np.uint64(0xFF)
        hashes = flows["hash"].astype(np.uint64)
        at = ((region >> np.uint64(8)) + (hashes << log2 >> np.uint64(32))).astype(np.intp)
        words = t.words[at]
        lasting = flowtable.states(flows["word"]) == flowtable.State.CONFIRMED
        idle = t.svc["idle_ns"][svc]
        limit = np.where(lasting, idle, np.minimum(idle, np.uint64(SHORT_IDLE_NS)))
        client = flows["key"]["kind"] != 0
        limit = np.where(client, t.svc_options["affinity_ns"][svc], limit)
        age = now_ns - flowtable.seen_ns(flows["word"])
        no_affinity = t.svc["flags"][svc] & t.svc_flag["AFFINITY"] == 0
        orphaned = ~t.known()[ids] | (t.svc["mode"][svc] == 0) | (client & no_affinity)
        as_owner = (ids == slot.cur(words).astype(np.intp)) & ~client
        needless = as_owner & (slot.state(words) != slot.State.MOVING)
        ended = (age > limit.astype(np.int64) + MARGIN_NS) | orphaned | needless
        kept = ~ended
        if ended.any():
            deleted = t.flows.delete(index[ended], flows["word"][ended])
            kept[ended] = ~deleted  # it was seen again just now
            found.deleted += int(deleted.sum())
        found.clients += int((kept & client).sum())
        found.flows += int((kept & ~client).sum())
        exceptions = kept & ~as_owner & ~client
        found.exceptions += int(exceptions.sum())
        found.busy[at[exceptions]] = True
        found.named[ids[kept]] = True

    def _nat(self, found: Round, clock: Callable[[], int], batch: int) -> Iterator[None]:
        """Translations end in pairs: silent both ways, closed, or their backend gone."""
        t = self.tables
        forward, reverse = t.maps["nat_fwd"], t.maps["nat_rev"]
        keys, values = forward.items()
        order = np.argsort(_sortable(keys))
        keys, values = keys[order], values[order]
        matched = np.zeros(len(keys), np.bool_)
        yield
        for rev_keys, rev_values in reverse.batches(batch):
            pairs = forward_keys(forward.new_keys(len(rev_keys)), rev_keys, rev_values)
            at, lone = find_sorted(_sortable(keys), _sortable(pairs))
            matched[at[~lone]] = True
            mates = np.zeros(len(pairs), forward.spec.value)
            mates[~lone] = values[at[~lone]]
            gone, idle = self._gone(rev_values), self._idle(rev_keys, rev_values)
            ended = judge_nat(rev_values, mates, lone, gone, idle, clock(), rev_keys["proto"])
            found.nat += int((~ended).sum())
            found.ports.add(rev_keys[~ended], rev_values[~ended])
            found.named[(rev_values["word"] & _ID).astype(np.intp)[~ended]] = True
            if ended.any():  # the forward entry first: nothing is sent whose reply is unknown
                forward.delete_many(pairs[ended & ~lone])
                found.deleted += reverse.delete_many(rev_keys[ended])
            yield
        widowed = ~matched & (clock() - values["seen_ns"].astype(np.int64) > MARGIN_NS)
        if widowed.any():
            found.deleted += forward.delete_many(keys[widowed])

    def _gone(self, values: Any) -> NDArray[np.bool_]:
        t = self.tables
        ids = (values["word"] & _ID).astype(np.intp)
        gone: NDArray[np.bool_] = ~t.known()[ids] | (t.svc["mode"][values["svc"]] == 0)
        gone &= values["svc"] != NOBODYS
        return gone

    def _idle(self, keys: Any, values: Any) -> NDArray[np.int64]:
        idle: NDArray[np.int64] = self.tables.svc["idle_ns"][values["svc"]].astype(np.int64)
        return np.where(values["svc"] == NOBODYS, idle_of_nobodys(keys["proto"]), idle)

    def _settle(self, found: Round) -> None:
        t = self.tables
        for name in list(t.unsettled):
            place = t.placed[name]
            if found.regions.get(name) != (place.first, place.log2):
                continue  # it moved while we looked: what was found is of other slots
            where = place.slots()
            words = t.words[where]
            index = np.flatnonzero(
                slot.free_of_exceptions(words, t.changed[where], found.busy[where], found.began_ns)
            )
            if len(index):
                words[index] = slot.settled(slot.cur(words[index]))
            if not slot.state(words).any():
                t.unsettled.discard(name)

    def _release(self, found: Round) -> None:
        """Ids that nothing names any more may be handed out again."""
        t = self.tables
        waiting = [
            i
            for i, since in t.retired_backends.items()
            if since < found.began_ns and not found.named[i]
        ]
        for i in waiting:
            del t.retired_backends[i]
        t.backend_ids.release(waiting)
        services = [i for i, since in t.retired_services.items() if since < found.began_ns]
        for i in services:
            del t.retired_services[i]
        t.service_ids.release(services)

    def removed(self) -> set[str]:
        """The targets with backends that are no longer configured."""
        t = self.tables
        flags = t.backends["flags"]
        ids = (flags & t.flag.known != 0) & (flags & t.flag.removed != 0)
        svcs = np.unique(t.backends["svc"][ids]).tolist()
        return {name for svc in svcs if (name := t.name_of(svc)) in t.placed}

    def unreferenced(self, place: Placed) -> list[int]:
        """Removed backends of a target that no flow and no slot names since the last round."""
        if self.last is None:
            return []
        t = self.tables
        words = t.words[place.slots()]
        moving = words[slot.state(words) == slot.State.MOVING]
        held = {*slot.cur(words).tolist(), *slot.prev(moving).tolist()}
        return [
            i
            for i in place.backends.values()
            if t.backends["flags"][i] & t.flag.removed and i not in held and not self.last.named[i]
        ]


def _sortable(keys: Any) -> Any:
    return np.ascontiguousarray(keys).view(f"S{keys.dtype.itemsize}").reshape(-1)


def find_sorted(table: Any, wanted: Any) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Where each of `wanted` stands in a sorted table. Shape: (index, whether it is absent)."""
    if not len(table):
        return np.zeros(len(wanted), np.intp), np.ones(len(wanted), np.bool_)
    at = np.minimum(np.searchsorted(table, wanted), len(table) - 1)
    return at, table[at] != wanted


def forward_keys(out: Any, keys: Any, values: Any) -> Any:
    """The keys of nat_fwd that belong to entries of nat_rev. Shape: as `out`."""
    out["saddr"], out["daddr"] = values["client"], values["vip"]
    out["sport"], out["dport"] = values["client_port"], values["vip_port"]
    out["proto"], out["scope"] = keys["proto"], keys["scope"]
    return out
