# SPDX-License-Identifier: Apache-2.0
"""What services ask for beyond balancing, as maps svc_options and sources have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from shunt.kern.maps import Map
from shunt.lb.compile import NO_OPTIONS, NS_PER_S, Options, Target
from shunt.lb.errors import ShuntError
from shunt.lb.model import SourceRule
from shunt.policy import sources

if TYPE_CHECKING:
    from shunt.agent.tables import Tables

SET_BITS = 32  # SOURCE_SET_BITS of bpf/abi.h; a test compares


def flags(options: Options, flag: Any) -> int:
    """enum svc_flag, of whose members `flag` is made."""
    return (
        (flag.AFFINITY if options.affinity_ns else 0)
        | (flag.HASH_CLIENT if options.hash_client else 0)
        | (flag.SOURCES if options.sources else 0)
        | (flag.RATE if options.rate else 0)
        | (flag.QUIC if options.quic else 0)
        | (0 if options.sockets else flag.NO_SOCKETS)
        | (flag.NODE if options.node else 0)
    )


def record(options: Options, source_set: int, dtype: np.dtype[Any]) -> bytes:
    """A value of map svc_options."""
    value = np.zeros((), dtype)
    value["affinity_ns"] = options.affinity_ns
    value["sources"], value["digest"] = source_set, sources.digest(options.sources)
    if rate := options.rate:
        gap = round(NS_PER_S / rate.per_s)
        value["rate_gap_ns"], value["rate_burst_ns"] = gap, (rate.burst - 1) * gap
        value["rate_mask4"] = _mask(sources.MAPPED_BITS + rate.prefix4)
        value["rate_mask6"] = _mask(rate.prefix6)
    if quic := options.quic:
        value["quic_config"] = quic.config_id
        value["quic_id_bytes"], value["quic_nonce_bytes"] = quic.server_id_length, quic.nonce_length
    return value.tobytes()


def _mask(bits: int) -> Any:
    mask = (1 << 128) - (1 << 128 - bits)
    return np.frombuffer(mask.to_bytes(16, "big"), np.uint8)


@dataclass(frozen=True)
class PutSources:
    """A set of source rules that no service is pointed at yet."""

    id: int
    rules: tuple[SourceRule, ...]


@dataclass(frozen=True)
class DropSources:
    """A set of source rules that no service is pointed at any more."""

    id: int


@dataclass(frozen=True)
class Asked:
    """A service's flags and its value of map svc_options, and what is written before and after."""

    flags: int
    record: bytes
    before: tuple[PutSources, ...] = ()
    after: tuple[DropSources, ...] = ()


def ask(tables: Tables, target: Target, svc: int, *, in_force: bool) -> Asked:
    """What a target asks for; new source rules come as a new set.

    Raises: ShuntError if it can't have that while the service is in force.
    """
    wanted, had = target.options, int(tables.svc["flags"][svc])
    if wanted is NO_OPTIONS and not had:
        return _nothing(tables.svc_options.dtype)
    have = tables.source_set(svc)
    if in_force and bool(had & tables.svc_flag["HASH_CLIENT"]) is not wanted.hash_client:
        raise ShuntError(
            f"hash of {target.name} can't change while the service is in force",
            "it chooses the slot of every packet: established connections would move",
            "keep it, or remove the service, apply that, and add it with the other hash",
        )
    source_set = have
    asked = Asked(flags(wanted, tables.svc_flag), b"")
    if sources.digest(wanted.sources) != (int(tables.svc_options["digest"][svc]) if have else 0):
        source_set = 0
        if wanted.sources:
            source_set = tables.source_sets.new_id()
            asked = replace(asked, before=(PutSources(source_set, wanted.sources),))
        if have:
            asked = replace(asked, after=(DropSources(have),))
    return replace(asked, record=record(wanted, source_set, tables.svc_options.dtype))


@cache
def _nothing(dtype: np.dtype[Any]) -> Asked:
    return Asked(0, record(NO_OPTIONS, 0, dtype))


class SourceSets:
    """Sets of rules in map sources. A set is written before a service is pointed at it."""

    def __init__(self, source_map: Map) -> None:
        self._map = source_map
        keys, _ = source_map.items()
        self.there = {int(n) for n in np.unique(keys["set"])}
        self._next = max(self.there, default=0)

    def new_id(self) -> int:
        """Of a set that was never there."""
        self._next += 1
        return self._next

    def put(self, set_id: int, rules: Sequence[SourceRule]) -> None:
        """Write a set that nothing refers to yet.

        Raises: ShuntError if the map is full; some of its rules may be there then.
        """
        bits, addresses, allow = sources.entries(rules)
        keys, values = self._map.new_keys(len(rules)), self._map.new_values(len(rules))
        keys["prefix_bits"], keys["set"], keys["addr"] = SET_BITS + bits, set_id, addresses
        values["allow"] = allow
        self.there.add(set_id)
        for key, value in zip(keys, values, strict=True):
            self._map.update(key, value)

    def drop(self, set_id: int) -> None:
        """Remove a set that nothing refers to any more."""
        keys, _ = self._map.items()
        for key in keys[keys["set"] == set_id]:
            self._map.delete(key)
        self.there.discard(set_id)
