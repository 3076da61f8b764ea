# SPDX-License-Identifier: Apache-2.0
"""Performs a plan's writes on the maps, in order. Decides nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import singledispatchmethod
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shunt.agent import options, quic, writes
from shunt.agent.tables import NO_REGION, REGION_LOG2_BITS, Placed, Tables
from shunt.kern.rcu import synchronize
from shunt.lb import slots as slot
from shunt.lb.compile import mapped
from shunt.lb.model import ANY_PORT, Frontend, IPAddress, Protocol

# bpf/abi.h; a test compares
ANY_PORT_BIT = {Protocol.TCP: 1, Protocol.UDP: 2, Protocol.SCTP: 4}
PORT_WORDS = 1024  # of map ports, for each protocol in this order


class Applier:
    """Writes to one set of tables."""

    def __init__(
        self,
        tables: Tables,
        clock: Callable[[], int],
        nexthop_of: Callable[[IPAddress], int] = lambda _address: 0,
        grace: Callable[[], None] = synchronize,
    ) -> None:
        self.tables, self.clock, self.nexthop_of, self.grace = tables, clock, nexthop_of, grace
        # What there may be 10,000 of, one after the other.
        self._together: dict[type, Callable[[Any], None]] = {
            writes.NameService: self._name_services,
            writes.PutBackend: self._put_backends,
            writes.NewRegion: self._new_regions,
            writes.PutService: self._put_services,
            writes.PutFrontend: self._put_frontends,
        }

    def apply(self, plan: Iterable[writes.Write]) -> int:
        """Do them all; returns how many there were.

        Raises: ShuntError, OSError from a map. What was written before stays, and is safe.
        """
        n = 0
        do = self.do  # bound once: that costs as much as a write
        for kind, alike in groupby(plan, type):
            some: list[Any] = list(alike)
            if together := self._together.get(kind):
                together(some)
            else:
                for write in some:
                    do(write)
            n += len(some)
        return n

    @singledispatchmethod
    def do(self, write: object) -> None:
        """Do one write."""
        raise TypeError(f"not a write: {write!r}")

    def _name_services(self, some: Sequence[writes.NameService]) -> None:
        names = self.tables.maps["names"]
        keys, values = names.new_keys(len(some)), names.new_values(len(some))
        keys[:] = [write.svc for write in some]
        values["name"] = [write.name.encode() for write in some]
        names.update_many(keys, values)
        self.tables.svc_stats[:, keys] = 0
        for write in some:
            self.tables.placed[write.name] = Placed(write.svc, write.name)

    def _put_backends(self, some: Sequence[writes.PutBackend]) -> None:
        """Nothing refers to them yet, so those that follow each other are written together."""
        records, ids = self.tables.backends, np.array([w.id for w in some], np.intp)
        addresses = [write.endpoint.address for write in some]
        raw = b"".join(map(mapped, addresses))
        records["flags"][ids] = 0
        records["addr"][ids] = np.frombuffer(raw, np.uint8).reshape(-1, 16)
        records["nexthop"][ids] = [self.nexthop_of(address) for address in addresses]
        records["svc"][ids] = [write.svc for write in some]
        records["port"][ids] = [write.endpoint.port for write in some]
        records["weight"][ids] = [write.weight for write in some]
        records["flags"][ids] = [write.flags for write in some]  # last: it makes the rest valid
        self.tables.backend_stats[:, ids] = 0
        self.tables.nat_refused[ids] = 0
        for name, alike in groupby(some, lambda write: write.name):
            own = self.tables.placed[name].backends
            own.update((write.endpoint, write.id) for write in alike)

    @do.register
    def _(self, write: writes.SetBackend) -> None:
        self.tables.backends["weight"][write.id] = write.weight
        self.tables.backends["flags"][write.id] = write.flags

    @do.register
    def _(self, write: writes.WriteRegion) -> None:
        where = slice(write.first, write.first + len(write.words))
        self.tables.restarts[where] = 0
        self.tables.changed[where] = write.changed
        self.tables.words[where] = write.words

    def _new_regions(self, some: Sequence[writes.NewRegion]) -> None:
        """Slots that never moved need no memory for when they did: nobody asks."""
        for write in some:
            words = write.words
            where = slice(write.first, write.first + len(words))
            self.tables.restarts[where] = 0
            self.tables.words[where] = words

    @do.register
    def _(self, write: writes.PatchSlots) -> None:
        index = self.tables.placed[write.name].first + write.index
        self.tables.changed[index] = write.now_ns
        self.tables.words[index] = write.words
        self._note_unsettled(self.tables.placed[write.name])

    def _put_services(self, some: Sequence[writes.PutService]) -> None:
        """Each of one store a field, in an order that is right for every service."""
        t, ids = self.tables, np.array([write.svc for write in some], np.intp)
        t.svc["idle_ns"][ids] = [write.idle_ns for write in some]
        t.svc["proto"][ids] = [int(write.protocol) for write in some]
        raw = b"".join(write.options for write in some)
        t.svc_options[ids] = np.frombuffer(raw, t.svc_options.dtype)
        t.svc["region"][ids] = [write.first << REGION_LOG2_BITS | write.log2 for write in some]
        # After the slots that must be looked up without them.
        t.svc["flags"][ids] = [write.flags for write in some]
        modes = {name: int(t.modes[name]) for name in {write.mode for write in some}}
        t.svc["mode"][ids] = [modes[write.mode] for write in some]
        for write, shortcut in zip(some, t.shortcuts(ids), strict=True):
            place = t.placed[write.name]
            new = place.log2 == NO_REGION
            place.first, place.log2 = write.first, write.log2
            for frontend in place.frontends:
                t.frontends.put(frontend, write.svc, shortcut)
            if not new:  # then all is settled
                self._note_unsettled(place)

    @do.register
    def _(self, write: options.PutSources) -> None:
        self.tables.source_sets.put(write.id, write.rules)

    @do.register
    def _(self, write: options.DropSources) -> None:
        self.tables.source_sets.drop(write.id)

    @do.register
    def _(self, write: quic.PutServerId) -> None:
        self.tables.server_ids.put(write)

    @do.register
    def _(self, write: quic.DropServerId) -> None:
        self.tables.server_ids.drop(write)

    def _note_unsettled(self, place: Placed) -> None:
        words = self.tables.words[place.slots()]
        if slot.state(words).any():
            self.tables.unsettled.add(place.name)
        else:
            self.tables.unsettled.discard(place.name)

    def _put_frontends(self, some: Sequence[writes.PutFrontend]) -> None:
        t = self.tables
        ways = t.shortcuts(np.array([write.svc for write in some], np.intp))
        for write, shortcut in zip(some, ways, strict=True):
            t.frontends.put(write.frontend, write.svc, shortcut)
            if write.replaces:
                t.placed[write.replaces].frontends.discard(write.frontend)
            else:
                self._serve(write.frontend, +1)
            if write.frontend in t.stale_frontends:
                t.stale_frontends.remove(write.frontend)
            t.placed[write.name].frontends.add(write.frontend)

    @do.register
    def _(self, write: writes.DropFrontend) -> None:
        t = self.tables
        t.frontends.drop(write.frontend)
        if write.name:
            t.placed[write.name].frontends.discard(write.frontend)
            self._serve(write.frontend, -1)
        else:
            t.stale_frontends.remove(write.frontend)

    def _serve(self, frontend: Frontend, change: int) -> None:
        """Keep the port set: a port's bit is there while a frontend has the port."""
        key = frontend.protocol, frontend.port
        before = self.tables.served[key]
        self.tables.served[key] = before + change
        if before and before + change:
            return
        set_port(self.tables, frontend.protocol, frontend.port)

    @do.register
    def _(self, _write: writes.Grace) -> None:
        self.grace()
        self.tables.frontends.reap()

    @do.register
    def _(self, write: writes.ClearService) -> None:
        t = self.tables
        t.svc["mode"][write.svc] = 0
        t.svc["region"][write.svc] = 0
        t.svc["flags"][write.svc] = 0
        t.maps["names"].delete(write.svc)
        t.retired_services[write.svc] = self.clock()
        t.placed.pop(write.name, None)
        t.unsettled.discard(write.name)

    @do.register
    def _(self, write: writes.ClearBackend) -> None:
        self._fold_stats(write.id)
        self.tables.backends["flags"][write.id] = 0
        self.tables.retired_backends[write.id] = self.clock()
        if place := self.tables.placed.get(write.name):
            place.backends.pop(write.endpoint, None)

    def _fold_stats(self, backend: int) -> None:
        """A service's counters do not go down when a backend goes."""
        t = self.tables
        kept, gone = t.svc_stats[0], t.backend_stats[:, backend]
        for name in gone.dtype.names or ():
            kept[name][t.backends["svc"][backend]] += gone[name].sum()

    @do.register
    def _(self, write: writes.GiveRegion) -> None:
        t = self.tables
        marked = t.restarts[write.first : write.first + (1 << write.log2)] != 0
        if write.heir and marked.any():
            # Flows that could not be remembered until the last packet on the old slots.
            heir = t.placed[write.heir]
            inherited = slot.resize(marked.astype(np.uint64), heir.log2)
            t.changed[heir.slots()][inherited != 0] = self.clock()
        t.regions.give(write.first, write.log2)


def set_port(tables: Tables, protocol: Protocol, port: int) -> None:
    """Bring a port's bit to what it should be, by one store; see struct ports_val."""
    if port == ANY_PORT:
        sync_ports(tables, tables.nat_ports)
        return
    index = _row(protocol) * PORT_WORDS + (port >> 6)
    bit = np.uint64(1 << (port & 63))
    word = tables.ports[index]
    served = (
        tables.served[protocol, port] > 0
        or tables.served[protocol, ANY_PORT] > 0
        or port in tables.nat_ports
        or (protocol, port) in tables.reply_ports
    )
    tables.ports[index] = word | bit if served else word & ~bit


def sync_ports(tables: Tables, nat_ports: range) -> None:
    """Bring the whole port set to what it should be, with `nat_ports` for replies to `nat`.

    And with the tables' `reply_ports`, for those to `local`.
    """
    tables.nat_ports = nat_ports
    pairs = [pair for pair, count in tables.served.items() if count > 0]
    bits = _port_bits((*pairs, *tables.reply_ports))
    bits[:, nat_ports.start : nat_ports.stop] = True  # of every protocol
    every = [p for p in Protocol if tables.served[p, ANY_PORT] > 0]
    for protocol in every:
        bits[_row(protocol)] = True
    _change(tables.ports, bits)
    tables.meta["any_port"] = sum(ANY_PORT_BIT[protocol] for protocol in every)


def exclude_ports(tables: Tables, ports: Iterable[tuple[Protocol, int]]) -> None:
    """Let no new flow get any of these, and all others."""
    _change(tables.nat_excluded, _port_bits(ports))


def _port_bits(ports: Iterable[tuple[Protocol, int]]) -> NDArray[np.bool_]:
    """A set of ports. Shape: (protocols, 65536)."""
    bits = np.zeros((len(ANY_PORT_BIT), 64 * PORT_WORDS), np.bool_)
    for protocol, port in ports:
        bits[_row(protocol), port] = True
    return bits


def _change(words: NDArray[np.uint64], bits: NDArray[np.bool_]) -> None:
    """Bring the words of struct ports_val to a set of ports, by one store each that differs."""
    want = np.packbits(bits, bitorder="little").view("<u8")
    index = np.flatnonzero(want != words)
    words[index] = want[index]


def _row(protocol: Protocol) -> int:
    return list(ANY_PORT_BIT).index(protocol)
