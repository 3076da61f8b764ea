# SPDX-License-Identifier: Apache-2.0
"""Random histories of one service through the real program, against an oracle that remembers all.

The promise: no packet of a TCP flow whose backend is up, and that is not idle beyond the window,
ever reaches another backend; nor of a UDP flow that sent its last within the grace period. One
exception is stated: a flow that finds the table full while its slot's `prev` is down may move at
the slot's next change.

Time is injected: a step is a second, TCP's idle window 50 of them, UDP's grace period 10. The
agent's side is the product's: Planner, Applier and Scanner on the maps of the loaded program.
"""

from __future__ import annotations

import contextlib
import random
import struct
from collections import Counter
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
from tests.packets.balancer import empty
from tests.packets.moves import SCAN, Moves

IDLE_S = 50
GRACE_S, UDP_IDLE_S, UDP_FLOWS = 10, 60, 12
SLOTS_PER_BACKEND = 20  # the product: 100; fewer make collisions of flows likelier
FLOW_TABLE = 512  # lines
JUNK = 255  # no protocol that is balanced
START_S = 1000
VIP = IPv4Address("203.0.113.10")
CLIENT, CLIENTS = IPv4Address("192.0.2.0"), 32
FIN, SYN, ACK = 0x01, 0x02, 0x10
XDP_TX = 3


def client_of(flow: int) -> tuple[int, int]:
    """A numbered flow's source address and port."""
    return int(CLIENT) + flow % CLIENTS, 1024 + (flow // CLIENTS & 0x3FFF)


def packet(flow: int, flags: int, seq: int, protocol: Protocol = Protocol.TCP) -> bytes:
    """A segment, or a datagram as long, of a numbered flow to the VIP; checksums are not looked at
    in DSR."""
    source, port = client_of(flow)
    if protocol is Protocol.UDP:
        body = struct.pack("!HHHH", port, 80, 20, 0) + bytes(12)
    else:
        body = struct.pack("!HHIIBBHHH", port, 80, seq, 0, 5 << 4, flags, 8192, 0, 0)
    ip = struct.pack("!BBHHHBBHII", 0x45, 0, 40, 0, 0, 64, protocol, 0, source, int(VIP))
    return bytes(12) + b"\x08\x00" + ip + body


@dataclass
class Lab:
    """The loaded program with one service, and the agent's hands on it."""

    path: Path
    scanner_class: type[Scanner] = Scanner
    now_s: int = START_S
    mode: Mode = Mode.DSR_IPIP
    protocol: Protocol = Protocol.TCP
    idle_s: int = IDLE_S
    scans: float = SCAN
    affinity_s: int = 0
    affine: bool = True  # whether it is in force
    hash_by: Literal["tuple", "client"] = "tuple"
    sources: tuple[SourceRule, ...] = ()
    quic: Quic | None = None  # a backend's server id is its address
    sizes: Mapping[str, int] = field(default_factory=dict)
    configured: set[IPv4Address] = field(default_factory=set)
    drained: set[IPv4Address] = field(default_factory=set)
    failing: set[IPv4Address] = field(default_factory=set)
    removed: set[IPv4Address] = field(default_factory=set)  # out of the configuration, alive
    gone: set[IPv4Address] = field(default_factory=set)
    weights: dict[IPv4Address, int] = field(default_factory=dict)
    overrides: dict[IPv4Address, int] = field(default_factory=dict)  # the operator's

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
        self.event = self.obj.btf.enum("event", "EVENT_")
        self.junk = self._junk()
        self._begin()

    def _begin(self) -> None:
        hop = self.obj.maps["nexthops"].mapped()
        hop["dmac"][1], hop["mtu"][1], hop["ifindex"][1] = 2, 1500, 1
        self.restart()

    def empty(self) -> None:
        """As it was when it was loaded, which takes as long as a history does."""
        empty(self.obj)
        for addresses in (self.configured, self.drained, self.failing, self.removed, self.gone):
            addresses.clear()
        self.weights.clear()
        self.overrides.clear()
        self.affine, self.now_s = True, START_S
        self._begin()

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
        return Condition(
            up=address not in self.failing,
            drained=address in self.drained,
            weight=self.overrides.get(address, 0),  # type: ignore[arg-type]
        )

    def targets(self) -> dict[str, Target]:
        """The service as configured now."""
        service = Service(
            name="web",
            vips=(VIP,),
            ports=(Port(80, self.protocol),),
            mode=self.mode,
            backends=tuple(
                Backend(
                    a,
                    weight=self.weights.get(a, 1),
                    server_id=a.packed if self.quic else b"",
                )
                for a in sorted(self.configured)
            ),
            quic=self.quic,
            tcp_idle_s=float(self.idle_s),
            udp_idle_s=float(UDP_IDLE_S),
            udp_window_s=float(GRACE_S),
            slots_per_backend=SLOTS_PER_BACKEND,
            affinity_s=float(self.affinity_s if self.affine else 0),
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
        out = run_xdp(self.fd, packet(flow, flags, seq, self.protocol))
        if full:
            for index, found in flows.batches():
                junk = found["key"]["proto"] == JUNK
                flows.delete(index[junk], found["word"][junk])
        if out.verdict != XDP_TX or len(out.data) != 74:
            return None
        return IPv4Address(out.data[30:34])

    def times(self, event: str) -> int:
        """How often an event has happened; by its name in enum event."""
        return int(self.obj.maps["events"].totals()["times"][self.event[event]])

    def is_remembered(self, flow: int) -> bool:
        """Whether a flow's entry would be followed."""
        found = self.tables.flows.flows()
        source, port = client_of(flow)
        saddr = found["key"]["saddr"][:, 12:].copy().view(">u4").reshape(-1)
        mine = found[(found["key"]["sport"] == port) & (saddr == source)]
        idle_s = UDP_IDLE_S if self.protocol is Protocol.UDP else IDLE_S
        return bool((self.now_ns - seen_ns(mine["word"]) < idle_s * NS_PER_S).any())

    def _junk(self) -> Lines:
        """As many flows as there are lines, each at home in another."""
        junk = np.zeros(FLOW_TABLE, self.obj.spec("flows").value)
        junk["hash"] = junk["key"]["sport"] = np.arange(FLOW_TABLE)
        junk["key"]["proto"] = JUNK
        junk["word"] = pack(1, State.CONFIRMED, self.now_ns)
        return junk


def history(lab: Lab, seed: int, steps: int = 1500, done: Counter[str] | None = None) -> str | None:
    """One random history. Returns None, or the first broken promise in words.

    Shape: `done` counts the moves that it is about.
    """
    rnd = random.Random(seed)
    fresh = (IPv4Address("10.0.0.1") + n for n in range(60000))
    lab.configured |= {next(fresh) for _ in range(rnd.randint(2, 8))}
    lab.reconcile()
    moves = Moves(lab, rnd, fresh)
    oracle = _Datagrams(lab, rnd) if lab.protocol is Protocol.UDP else _Connections(lab, rnd)
    for _ in range(steps):
        lab.now_s += 1
        moves.change()
        if broken := oracle.traffic():
            return f"seed {seed} at {lab.now_s} s: {broken}"
    if done is not None:
        done.update(moves.done)
    return None


class _Oracle:
    """Remembers every flow."""

    def __init__(self, lab: Lab, rnd: random.Random) -> None:
        self.lab, self.rnd = lab, rnd
        self.flows = rnd.randrange(1 << 20)
        self.unprotected: set[int] = set()

    def begin(self, flags: int, seq: int, full: bool) -> IPv4Address | None:
        """A new flow's first packet; whose it is. Its number is `self.flows`."""
        self.flows += 1
        return self.noting(self.flows, flags, seq, full)

    def noting(self, flow: int, flags: int, seq: int, full: bool) -> IPv4Address | None:
        """One packet, noting whether its flow is now one that may move."""
        if not full:  # by itself it never is
            return self.lab.send(flow, flags, seq)
        before = self.lab.times("FLOW_UNPROTECTED")
        backend = self.lab.send(flow, flags, seq, full=True)
        if self.lab.times("FLOW_UNPROTECTED") != before:
            self.unprotected.add(flow)
        return backend

    def is_full(self) -> bool:
        """Whether the flow table is to be full for the next packet."""
        return self.rnd.random() < (0.3 if self.lab.failing else 0.05)

    def is_dead(self, backend: IPv4Address) -> bool:
        """Whether there is nothing left to lose at it."""
        lab = self.lab
        return backend in lab.gone or backend not in lab.configured | lab.removed


class _Connections(_Oracle):
    """TCP."""

    def __init__(self, lab: Lab, rnd: random.Random) -> None:
        super().__init__(lab, rnd)
        self.live: dict[int, tuple[IPv4Address, int, int]] = {}  # backend, last packet, isn

    def traffic(self) -> str | None:
        """A packet of a new flow, or of a live one."""
        lab, rnd = self.lab, self.rnd
        full = self.is_full()
        if rnd.random() < 0.35:
            return self._open(full)
        if not self.live:
            return None
        flow = rnd.choice(list(self.live))
        backend, last, isn = self.live[flow]
        if backend in lab.failing:
            # A failing backend gets no packets, but what is remembered is not forgotten.
            if lab.now_s - last <= IDLE_S and lab.is_remembered(flow):
                lab.send(flow, ACK, (isn + 1) % (1 << 32))
            return None
        if lab.now_s - last > IDLE_S or self.is_dead(backend):
            del self.live[flow]
            return None
        if rnd.random() < 0.02:
            lab.send(flow, FIN | ACK, (isn + 9) % (1 << 32))
            del self.live[flow]
            return None
        # A repeated SYN follows what is remembered; where nothing is, it is somebody else's.
        again = rnd.random() < 0.1 and lab.is_remembered(flow)
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
        isn = self.rnd.randrange(1 << 32)
        backend = self.begin(SYN, isn, full)
        second = self.noting(self.flows, ACK, (isn + 1) % (1 << 32), full)
        if backend is None:
            return None
        if backend != second:
            return f"flow {self.flows} lost in its handshake: {backend}, then {second}"
        self.live[self.flows] = (backend, self.lab.now_s, isn)
        return None


class _Datagrams(_Oracle):
    """UDP: what was sent last within the grace period counts, and a removed backend is no more."""

    def __init__(self, lab: Lab, rnd: random.Random) -> None:
        super().__init__(lab, rnd)
        self.live: dict[int, tuple[IPv4Address, int]] = {}  # backend, last packet

    def traffic(self) -> str | None:
        """Perhaps a new flow; and some of the live ones speak, as seldom as they may or oftener."""
        lab, rnd = self.lab, self.rnd
        if len(self.live) < UDP_FLOWS and rnd.random() < 0.5:
            backend = self.begin(0, 0, self.is_full())
            if backend is not None:
                self.live[self.flows] = (backend, lab.now_s)
        for flow, (backend, last) in list(self.live.items()):
            if lab.now_s - last < GRACE_S and rnd.random() < 0.8:
                continue
            if broken := self._speak(flow, backend, last):
                return broken
        return None

    def _speak(self, flow: int, backend: IPv4Address, last: int) -> str | None:
        lab, rnd = self.lab, self.rnd
        if backend in lab.failing:
            # It gets no packets, but a flow that is remembered comes back to it.
            if lab.is_remembered(flow):
                lab.send(flow, 0, 0)
                self.live[flow] = (backend, lab.now_s)
            return None
        out = backend not in lab.configured or lab.now_s - last > GRACE_S
        if out or rnd.random() < 0.02:
            del self.live[flow]
            return None
        got = self.noting(flow, 0, 0, self.is_full())
        if got == backend or flow in self.unprotected:
            self.live[flow] = (got or backend, lab.now_s)
            return None
        return f"flow {flow} of {backend} went to {got}"
