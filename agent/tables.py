# SPDX-License-Identifier: Apache-2.0
"""What the maps hold, read back from the pins: a restart knows all that its predecessor did.

Nothing about services or backends is kept elsewhere: names, ids, regions, drains and weights stand
in the maps themselves. What is derived (who is placed where, free ids and regions, when slots
changed) is rebuilt here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shunt.agent.options import SourceSets
from shunt.agent.quic import ServerIds
from shunt.kern.btf import Btf
from shunt.kern.flows import FlowTable, backends
from shunt.kern.maps import Map
from shunt.kern.memory import sparse
from shunt.kern.rcu import synchronize
from shunt.lb import slots as slot
from shunt.lb.compile import Endpoint, mapped, unmapped
from shunt.lb.frontends import FrontendTable, shortcut, shortcuts
from shunt.lb.model import Frontend, IPAddress, Protocol
from shunt.lb.pools import Ids, Regions
from shunt.xdp.resize import service_words

NO_REGION = -1
REGION_LOG2_BITS = 8  # bpf/abi.h; a test compares


@dataclass(slots=True)
class Placed:
    """A target's place in the maps."""

    svc: int
    name: str
    first: int = 0
    log2: int = NO_REGION  # no region yet
    backends: dict[Endpoint, int] = field(default_factory=dict)
    frontends: set[Frontend] = field(default_factory=set)

    def slots(self) -> slice:
        """Its part of the slots."""
        return slice(self.first, self.first + (1 << self.log2 if self.log2 >= 0 else 0))


class Flags:
    """enum backend_flag of bpf/abi.h, from the object's BTF."""

    def __init__(self, btf: Btf) -> None:
        values = btf.enum("backend_flag", "BACKEND_")
        self.known, self.up = int(values["KNOWN"]), int(values["UP"])
        self.drained, self.removed = int(values["DRAINED"]), int(values["REMOVED"])
        self.ipv6 = int(values["IPV6"])


class Tables:
    """The maps, and the bookkeeping derived from them. Only `agent/apply.py` writes."""

    def __init__(self, maps: dict[str, Map], btf: Btf, now_ns: int) -> None:
        """Raises: ShuntError if the pinned maps contradict each other."""
        self.maps = maps
        self.flag = Flags(btf)
        self.modes = btf.enum("mode", "MODE_")
        self.svc: NDArray[Any] = maps["svc"].mapped()
        self.svc_options: NDArray[Any] = maps["svc_options"].mapped()
        self.svc_flag = btf.enum("svc_flag", "SVC_")
        self.source_sets = SourceSets(maps["sources"])
        self.server_ids = ServerIds(maps["server_ids"])
        self.words: NDArray[np.uint64] = maps["slots"].mapped()["word"]
        self.restarts: NDArray[np.uint8] = maps["restarts"].mapped().view(np.uint8).reshape(-1)
        self.backends: NDArray[Any] = maps["backends"].mapped()
        # Counters, by processor and id.
        self.svc_stats: NDArray[Any] = maps["svc_stats"].mapped().reshape(-1, len(self.svc))
        self.backend_stats: NDArray[Any] = (
            maps["backend_stats"].mapped().reshape(-1, len(self.backends))
        )
        # By backend id: new flows of mode nat without a port.
        self.nat_refused: NDArray[np.uint64] = maps["nat_refused"].mapped()["flows"]
        self.nexthops: NDArray[Any] = maps["nexthops"].mapped()
        self.ports: NDArray[np.uint64] = maps["ports"].mapped()["bits"]
        self.nat_excluded: NDArray[np.uint64] = maps["nat_excluded"].mapped()["bits"]
        self.frontends = FrontendTable(service_words(maps["services"]))
        self.flows = FlowTable(maps["flows"].mapped())
        self.meta: NDArray[Any] = maps["meta"].mapped()
        self.changed: NDArray[np.uint64] = sparse(len(self.words), np.uint64)
        self.placed: dict[str, Placed] = {}
        self.unsettled: set[str] = set()
        self.served: Counter[tuple[Protocol, int]] = Counter()
        # Where backends of mode `local` answer from.
        self.reply_ports: frozenset[tuple[Protocol, int]] = frozenset()
        self.nat_ports = range(0)  # where replies to `nat` come back to
        self.stale_frontends: list[Frontend] = []  # keys that name no service: a crash left them
        self.retired_backends: dict[int, int] = {}  # id -> when, ns
        self.retired_services: dict[int, int] = {}
        self._recover(now_ns)

    def known(self) -> NDArray[np.bool_]:
        """By backend id: in use, so not gone."""
        known: NDArray[np.bool_] = (self.backends["flags"] & self.flag.known) != 0
        return known

    def source_set(self, svc: int) -> int:
        """Which set of map sources a service is pointed at; 0 is none."""
        has = int(self.svc["flags"][svc]) & self.svc_flag["SOURCES"]
        return int(self.svc_options["sources"][svc]) if has else 0

    def at(self, addresses: Iterable[IPAddress]) -> NDArray[np.bool_]:
        """By backend id: in use, and at one of these addresses."""
        wanted = np.frombuffer(b"".join(mapped(address) for address in addresses), "S16")
        raw = np.ascontiguousarray(self.backends["addr"]).view("S16").reshape(-1)
        return self.known() & np.isin(raw, wanted)

    def name_of(self, svc: int) -> str:
        """The target that a service id stands for; "" if none."""
        found = self.maps["names"].lookup(svc)
        return "" if found is None else bytes(found["name"]).decode()

    def region_log2(self, svc: int) -> tuple[int, int]:
        """(first slot, log2 of their number) as the programs see them."""
        region = int(self.svc["region"][svc])
        return region >> REGION_LOG2_BITS, region & (1 << REGION_LOG2_BITS) - 1

    def shortcuts(self, svcs: NDArray[np.intp]) -> list[int]:
        """What entries of map services that lead to these have beside them; see bpf/abi.h."""
        fields = (self.svc[name][svcs].tolist() for name in ("mode", "flags", "region"))
        return [shortcut(*each) for each in zip(svcs.tolist(), *fields, strict=True)]

    def _recover(self, now_ns: int) -> None:
        if self.frontends.refresh(shortcuts(self.svc)):
            # A crash left some that name the region a service had before; nobody shall be on the
            # way there when it is used again.
            synchronize()
        self.flows.mend()
        named = self._named_by_flows()
        self.regions = Regions(len(self.words))
        by_svc: dict[int, Placed] = {}
        keys, values = self.maps["names"].items()
        for svc, name in zip(keys.tolist(), values["name"].tolist(), strict=True):
            place = by_svc[svc] = Placed(svc, name.decode())
            self.placed[place.name] = place
            if self.svc["mode"][svc]:
                place.first, place.log2 = self.region_log2(svc)
                self.regions.claim(place.first, place.log2)
        known_backends = np.flatnonzero(self.known())
        orphans = []
        for i, record in zip(known_backends.tolist(), self.backends[known_backends], strict=True):
            endpoint = Endpoint(unmapped(record["addr"].tobytes()), int(record["port"]))
            if place_of := by_svc.get(int(record["svc"])):
                place_of.backends[endpoint] = i
            else:
                orphans.append(i)
        self._recover_frontends(by_svc)
        for place in self.placed.values():
            where = place.slots()
            if slot.state(self.words[where]).any():
                self.unsettled.add(place.name)
                self.changed[where] = now_ns
        self.backends["flags"][orphans] = 0
        in_use = {i for p in self.placed.values() for i in p.backends.values()}
        waiting = (set(named[0]) | set(orphans)) - in_use
        self.backend_ids = Ids("backends", len(self.backends), in_use | waiting)
        self.retired_backends = dict.fromkeys(waiting, now_ns)
        waiting = set(named[1]) - set(by_svc)
        self.service_ids = Ids("services", len(self.svc), set(by_svc) | waiting)
        self.retired_services = dict.fromkeys(waiting, now_ns)

    def _recover_frontends(self, by_svc: dict[int, Placed]) -> None:
        for frontend, svc in self.frontends.items():
            if svc in by_svc and self.svc["mode"][svc]:
                by_svc[svc].frontends.add(frontend)
                self.served[frontend.protocol, frontend.port] += 1
            else:
                self.stale_frontends.append(frontend)

    def _named_by_flows(self) -> tuple[list[int], list[int]]:
        """Backend and service ids that a remembered flow names."""
        backend_ids: set[int] = set()
        services: set[int] = set()
        for _, flows in self.flows.batches():
            backend_ids.update(np.unique(backends(flows["word"])).tolist())
        for name in ("nat_fwd", "nat_rev"):
            for _, values in self.maps[name].batches():
                ids = values["word"] & np.uint64(0xFFFFFFFF)
                backend_ids.update(np.unique(ids).tolist())
                services.update(np.unique(values["svc"]).tolist())
        return sorted(backend_ids), sorted(services)
