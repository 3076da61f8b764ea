# SPDX-License-Identifier: Apache-2.0
"""Streams of packets through a program: the wrapper's and the references' side of a benchmark."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from perf import tables
from perf.tables import FLOWS
from shunt.kern.maps import Map, MapSpec
from shunt.kern.objects import Object
from shunt.kern.testrun import Ran, run_xdp

FOLDER = Path(__file__).parent
SYN, ACK = 0x02, 0x10
_PROG_ARRAY = 3
_SEED = 0x9E3779B97F4A7C15
_U4 = np.dtype("<u4")


@dataclass(frozen=True)
class Stream:
    """The packets of one case. `flows` is a power of two."""

    flows: int = 1
    services: int = 1
    ipv6: bool = False
    in_order: bool = False  # each flow's packet in turn; otherwise at random
    flags: int = ACK
    port: int = tables.PORT
    first_service: int = 0


class Driver:
    """The wrapper, loaded: sends a stream through any loaded XDP program."""

    def __init__(self) -> None:
        """Raises: ShuntError."""
        self.object = Object(FOLDER / "wrapper.bpf.o")
        self.object.load()
        self._traffic = self.object.variable(".bss", "traffic")
        # The kernel keeps no types with an array of programs.
        spec = MapSpec("target", _PROG_ARRAY, _U4, _U4, 1, 0)
        self._target = Map(self.object.maps["target"].fd, spec)
        self._next_new = 0

    def close(self) -> None:
        """Unload the wrapper."""
        self.object.close()

    def aim(self, fd: int, stream: Stream, *, first_flow: int = 0) -> None:
        """Choose the program and begin the stream: equal streams are equal packet by packet."""
        t = self._traffic
        t["state"] = first_flow if stream.in_order else _SEED
        t["last_flow"], t["services"] = stream.flows - 1, stream.services
        t["source4"] = int(tables.CLIENTS4)
        t["vip4"] = int(tables.VIPS4) + stream.first_service
        t["source6"] = struct.unpack(">III", tables.CLIENTS6.packed[:12])
        t["vip6"] = struct.unpack(">III", tables.VIPS6.packed[:12])
        t["port"], t["tcp_flags"], t["in_order"] = stream.port, stream.flags, stream.in_order
        self._target.update(0, np.array(fd, _U4))
        self._wrapper = self.object.programs["wrap_ipv6" if stream.ipv6 else "wrap_ipv4"].fd

    def send(self, packets: int) -> Ran:
        """The stream's next packets through the program."""
        # The wrapper makes the frame; it only wants room for one.
        return run_xdp(self._wrapper, bytes(128), repeat=packets)

    def aim_at_new_flows(self, fd: int, stream: Stream, packets: int) -> None:
        """Like `aim`, but with flows that no stream had before, `packets` of them at most."""
        self.aim(fd, replace(stream, in_order=True, flows=1 << 32), first_flow=self._next_new)
        self._next_new += packets


class References:
    """perf/reference.bpf.c, loaded, with room for as many flows as a balancer has."""

    def __init__(self, services: int = 1) -> None:
        """Raises: ShuntError."""
        self.object = Object(FOLDER / "reference.bpf.o")
        entries = 1 << (10 * services).bit_length()
        names = ("ref_services", "ref_svc_count", "ref_backends", "ref_bck_count")
        sizes = dict.fromkeys(names, max(64, entries))
        self.object.set_entries(sizes | {"ref_flows": FLOWS, "ref_flows_long": FLOWS})
        self.object.load()
        maps, ids = self.object.maps, np.arange(services, dtype=_U4)
        keys = maps["ref_services"].new_keys(services)
        keys["vip"][:, 12:] = tables.mapped(int(tables.VIPS4) + ids)[:, 12:]
        keys["port"], keys["proto"] = tables.PORT, 6
        maps["ref_services"].update_many(keys, ids)
        numbers = np.arange(10 * services)
        backends = maps["ref_backends"].new_values(len(numbers))
        backends["addr"] = int(tables.BACKENDS4) + numbers
        backends["macs"] = (2, 0, 0, 0, 0, 3, 2, 0, 0, 0, 0, 1)
        maps["ref_backends"].update_many(numbers.astype(_U4), backends)

    def close(self) -> None:
        """Unload the programs and free their maps."""
        self.object.close()

    def fd(self, name: str) -> int:
        """Of a program, by what follows `ref_`."""
        return self.object.programs[f"ref_{name}"].fd


def frame_is_sound(frame: bytes) -> bool:
    """Whether lengths and checksums of the wrapper's Ethernet frame are right."""
    if frame[12:14] == b"\x08\x00":
        header, addresses = frame[14:34], frame[26:34]
        length = int.from_bytes(frame[16:18], "big")
        sound = _sum(header) == 0xFFFF and len(frame) == 14 + length
        segment = frame[34:]
    else:
        addresses, segment = frame[22:54], frame[54:]
        sound = int.from_bytes(frame[18:20], "big") == len(segment)
    pseudo = addresses + struct.pack(">HH", 6, len(segment))
    return sound and _sum(pseudo + segment) == 0xFFFF


def _sum(data: bytes) -> int:
    """The ones' complement sum of 16-bit words (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    total = sum(memoryview(data)[::2]) * 256 + sum(memoryview(data)[1::2])
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total
