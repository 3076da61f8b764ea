# SPDX-License-Identifier: Apache-2.0
"""Every prefix of a plan is safe to stop at, and a restarted agent finishes the work from there."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import numpy as np
import pytest

from shunt.agent.apply import Applier
from shunt.agent.plan import Planner
from shunt.agent.tables import Tables
from shunt.agent.writes import Write
from shunt.kern.objects import Object
from shunt.kern.testrun import run_xdp
from shunt.lb.compile import Condition, Endpoint, Target, targets
from shunt.lb.frontends import shortcuts
from shunt.lb.model import Backend, Frontend, IPAddress, Mode, Port, Protocol, Service
from shunt.xdp.attach import fit
from tests.packets.balancer import empty

LB = Path(__file__).resolve().parents[2] / "xdp" / "lb.bpf.o"
XDP_DROP, XDP_PASS, XDP_TX = 1, 2, 3
ETHERTYPES = {4: b"\x08\x00", 6: b"\x86\xdd"}
CLIENTS: dict[int, IPAddress] = {4: IPv4Address("192.0.2.1"), 6: IPv6Address("2001:db8:c::1")}
BAD_TABLE = "DROP_BAD_TABLE"
# The first VIP and the first backend of each family.
FIRST: dict[int, tuple[IPAddress, IPAddress]] = {
    4: (IPv4Address("203.0.113.1"), IPv4Address("10.0.0.1")),
    6: (IPv6Address("2001:db8:a::1"), IPv6Address("fd00::1")),
}


def condition(_name: str, _endpoint: object) -> Condition:
    """Everything is well."""
    return Condition()


def conditions(rnd: random.Random) -> Callable[[str, Endpoint], Condition]:
    """Most is well: some fail, some are drained, some weigh what the operator says."""
    return lambda _name, _endpoint: Condition(
        up=rnd.random() > 0.15, drained=rnd.random() < 0.15, weight=rnd.choice([0, 0, 0, 5])
    )


def services(rnd: random.Random, second: int = 6) -> dict[str, Target]:
    """A random configuration; frontends wander between services from one to the next.

    Shape: of every other backend, and of one VIP, `second` is the family.
    """
    vips = (FIRST[4][0], FIRST[4][0] + 1, FIRST[second][0] + 2)
    frontends = [(vip, p) for vip in vips for p in (80, 443)]
    rnd.shuffle(frontends)
    found = []
    for n in range(rnd.randint(1, 3)):
        mine = [frontends.pop() for _ in range(rnd.randint(1, 2))]
        own = tuple({vip for vip, _ in mine})
        ports = tuple({Port(port, Protocol.TCP) for _, port in mine})
        frontends = [f for f in frontends if f[0] not in own]
        backends = rnd.sample(range(20), rnd.randint(0, 6))
        found.append(
            Service(
                name=f"s{n}",
                vips=own,
                ports=ports,
                mode=Mode.DSR_IPIP,
                backends=tuple(
                    Backend(FIRST[family][1] + n * 32 + b, weight=rnd.choice([1, 1, 3]))
                    for b in backends
                    for family in [4 if b % 2 else second]
                ),
                slots_per_backend=8,
            )
        )
        if not frontends:
            break
    return targets(found, conditions(rnd))


def syn(frontend: Frontend, port: int) -> bytes:
    """A client's; checksums are not looked at in DSR."""
    tcp = struct.pack("!HHIIBBHHH", port, frontend.port, 7, 0, 5 << 4, 2, 8192, 0, 0)
    version = frontend.vip.version
    if version == 4:
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0, 64, 6, 0) + CLIENTS[4].packed
    else:
        ip = struct.pack("!IHBB", 6 << 28, 20, 6, 64) + CLIENTS[6].packed
    return bytes(12) + ETHERTYPES[version] + ip + frontend.vip.packed + tcp


class World:
    """The loaded program and an agent on it."""

    def __init__(self) -> None:
        self.object = Object(LB)
        self.object.keep_programs("shunt_lb")
        self.object.variable(".rodata", "config")["inserts_per_s"] = 1 << 30
        self.object.set_entries({"slots": 1 << 10, "restarts": 1 << 7})
        fit(self.object)
        self.object.load()
        self.begin()

    def begin(self) -> None:
        """Nothing is configured, as in a loaded program."""
        empty(self.object)
        self.fresh = 2000
        hop = self.object.maps["nexthops"].mapped()
        hop["dmac"][1], hop["mtu"][1], hop["ifindex"][1] = 2, 1500, 1
        self.restart()

    def restart(self) -> None:
        """A new agent, that knows what the maps hold."""
        self.tables = Tables(self.object.maps, self.object.btf, 0)
        self.applier = Applier(self.tables, lambda: 1, lambda _a: 1, grace=lambda: None)

    def plan(self, want: dict[str, Target]) -> list[Write]:
        """What leads there."""
        return Planner(self.tables).plan(want, 1, condition)

    def send(self, frontend: Frontend, port: int) -> tuple[int, IPAddress | None]:
        """The verdict and backend of a SYN."""
        frame = syn(frontend, port)
        out = run_xdp(self.object.programs["shunt_lb"].fd, frame, ifindex=1)
        if out.verdict != XDP_TX:
            return out.verdict, None
        outer4 = out.data[12:14] == ETHERTYPES[4]
        if len(out.data) != len(frame) + (20 if outer4 else 40):  # an answer of its own
            return out.verdict, None
        return out.verdict, ip_address(out.data[30:34] if outer4 else out.data[38:54])

    def contradictions(self) -> int:
        """Packets that found tables which contradict each other."""
        reason = self.object.btf.enum("reason", "REASON_")[BAD_TABLE]
        return int(self.object.maps["reasons"].totals()["packets"][reason])

    def wrong(self, old: dict[str, Target], new: dict[str, Target]) -> str | None:
        """What a client may not see between `old` and `new`, if it is seen."""
        frontends = {f for c in (old, new) for t in c.values() for f in t.frontends}
        for frontend in sorted(frontends, key=str):
            owners = [[t for t in c.values() if frontend in t.frontends] for c in (old, new)]
            # A service that has the frontend before or after, with its backends of either time.
            names = {t.name for o in owners for t in o}
            both = [t for c in (old, new) for t in c.values() if t.name in names]
            allowed = {m.endpoint.address for t in both for m in t.members if m.takes_new_flows}
            for port in range(self.fresh, self.fresh + 12):
                verdict, backend = self.send(frontend, port)
                if backend is not None and backend not in allowed:
                    return f"{frontend} went to {backend}, which takes no new flows of it"
                steady = all(o and any(m.takes_new_flows for m in o[0].members) for o in owners)
                if steady and backend is None:
                    return f"{frontend} got verdict {verdict} though it always has backends"
        self.fresh += 12  # what was looked at is remembered: look with other flows next time
        return "tables contradict each other" if self.contradictions() else None


@pytest.fixture(scope="module")
def w() -> Iterator[World]:
    world = World()
    yield world
    world.object.close()


def stop_at(
    w: World, old: dict[str, Target], new: dict[str, Target], writes: int, turn: bool
) -> str | None:
    """Stop a change after so many writes, look, restart, finish, and look again."""
    w.begin()
    w.applier.apply(w.plan(old))
    plan: Sequence[Write] = w.plan(new)
    plan = plan[::-1] if turn else plan
    w.applier.apply(plan[:writes])
    if wrong := w.wrong(old, new):
        return f"after {writes} of {len(plan)}: {wrong}"
    w.restart()
    w.applier.apply(w.plan(new))
    if w.tables.frontends.refresh(shortcuts(w.tables.svc)):
        return f"finished after {writes} of {len(plan)}: a shortcut was left as it had been"
    if wrong := w.wrong(new, new):
        return f"finished after {writes} of {len(plan)}: {wrong}"
    w.restart()
    left = list(w.plan(new))
    return f"a finished plan leaves {left}" if left else None


def safe_throughout(w: World, seeds: Iterable[int], turn: bool = False) -> str | None:
    """The first prefix that is not safe."""
    for seed in seeds:
        rnd = random.Random(seed)
        old, new = services(rnd), services(rnd)
        w.begin()
        w.applier.apply(w.plan(old))
        length = len(w.plan(new))
        for writes in range(length + 1):
            try:
                wrong = stop_at(w, old, new, writes, turn)
            except (KeyError, IndexError):
                if not turn:
                    raise
                wrong = "a write before what it refers to"
            if wrong:
                return f"seed {seed}: {wrong}"
    return None


def test_a_restart_mends_shortcuts(w: World) -> None:
    """A crash between a service's record and its entries leaves them leading to old slots."""
    want = services(random.Random(1))
    w.begin()
    w.applier.apply(w.plan(want))
    right = shortcuts(w.tables.svc)
    assert np.count_nonzero(right) == len(want)
    assert w.tables.frontends.refresh(np.where(right, right ^ np.uint64(1 << 8), right))
    w.restart()
    assert not w.tables.frontends.refresh(right)


def test_every_prefix_is_safe(w: World) -> None:
    """Of the last two a service loses its backends, and its frontend to another service."""
    assert safe_throughout(w, (*range(8), 97, 105)) is None


def test_that_check_can_fail(w: World) -> None:
    assert safe_throughout(w, range(8), turn=True) is not None
