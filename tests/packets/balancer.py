# SPDX-License-Identifier: Apache-2.0
"""The real balancer, loaded, with tables that a test writes by hand and a clock it sets.

Packets go through BPF_PROG_TEST_RUN: no interface, no namespace and no bpffs is needed. They
come in on the loopback interface; a next hop there is sent to by XDP_TX, any other by
XDP_REDIRECT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Any, Self

import numpy as np
from scapy.packet import Packet

from shunt.agent.options import SourceSets, flags, record
from shunt.kern.flows import FlowTable
from shunt.kern.libbpf import (
    BPF_F_MMAPABLE,
    MAP_ARRAY,
    MAP_PERCPU_ARRAY,
    MAP_PROG_ARRAY,
    MAP_RINGBUF,
)
from shunt.kern.maps import Map
from shunt.kern.objects import Object
from shunt.kern.ring import Ring
from shunt.kern.testrun import Ran, run_xdp
from shunt.lb.compile import Options
from shunt.lb.frontends import FrontendTable, shortcut, shortcuts
from shunt.lb.model import ANY_PORT, Frontend, Protocol
from shunt.xdp.attach import fit
from shunt.xdp.resize import service_words
from tests.packets.frames import OWN_MAC, verify

OBJECT = Path(__file__).resolve().parents[2] / "xdp/lb.bpf.o"

with Object(OBJECT) as _object:
    Reason: Any = _object.btf.enum("reason", "REASON_")
    Event: Any = _object.btf.enum("event", "EVENT_")
    Slot: Any = _object.btf.enum("slot_state", "SLOT_")
    Flag: Any = _object.btf.enum("backend_flag", "BACKEND_")
    Flow: Any = _object.btf.enum("flow_state", "FLOW_")
    Mode: Any = _object.btf.enum("mode", "MODE_")
    SvcFlag: Any = _object.btf.enum("svc_flag", "SVC_")
    SAMPLE = _object.btf.struct("sample")

TCP, UDP, SCTP = 6, 17, 132
LOOPBACK, ELSEWHERE = 1, 7
S = 1_000_000_000
# Where the test's time begins: long after zero, as on a host that has been up for a while.
START_NS = 100_000 * S
UP: int = Flag.KNOWN | Flag.UP
BACKEND_MAC = "02:00:00:00:00:03"
OWN4, OWN6 = "10.0.0.254", "fd00::fe"

CONFIG: Mapping[str, Any] = {
    "hash_seed": 0x5EED,
    "nat_key": (0x0706050403020100, 0x0F0E0D0C0B0A0908),
    "ipip_saddr4": "198.18.0.0",
    "ipip_saddr6": "100::",
    "ipip_spread4": 0xFFFF,
    "ipip_spread6": 0xFFFFFFFF,
    "inserts_per_s": 1000,
    "answers_per_s": 1000,
    "samples_per_s": 1000,
    "nat_port_min": 10000,
    "nat_port_count": 20000,
    "check_mark": 83 << 24,
    "test_clock": 1,
}


def mapped(address: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """16 bytes as the tables hold them: IPv6, or IPv4-mapped."""
    ip = ip_address(address)
    if ip.version == 4:
        ip = IPv6Address(f"::ffff:{address}")
    return np.frombuffer(ip.packed, np.uint8)


def mac(text: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.frombuffer(bytes.fromhex(text.replace(":", "")), np.uint8)


def empty(loaded: Object) -> None:
    """Maps as they are created; variables, rings and program arrays stay."""
    for name, found in loaded.maps.items():
        if "." in name or found.spec.type in (MAP_RINGBUF, MAP_PROG_ARRAY):
            continue
        if found.spec.flags & BPF_F_MMAPABLE:
            found.mapped().view(np.uint8)[:] = 0
        elif found.spec.type in (MAP_ARRAY, MAP_PERCPU_ARRAY):
            for index in range(found.spec.entries):
                found.clear(index)
        else:
            found.delete_many(found.items()[0])


@dataclass(frozen=True)
class Out:
    """What became of one packet: counters are what it added to them."""

    verdict: int
    data: bytes
    reasons: dict[Any, int]
    events: dict[Any, int]

    @property
    def packet(self) -> Packet:
        """The outgoing frame, every length and checksum in it verified."""
        return verify(self.data)

    @property
    def said(self) -> tuple[int, dict[Any, int]]:
        return self.verdict, self.reasons


@dataclass
class Service:
    """A service in the tables, and the ids of its backends in the order they were given."""

    lb: Balancer
    id: int
    first: int
    slots: int
    backends: list[int] = field(default_factory=list)

    def ask(self, **options: Any) -> None:
        """What it asks for beyond balancing: fields of shunt.lb.compile.Options."""
        asked = Options(**options)
        sets = SourceSets(self.lb.map("sources"))
        source_set = sets.new_id() if asked.sources else 0
        if asked.sources:
            sets.put(source_set, asked.sources)
        dtype = self.lb.map("svc_options").spec.value
        raw = record(asked, source_set, dtype)
        self.lb.map("svc_options").mapped()[self.id] = np.frombuffer(raw, dtype)[0]
        self.change(flags=flags(asked, SvcFlag))

    def change(self, **fields: int) -> None:
        """Write fields of its record, struct svc_val, and what is derived from it."""
        records = self.lb.map("svc").mapped()
        for name, value in fields.items():
            records[name][self.id] = value
        self.lb.frontends().refresh(shortcuts(records))

    def set_slots(self, cur: int | Sequence[int], prev: int = 0, state: int = Slot.SETTLED) -> None:
        """Write all slots: `cur` is one backend id, or several in turn."""
        owners = np.resize(np.atleast_1d(np.asarray(cur, np.uint64)), self.slots)
        words = owners | np.uint64(prev << 24) | np.uint64(state << 48)
        view = self.lb.map("slots").mapped()
        view["word"][self.first : self.first + self.slots] = words

    def move(self, cur: int = 1, prev: int = 0) -> None:
        """All slots moving from one of the service's backends to another (by position)."""
        self.set_slots(self.backends[cur], self.backends[prev], Slot.MOVING)

    def linger(self, cur: int = 1, prev: int = 0) -> None:
        self.set_slots(self.backends[cur], self.backends[prev], Slot.LINGERING)

    def restarted(self) -> int:
        """How many of its slots' quiet windows the program has begun anew."""
        flags = self.lb.map("restarts").mapped()["slot"].reshape(-1)
        return int(flags[self.first : self.first + self.slots].sum())


class Balancer:
    """The loaded program. `sizes` are entries of maps; `config` overrides CONFIG.

    With `hooks` also the programs that only packets with a hook go through: twice the loading.
    On `maps` that exist, if they are given.
    """

    path = OBJECT

    def __init__(
        self,
        sizes: Mapping[str, int] | None = None,
        *,
        hooks: bool = False,
        maps: Mapping[str, Map] | None = None,
        **config: Any,
    ) -> None:
        self.object = Object(self.path)
        if not hooks and self.path == OBJECT:
            self.object.keep_programs("shunt_lb")
        settings = self.object.variable(".rodata", "config")
        for name, value in {**CONFIG, **config}.items():
            settings[name] = mapped(value) if isinstance(value, str) else value
        self.nat_ports = range(
            int(settings["nat_port_min"]),
            int(settings["nat_port_min"]) + int(settings["nat_port_count"]),
        )
        self.object.set_entries(sizes or {})
        fit(self.object)
        self.config = settings.copy()
        for name in maps or {}:
            self.object.reuse(name, (maps or {})[name].fd, name)
        self.object.load()
        self.clock = self.object.variable(".bss", "test_now_ns")
        self.closed = False
        self._received: list[bytes] = []
        self.ring = Ring(self.map("samples").fd, self._received.append)
        self._begin()

    def _begin(self) -> None:
        self.clock[...] = START_NS
        self._next = {"svc": 1, "slots": 0, "backends": 1, "nexthops": 1}

    def empty(self) -> None:
        """As it was when it was loaded, which takes a hundred times as long."""
        self.samples()
        empty(self.object)
        self._begin()

    def close(self) -> None:
        self.closed = True
        self.ring.close()
        self.object.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def map(self, name: str) -> Any:
        return self.object.maps[name]

    def advance(self, seconds: float) -> None:
        self.clock[...] += np.uint64(int(seconds * S))

    # Tables --------------------------------------------------------------------------------

    def _take(self, what: str, count: int = 1) -> int:
        first = self._next[what]
        self._next[what] += count
        return first

    def open_port(self, proto: int, *ports: int) -> None:
        view = self.map("ports").mapped()["bits"]
        first = (TCP, UDP, SCTP).index(proto) * 1024
        if ANY_PORT in ports:
            view[first : first + 1024] = ~np.uint64(0)
            self.map("meta").mapped()["any_port"] |= 1 << first // 1024
        for port in ports:
            view[first + port // 64] |= np.uint64(1 << port % 64)

    def exclude_ports(self, proto: int, *ports: int) -> None:
        """What no new flow may get."""
        view = self.map("nat_excluded").mapped()["bits"]
        for port in ports:
            view[(TCP, UDP, SCTP).index(proto) * 1024 + port // 64] |= np.uint64(1 << port % 64)

    def add_nexthop(
        self,
        saddr: str | None = OWN4,
        *,
        mtu: int = 1500,
        ifindex: int = LOOPBACK,
        dmac: str = BACKEND_MAC,
    ) -> int:
        index = self._take("nexthops")
        hop = self.map("nexthops").mapped()[index]
        hop["dmac"], hop["smac"] = mac(dmac), mac(OWN_MAC)
        hop["mtu"], hop["ifindex"] = mtu, ifindex
        if saddr:
            hop["saddr"] = mapped(saddr)
        return index

    def add_backend(self, svc: int, address: str, *, port: int = 0, nexthop: int = -1) -> int:
        """Returns its id. Without a next hop it gets one of its own; 0 is none."""
        if nexthop < 0:
            nexthop = self.add_nexthop(OWN6 if ":" in address else OWN4)
        index = self._take("backends")
        backend = self.map("backends").mapped()[index]
        backend["addr"], backend["svc"], backend["nexthop"] = mapped(address), svc, nexthop
        backend["port"] = port
        backend["flags"] = UP | (Flag.IPV6 if ":" in address else 0)
        return index

    def set_flags(self, backend: int, flags: int) -> None:
        """Replace KNOWN, UP and the like; the family stays."""
        row = self.map("backends").mapped()[backend]
        row["flags"] = flags | (int(row["flags"]) & Flag.IPV6)

    def add_service(
        self,
        vip: str,
        port: int = 80,
        proto: int = TCP,
        mode: str = "dsr-ipip",
        backends: Sequence[str] = (),
        *,
        slots: int = 64,
        idle_s: float = 8000,
        backend_port: int = 0,
        nexthop: int = -1,
    ) -> Service:
        """A frontend and its backends, all slots settled, the backends in turn.

        Shape: `slots` is a power of two.
        """
        service = Service(self, self._take("svc"), self._take("slots", slots), slots)
        row = self.map("svc").mapped()[service.id]
        row["region"] = service.first << 8 | slots.bit_length() - 1
        row["idle_ns"], row["proto"] = int(idle_s * S), proto
        row["mode"] = Mode[mode.upper().replace("-", "_")]
        service.backends = [
            self.add_backend(service.id, address, port=backend_port, nexthop=nexthop)
            for address in backends
        ]
        service.set_slots(service.backends or 0)
        self.add_frontend(service, vip, port, proto)
        if mode == "nat":
            self.open_port(proto, *self.nat_ports)
        return service

    def add_frontend(self, service: Service, vip: str, port: int, proto: int = TCP) -> None:
        frontend = Frontend(ip_address(vip), port, Protocol(proto))
        record = self.map("svc").mapped()[service.id]
        told = (int(record[name]) for name in ("mode", "flags", "region"))
        self.frontends().put(frontend, service.id, shortcut(service.id, *told))
        self.open_port(proto, port)

    def frontends(self) -> FrontendTable:
        """Map services as it stands."""
        return FrontendTable(service_words(self.map("services")))

    # Packets -------------------------------------------------------------------------------

    def run(self, packet: Packet | bytes, program: int = -1) -> Out:
        """One packet through the program (or through another that tail-calls it)."""
        fd = program if program >= 0 else self.object.programs["shunt_lb"].fd
        return self._counting(lambda: run_xdp(fd, bytes(packet)))

    def run_without_headroom(self, frame: bytes) -> Out:
        """A frame of 128 bytes, from a driver that leaves no room in front."""
        assert len(frame) == 128
        with Object(Path(__file__).with_name("headroom.bpf.o")) as driver:
            driver.load()
            program = np.array(self.object.programs["shunt_lb"].fd, np.uint32)
            driver.maps["next"].update(0, program)
            return self.run(frame, driver.programs["shunt_headroom"].fd)

    def _counting(self, run: Callable[[], Ran]) -> Out:
        before = self._counts()
        ran = run()
        reasons, events = (
            {kind(i): int(n) for i, n in enumerate(after - was) if n}
            for kind, was, after in zip((Reason, Event), before, self._counts(), strict=True)
        )
        return Out(ran.verdict, ran.data, reasons, events)

    def _counts(self) -> tuple[Any, Any]:
        return self.map("reasons").totals()["packets"], self.map("events").totals()["times"]

    def counts(self, name: str) -> Any:
        """Map svc_stats or backend_stats, summed over processors. Shape: (ids,) of struct count."""
        of = {"svc_stats": "svc", "backend_stats": "backends"}[name]
        cells = self.map(name).mapped().reshape(-1, self.map(of).spec.entries)
        out = np.zeros(cells.shape[1], cells.dtype)
        for field_name in cells.dtype.names or ():
            out[field_name] = cells[field_name].sum(axis=0)
        return out

    def backend_of(self, packet: Packet) -> str:
        """Whom a packet is sent to (modes that address the backend)."""
        out = self.run(packet)
        assert out.reasons == {Reason.SENT_TO_BACKEND: 1}, out.reasons
        return str(out.packet.payload.dst)

    def samples(self) -> Any:
        """The samples that came since the last call. Shape: records of `struct sample`."""
        self.ring.consume()
        got = np.frombuffer(b"".join(self._received), SAMPLE)
        self._received.clear()
        return got

    def flows(self) -> Any:
        """Remembered flows. Shape: records of `struct flow_line`."""
        return FlowTable(self.map("flows").mapped()).flows()

    def entries(self, name: str) -> list[tuple[Any, Any]]:
        """All elements of a hash, as (key, value) records."""
        keys, values = self.map(name).items()
        return list(zip(keys, values, strict=True))
