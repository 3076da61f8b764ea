# SPDX-License-Identifier: Apache-2.0
"""Services on the real maps, and what must be true of those: for the balancer and for TC alike."""

from __future__ import annotations

import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from shunt.agent.quic import PutServerId, ServerIds
from shunt.agent.scan import Scanner, forward_keys
from shunt.agent.tables import Tables
from shunt.lb.model import Quic, RateLimit
from shunt.policy.sources import compile_rules
from tests.fuzz import seeds
from tests.fuzz.headers import TCP, UDP, Headers
from tests.fuzz.served import DENIED, OWN, Directory, Served
from tests.fuzz.target import Broken, Target
from tests.packets.balancer import LOOPBACK, START_NS, Balancer, Reason, Service
from tests.packets.test_echo import know_vip
from tests.packets.test_flow_table import wrong

SIZES = {"slots": 1 << 13, "restarts": 1 << 10, "flows": 1 << 12, "rates": 64}
CONFIG = {"inserts_per_s": 1 << 30, "answers_per_s": 1 << 30, "samples_per_s": 4}
# Few, so that they are used up now and then; for kept packets, so that few of them do it.
NAT_FLOWS, NAT_PORTS = {False: 1 << 11, True: 16}, {False: 64, True: 8}
# What packets leave behind.
REMEMBERED = ("nat_fwd", "nat_rev", "fragments", "rates")
CLEARED = ("flows", "restarts")
FOREVER = 1 << 62


def sizes(small: bool) -> dict[str, int]:
    """Of maps."""
    return SIZES | dict.fromkeys(("nat_fwd", "nat_rev"), NAT_FLOWS[small])


def config(small: bool) -> dict[str, Any]:
    """Of the program."""
    return CONFIG | {"nat_port_count": NAT_PORTS[small]}


class Balancing(Target):
    """Of `lb` the programs, by hook."""

    def __init__(self, lb: Balancer, programs: Sequence[str], services: Sequence[Served]) -> None:
        self.lb = lb
        self.directory = Directory(services)
        self.ids = ServerIds(lb.map("server_ids"))
        for served in services:
            self._serve(served)
        fds = [lb.object.programs[name].fd for name in programs]
        super().__init__(fds, lb.map("reasons"), Reason)
        self.tables = Tables(lb.object.maps, lb.object.btf, START_NS)
        self.scanner = Scanner(self.tables, grace=lambda: None)
        # Slots that move go on to do so.
        self.want: Any = dict.fromkeys(self.tables.placed, SimpleNamespace(window_ns=FOREVER))

    def close(self) -> None:
        self.lb.close()

    def _serve(self, served: Served) -> None:
        mode = "nat" if served.mode == "nat46" else served.mode
        service = self.lb.add_service(served.vip, served.port, served.proto, mode, slots=32)
        for mac, address in zip(served.backends, served.addresses, strict=True):
            own = OWN[6 if ":" in address else 4]
            hop = self.lb.add_nexthop(own, ifindex=self.ifindex(served, mac), dmac=mac.hex(":"))
            service.backends.append(self.lb.add_backend(service.id, address, nexthop=hop))
        service.set_slots(service.backends)
        name = self.lb.map("names").new_values(1)
        name["name"] = f"{service.id}".encode()
        self.lb.map("names").update(np.uint32(service.id), name[0])
        if served.state != "empty":
            know_vip(self.lb, served.vip, service.id)
        if served.state == "moving":
            service.move()
        elif served.state == "empty":
            service.set_slots(0)
        elif served.state == "asks":
            self._ask(served, service)

    def _ask(self, served: Served, service: Service) -> None:
        by_id = served.proto == UDP
        service.ask(
            affinity_ns=10**11,
            hash_client=True,
            rate=RateLimit(1000, 2) if served.proto == TCP else None,
            sources=compile_rules([], DENIED),
            quic=Quic(seeds.SERVER_ID_BYTES) if by_id else None,
        )
        for server, backend in zip(seeds.SERVER_IDS, service.backends, strict=True):
            if by_id:
                self.ids.put(PutServerId(service.id, server, backend))

    def ifindex(self, served: Served, mac: bytes) -> int:
        """By which device a backend is reached."""
        return LOOPBACK

    def note(self, hook: int, was: Headers) -> None:
        for served in self.directory.of(was):  # also of one that was dropped the way is learnt
            served.clients.add((was.by, was.src))

    def miscounted(self, became: Counter[str], change: Any) -> str:
        if defects := self.count_of(change, "DROP_BAD_TABLE"):
            return f"{defects} found that tables contradict each other"
        return self.uneven(became, change)

    @abstractmethod
    def uneven(self, became: Counter[str], change: Any) -> str:
        """As `miscounted`."""

    def advance(self, rnd: random.Random) -> None:
        self.lb.advance(rnd.choice((0.001, 0.1, 1, 61)))

    def reset(self) -> None:
        for name in REMEMBERED:
            found = self.lb.map(name)
            found.delete_many(found.items()[0])
        for name in CLEARED:
            self.lb.map(name).mapped().view(np.uint8)[:] = 0
        self.lb.map("budget").clear(0)
        self.lb.clock[...] = START_NS
        for served in self.directory.services:
            served.clients.clear()

    def check_tables(self) -> None:
        """Before the scan and after it: of one packet after the other none leaves half a pair."""
        for when in ("", "after the scan, "):
            if found := wrong(self.lb.map("flows").mapped()) + self.orphans():
                raise Broken(when + "; ".join(found[:5]))
            self.scanner.run(self.want, int(self.lb.clock))

    def orphans(self) -> list[str]:
        """Entries of maps nat_fwd and nat_rev without their other half."""
        forward = self.lb.map("nat_fwd")
        keys, _ = forward.items()
        back_keys, back = self.lb.map("nat_rev").items()
        have = {key.tobytes() for key in keys}
        paired = [
            key.tobytes() for key in forward_keys(forward.new_keys(len(back)), back_keys, back)
        ]
        return [
            *(f"nat_fwd without nat_rev: {key.hex()}" for key in have - set(paired)),
            *(
                f"nat_rev without nat_fwd: {mine.tobytes().hex()}"
                for mine, key in zip(back_keys, paired, strict=True)
                if key not in have
            ),
            *["several of nat_rev for one of nat_fwd"] * (len(set(paired)) < len(paired)),
        ]
