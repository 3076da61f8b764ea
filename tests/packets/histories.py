# SPDX-License-Identifier: Apache-2.0
"""Random histories of one service through the real program, against an oracle that remembers all.

The promise: no packet of a TCP flow whose backend is up, and that is not idle beyond the window,
ever reaches another backend. One exception is stated: a flow that finds the table full while its
slot's `prev` is down may move at the slot's next change.

Time is injected: a step is a second, the idle window 50 of them. The agent's side is the product's:
Planner, Applier and Scanner on the maps of the loaded program.
"""

from __future__ import annotations

import contextlib
import random
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address
from pathlib import Path
from typing import Literal

import numpy as np

from shunt.agent.apply import Applier
from shunt.agent.plan import Planner
from shunt.agent.scan import Scanner
from shunt.agent.tables import Tables
from shunt.kern.flows import Lines, State, pack, seen_ns
from shunt.kern.objects import Object
from shunt.kern.testrun import run_xdp
from shunt.lb.compile import NS_PER_S, Condition, Endpoint, Target, compile_target
from shunt.lb.errors import ShuntError
from shunt.lb.model import Backend, Mode, Port, Protocol, Quic, Service, SourceRule
from shunt.xdp.attach import fit

IDLE_S = 50
SLOTS_PER_BACKEND = 20  # the product: 100; fewer make collisions of flows likelier
FLOW_TABLE = 512  # lines
JUNK = 255  # no protocol that is balanced
VIP = IPv4Address("203.0.113.10")
CLIENT, CLIENTS = IPv4Address("192.0.2.0"), 32
FIN, SYN, ACK = 0x01, 0x02, 0x10
XDP_TX = 3


def packet(flow: int, flags: int, seq: int) -> bytes:
    """A TCP segment of a numbered flow to the VIP; checksums are not looked at in DSR."""
    source = int(CLIENT) + flow % CLIENTS
    port = 1024 + (flow // CLIENTS & 0x3FFF)
    tcp = struct.pack("!HHIIBBHHH", port, 80, seq, 0, 5 << 4, flags, 8192, 0, 0)
    ip = struct.pack("!BBHHHBBHII", 0x45, 0, 40, 0, 0, 64, 6, 0, source, int(VIP))
    return bytes(12) + b"\x08\x00" + ip + tcp


@dataclass
class Lab:
    """The loaded program with one service, and the agent's hands on it."""

    path: Path
    scanner_class: type[Scanner] = Scanner
    now_s: int = 1000
    mode: Mode = Mode.DSR_IPIP
    protocol: Protocol = Protocol.TCP
    idle_s: int = IDLE_S
    affinity_s: int = 0
    hash_by: Literal["tuple", "client"] = "tuple"
    sources: tuple[SourceRule, ...] = ()
    quic: Quic | None = None  # a backend's server id is its address
    sizes: Mapping[str, int] = field(default_factory=dict)
    configured: set[IPv4Address] = field(default_factory=set)
    drained: set[IPv4Address] = field(default_factory=set)
    failing: set[IPv4Address] = field(default_factory=set)
    removed: set[IPv4Address] = field(default_factory=set)  # out of the configuration, alive
    gone: set[IPv4Address] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.obj = Object(self.path)
        self.obj.keep_programs("shunt_lb")
        config = self.obj.variable(".rodata", "config")
        config["test_clock"], config["inserts_per_s"] = 1, 1 << 30
        sizes = {"flows": FLOW_TABLE, "slots": 1 << 14, "restarts": 1 << 11}
        self.obj.set_entries({**sizes, **self.sizes})
        if self.mode is Mode.NAT:
            config["nat_port_min"], config["nat_port_count"] = 10000, 20000
        fit(self.obj)
        self.config = config.copy()
        self.obj.load()
        self.clock = self.obj.variable(".bss", "test_now_ns")
        self.fd = self.obj.programs["shunt_lb"].fd
        self.junk = self._junk()
        hop = self.obj.maps["nexthops"].mapped()
        hop["dmac"][1], hop["mtu"][1], hop["ifindex"][1] = 2, 1500, 1
        self.restart()

    def close(self) -> None:
        """Unload."""
        self.obj.close()

    @property
    def now_ns(self) -> int:
        """The injected time."""
        return self.now_s * NS_PER_S

    def restart(self) -> None:
        """The agent starts: all it knows is what the maps hold."""
        self.tables = Tables(self.obj.maps, self.obj.btf, self.now_ns)
        self.planner = Planner(self.tables)
        self.applier = Applier(
            self.tables, lambda: self.now_ns, nexthop_of=lambda _a: 1, grace=lambda: None
        )
        self.scanner = self.scanner_class(self.tables, grace=lambda: None)

    def condition(self, _name: str, endpoint: Endpoint) -> Condition:
        """What is known of a backend."""
        address = endpoint.address
        return Condition(up=address not in self.failing, drained=address in self.drained)

    def targets(self) -> dict[str, Target]:
        """The service as configured now."""
        service = Service(
            name="web",
            vips=(VIP,),
            ports=(Port(80, self.protocol),),
            mode=self.mode,
            backends=tuple(
                Backend(a, server_id=a.packed if self.quic else b"")
                for a in sorted(self.configured)
            ),
            quic=self.quic,
            tcp_idle_s=float(self.idle_s),
            slots_per_backend=SLOTS_PER_BACKEND,
            affinity_s=float(self.affinity_s),
            hash_by=self.hash_by,
            sources=self.sources,
        )
        target = compile_target(service, self.protocol, self.condition)
        return {target.name: target}

    def reconcile(self, stop_after: int | None = None) -> int:
        """Plan and apply; `stop_after` kills the agent half-way. Returns the plan's length."""
        writes = self.planner.plan(
            self.targets(),
            self.now_ns,
            self.condition,
            gone=lambda _n, e: e.address in self.gone,
        )
        self.applier.apply(writes[:stop_after])
        return len(writes)

    def scan(self) -> None:
        """One round of the scan, and what the agent does after it."""
        self.tick()
        self.scanner.run(self.targets(), self.now_ns)
        (place,) = self.tables.placed.values()
        for i in self.scanner.unreferenced(place):
            address = next(e.address for e, n in place.backends.items() if n == i)
            self.gone.add(address)  # type: ignore[arg-type]
        self.reconcile()  # shrinks, and clears what is gone

    def tick(self) -> None:
        """Let the program see the injected time."""
        self.clock[...] = self.now_ns

    def send(self, flow: int, flags: int, seq: int, *, full: bool = False) -> IPv4Address | None:
        """One packet; the backend it was sent to, or None. `full`: while the table is full."""
        self.tick()
        flows = self.tables.flows
        if full:
            with contextlib.suppress(ShuntError):  # full is what is wanted
                flows.insert(self.junk)
        out = run_xdp(self.fd, packet(flow, flags, seq))
        if full:
            for index, found in flows.batches():
                junk = found["key"]["proto"] == JUNK
                flows.delete(index[junk], found["word"][junk])
        if out.verdict != XDP_TX or len(out.data) != 74:
            return None
        return IPv4Address(out.data[30:34])

    def _junk(self) -> Lines:
        """As many flows as there are lines, each at home in another."""
        junk = np.zeros(FLOW_TABLE, self.obj.spec("flows").value)
        junk["hash"] = junk["key"]["sport"] = np.arange(FLOW_TABLE)
        junk["key"]["proto"] = JUNK
        junk["word"] = pack(1, State.CONFIRMED, self.now_ns)
        return junk


def history(lab: Lab, seed: int, steps: int = 1500) -> str | None:
    """One random history. Returns None, or the first broken promise in words."""
    rnd = random.Random(seed)
    fresh = (IPv4Address("10.0.0.1") + n for n in range(60000))
    lab.configured |= {next(fresh) for _ in range(rnd.randint(2, 8))}
    lab.reconcile()
    run = _Run(lab, rnd, fresh)
    for _ in range(steps):
        lab.now_s += 1
        run.change()
        if broken := run.traffic():
            return f"seed {seed} at {lab.now_s} s: {broken}"
    return None


class _Run:
    def __init__(self, lab: Lab, rnd: random.Random, fresh: object) -> None:
        self.lab, self.rnd, self.fresh = lab, rnd, fresh
        self.live: dict[int, tuple[IPv4Address, int, int]] = {}  # backend, last packet, isn
        self.affinity_s = lab.affinity_s  # and switched off and on
        self.unprotected: set[int] = set()
        self.flows = rnd.randrange(1 << 20)
        self.back_at: dict[IPv4Address, int] = {}

    def change(self) -> None:
        """Perhaps the backends change, the agent restarts, or the scan runs."""
        lab, rnd = self.lab, self.rnd
        for address in [a for a, t in self.back_at.items() if lab.now_s >= t]:
            del self.back_at[address]
            lab.failing.discard(address)
            lab.reconcile()
        taking = lab.configured - lab.drained - lab.failing
        x = rnd.random()
        if x < 0.01 and len(lab.configured) < 60:
            for _ in range(rnd.choice([1, 1, 3, 20])):
                lab.configured.add(next(self.fresh))  # type: ignore[call-overload]
        elif x < 0.017 and len(taking) > 2:
            lab.drained.add(rnd.choice(sorted(taking)))
        elif x < 0.02 and len(taking) > 2:
            address = rnd.choice(sorted(taking))
            lab.failing.add(address)
            self.back_at[address] = lab.now_s + rnd.randint(3, 20)
        elif x < 0.023 and len(taking) > 2:  # its process ended: nothing to lose
            address = rnd.choice(sorted(lab.configured))
            lab.configured.discard(address)
            lab.gone.add(address)
        elif x < 0.027 and len(taking) > 2:  # out of the configuration, alive
            address = rnd.choice(sorted(taking))
            lab.configured.discard(address)
            lab.removed.add(address)
        elif x < 0.03 and lab.drained:
            lab.drained.discard(rnd.choice(sorted(lab.drained)))
        elif x < 0.034 and lab.removed - lab.gone:  # and in again
            address = rnd.choice(sorted(lab.removed - lab.gone))
            lab.removed.discard(address)
            lab.configured.add(address)
        elif x < 0.036 and self.affinity_s:
            lab.affinity_s = 0 if lab.affinity_s else self.affinity_s
        elif x < 0.04:
            lab.restart()
        elif x < 0.08:
            return lab.scan()
        else:
            return None
        if rnd.random() < 0.2:  # the agent is killed half-way, and starts again
            planned = lab.reconcile(stop_after=rnd.randrange(4))
            lab.restart()
            if planned and rnd.random() < 0.5:
                return None  # and has not caught up before the next packet
        lab.reconcile()
        return None

    def traffic(self) -> str | None:
        """A packet of a new flow, or of a live one."""
        lab, rnd = self.lab, self.rnd
        full = rnd.random() < (0.3 if lab.failing else 0.05)
        if rnd.random() < 0.35:
            return self._open(full)
        if not self.live:
            return None
        flow = rnd.choice(list(self.live))
        backend, last, isn = self.live[flow]
        if backend in lab.failing:
            # A failing backend gets no packets, but what is remembered is not forgotten.
            if lab.now_s - last <= IDLE_S and self._is_remembered(flow):
                lab.send(flow, ACK, (isn + 1) % (1 << 32))
            return None
        dead = backend in lab.gone or (backend not in lab.configured and backend not in lab.removed)
        if lab.now_s - last > IDLE_S or dead:
            del self.live[flow]
            return None
        if rnd.random() < 0.02:
            lab.send(flow, FIN | ACK, (isn + 9) % (1 << 32))
            del self.live[flow]
            return None
        # A repeated SYN follows what is remembered; where nothing is, it is somebody else's.
        again = rnd.random() < 0.1 and self._is_remembered(flow)
        if not again and rnd.random() < 0.05:
            lab.send(flow, SYN, (isn + (1 << 31)) % (1 << 32), full=full)
        got = lab.send(flow, SYN if again else ACK, (isn + (not again)) % (1 << 32), full=full)
        if got == backend:
            self.live[flow] = (backend, lab.now_s, isn)
            return None
        del self.live[flow]
        if flow in self.unprotected:
            return None
        return f"flow {flow} of {backend} went to {got}"

    def _open(self, full: bool) -> str | None:
        lab = self.lab
        self.flows += 1
        isn = self.rnd.randrange(1 << 32)
        before = self._unprotected_events()
        backend = lab.send(self.flows, SYN, isn, full=full)
        second = lab.send(self.flows, ACK, (isn + 1) % (1 << 32), full=full)
        if self._unprotected_events() != before:
            self.unprotected.add(self.flows)
        if backend is None:
            return None
        if backend != second:
            return f"flow {self.flows} lost in its handshake: {backend}, then {second}"
        self.live[self.flows] = (backend, lab.now_s, isn)
        return None

    def _unprotected_events(self) -> int:
        return int(self.lab.obj.maps["events"].totals()["times"][3])

    def _is_remembered(self, flow: int) -> bool:
        found = self.lab.tables.flows.flows()
        raw = packet(flow, SYN, 0)
        source, port = int.from_bytes(raw[26:30], "big"), int.from_bytes(raw[34:36], "big")
        saddr = found["key"]["saddr"][:, 12:].copy().view(">u4").reshape(-1)
        mine = found[(found["key"]["sport"] == port) & (saddr == source)]
        return bool((self.lab.now_ns - seen_ns(mine["word"]) < IDLE_S * NS_PER_S).any())
