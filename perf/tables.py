# SPDX-License-Identifier: Apache-2.0
"""A loaded balancer with tables of a given size, written straight into its maps.

The daemon is left out on purpose: what is measured is the program over tables of the shape that
the daemon writes, and 10,000 services are there in a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import numpy as np

from shunt.kern.flows import FlowTable
from shunt.kern.maps import Map
from shunt.kern.objects import Object
from shunt.lb import maglev, slots
from shunt.lb.frontends import FrontendTable, lines_for, shortcuts
from shunt.lb.model import Frontend, Mode, Protocol
from shunt.lb.slots import State
from shunt.xdp.attach import fit
from shunt.xdp.resize import service_words

OBJECT = Path(__file__).parent.parent / "xdp/lb.bpf.o"

# Networks set aside for benchmarks (RFC 2544, RFC 5180) for what is addressed to the balancer.
CLIENTS4, VIPS4 = IPv4Address("10.0.0.0"), IPv4Address("198.19.0.0")
CLIENTS6, VIPS6 = IPv6Address("2001:2:0:1::"), IPv6Address("2001:2:0:2::")
BACKENDS4, BACKENDS6 = IPv4Address("172.16.0.0"), IPv6Address("2001:2:0:3::")
OWN4, OWN6 = IPv4Address("172.31.255.1"), IPv6Address("2001:2:0:4::1")
OUTER4, OUTER6 = IPv4Address("198.18.0.0"), IPv6Address("100::")

PORT = 80
NAT_PORTS = range(10000, 30000)
NEXTHOPS = 1000
# Twice the largest number of flows measured, in every table of flows alike, the references' too.
FLOWS = 1 << 21
# BPF_PROG_TEST_RUN without a context: the packet came in on the loopback interface.
IFINDEX = 1
IDLE_NS = 8000 * 10**9
REGION_LOG2_BITS = 8  # bpf/abi.h


@dataclass(frozen=True)
class Layout:
    """What a balancer serves: services alike, one address each, all on PORT over TCP."""

    mode: Mode
    state: State = State.SETTLED
    services: int = 1
    backends: int = 10  # a service
    ipv6: bool = False

    @property
    def log2(self) -> int:
        """Of a service's slots."""
        return maglev.log2_slots(self.backends)


def mapped(addresses: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """IPv4 addresses as the maps have them. Shape: (n, 16) bytes of (n,) integers."""
    out = np.zeros((len(addresses), 16), np.uint8)
    out[:, 10:12] = 0xFF
    out[:, 12:] = addresses.astype(">u4").view(np.uint8).reshape(-1, 4)
    return out


def row(first: IPv4Address | IPv6Address, numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Addresses that follow `first`. Shape: (n, 16) bytes of (n,) integers."""
    if first.version == 4:
        return mapped(int(first) + numbers)
    out = np.tile(np.frombuffer(first.packed, np.uint8), (len(numbers), 1))
    last = (int(first) & 0xFFFFFFFF) + numbers
    out[:, 12:] = last.astype(">u4").view(np.uint8).reshape(-1, 4)
    return out


class Balancer:
    """shunt_lb, loaded with maps of its own and filled. Close it to unload."""

    def __init__(self, layout: Layout) -> None:
        """Raises: ShuntError, OSError. Nothing stays loaded."""
        self.layout = layout
        self.object = Object(OBJECT)
        try:
            self.object.set_entries(self._sizes())
            self._configure()
            self.object.keep_programs("shunt_lb")
            self.object.load()
            self.maps: dict[str, Map] = self.object.maps
            self._reasons = self.object.btf.enum("reason", "REASON_")
            self._events = self.object.btf.enum("event", "EVENT_")
            self._fill_backends()
            self._fill_slots()
            self._fill_services()
        except BaseException:
            self.object.close()
            raise
        self.fd = self.object.programs["shunt_lb"].fd

    def close(self) -> None:
        """Unload the program and free its maps."""
        self.object.close()

    def counted(self, reason: str) -> int:
        """Packets that left with this reason so far."""
        value = self.maps["reasons"].lookup(int(self._reasons[reason]))
        assert value is not None
        return int(value["packets"].sum())

    def happened(self, event: str) -> int:
        """How often this event has been so far."""
        value = self.maps["events"].lookup(int(self._events[event]))
        assert value is not None
        return int(value["times"].sum())

    def forget(self) -> None:
        """Empty the tables of flows."""
        flows = FlowTable(self.maps["flows"].mapped())
        for index, found in flows.batches():
            flows.delete(index, found["word"])
        for name in ("nat_fwd", "nat_rev"):
            keys, _ = self.maps[name].items()
            self.maps[name].delete_many(keys)

    def _sizes(self) -> dict[str, int]:
        one, nat = self.layout, self.layout.mode == Mode.NAT
        services = 1 << (one.services + 1).bit_length()
        backends = 1 << (one.services * one.backends + 1).bit_length()
        slot_count = one.services << one.log2
        sizes = {"svc": services}
        sizes["services"] = lines_for(services)
        sizes |= {"backends": backends, "slots": slot_count}
        sizes |= {"restarts": slot_count // 8, "nexthops": 4096, "flows": 1024 if nat else FLOWS}
        return sizes | dict.fromkeys(("nat_fwd", "nat_rev"), FLOWS if nat else 1024)

    def _configure(self) -> None:
        config = self.object.variable(".rodata", "config")
        fit(self.object)
        config["nat_key"] = (0x0706050403020100, 0x0F0E0D0C0B0A0908)
        config["ipip_saddr4"] = mapped(np.array([int(OUTER4)]))[0]
        config["ipip_saddr6"] = np.frombuffer(OUTER6.packed, np.uint8)
        config["ipip_spread4"], config["ipip_spread6"] = 0xFFFF, 0xFFFFFFFF
        config["inserts_per_s"] = 0xFFFFFFFF  # a budget would end the cases that insert
        config["nat_port_min"], config["nat_port_count"] = NAT_PORTS.start, len(NAT_PORTS)

    def _fill_backends(self) -> None:
        one, flag = self.layout, self.object.btf.enum("backend_flag", "BACKEND_")
        hops = self.maps["nexthops"].mapped()[1 : NEXTHOPS + 1]
        hops["dmac"], hops["smac"] = (2, 0, 0, 0, 0, 3), (2, 0, 0, 0, 0, 1)
        hops["dmac"][:, 3:5] = np.arange(NEXTHOPS, dtype=">u2").view(np.uint8).reshape(-1, 2)
        hops["mtu"], hops["ifindex"] = 1500, IFINDEX
        hops["saddr"] = row(OWN6 if one.ipv6 else OWN4, np.zeros(1, np.uint32))
        ids = np.arange(1, one.services * one.backends + 1)
        records = self.maps["backends"].mapped()[ids[0] : ids[-1] + 1]
        records["addr"] = row(BACKENDS6 if one.ipv6 else BACKENDS4, ids)
        records["nexthop"] = 1 + ids % NEXTHOPS
        records["svc"] = 1 + (ids - 1) // one.backends
        flags = int(flag["KNOWN"]) | int(flag["UP"]) | (int(flag["IPV6"]) if one.ipv6 else 0)
        records["flags"] = flags

    def _fill_slots(self) -> None:
        """Each service's Maglev table; moving slots all had the next backend before."""
        one, size = self.layout, 1 << self.layout.log2
        words = self.maps["slots"].mapped()["word"].reshape(one.services, size)
        addresses = self.maps["backends"].mapped()["addr"]
        weights = np.ones(one.backends, np.uint32)
        table = np.empty(size, np.uint32)
        for i in range(one.services):
            first = 1 + i * one.backends
            hashes = [
                maglev.hash_identity(a.tobytes()) for a in addresses[first : first + one.backends]
            ]
            maglev.fill_hashed(maglev.hash_array(hashes), weights, table)
            before = table if one.state == State.SETTLED else (table + 1) % one.backends
            words[i] = slots.pack(first + table, first + before, one.state)

    def _fill_services(self) -> None:
        one, modes = self.layout, self.object.btf.enum("mode", "MODE_")
        ids = np.arange(1, one.services + 1)
        svc = self.maps["svc"].mapped()[1 : one.services + 1]
        svc["region"] = ((ids - 1) << one.log2) << REGION_LOG2_BITS | one.log2
        svc["idle_ns"], svc["proto"] = IDLE_NS, 6
        svc["mode"] = int(modes[one.mode.name])
        bits = self.maps["ports"].mapped()["bits"]
        for port in (PORT, *(NAT_PORTS if one.mode == Mode.NAT else ())):
            bits[port >> 6] |= np.uint64(1 << (port & 63))
        table = FrontendTable(service_words(self.maps["services"]))
        first = VIPS6 if one.ipv6 else VIPS4
        ways = shortcuts(self.maps["svc"].mapped()[: one.services + 1]).tolist()
        for i in range(one.services):
            table.put(Frontend(first + i, PORT, Protocol.TCP), i + 1, ways[i + 1])
