# SPDX-License-Identifier: Apache-2.0
"""Many services behind one shuntd, watched from outside: through its API, and in its maps.

```
    lb                             outside
    eth0 198.51.100.1/24 --------- eth0 198.51.100.2    the gateway of all backends, 10.0.0.0/8
    shuntd
```
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import numpy as np

from shunt.cli.client import Client, Unreachable
from shunt.kern.maps import Map
from shunt.lab.netns import Namespace, Process, veth
from shunt.lab.topology import BPFFS, remove_tree
from shunt.lb import maglev
from shunt.lb import slots as slot
from shunt.lb.compile import mapped
from shunt.lb.errors import ShuntError

# Set aside for benchmarks (RFC 2544); the outer sources are in the other half.
VIPS, FIRST = IPv4Address("198.19.0.0"), IPv4Address("10.0.0.1")
A_FILE = 100  # services
TIMEOUT_S = 120.0
REGION_LOG2_BITS = 8  # bpf/abi.h


@dataclass(frozen=True)
class Which:
    """One backend of one service, and where it stands in the maps."""

    service: str
    address: str
    id: int
    svc: int


class Fleet:
    """The files of so many services, and a namespace for a daemon that serves them."""

    def __init__(
        self,
        here: Namespace,
        directory: Path,
        services: int,
        backends: int,
        *,
        by_tc: bool = False,  # mode local, without XDP
        by_peers: bool = False,  # straight to the other ends of veth devices
        by_sockets: bool = False,  # mode local, without XDP, for processes in `here`
        service_lines: Sequence[str] = (),  # what each service has besides
    ) -> None:
        self.here, self.directory = here, directory
        self.services, self.backends = services, backends
        self.by_tc, self.by_peers = by_tc or by_sockets, by_peers
        self.by_sockets, self.service_lines = by_sockets, service_lines
        self.bpffs = BPFFS / here.name
        self.folder = directory / "services.d"
        self.folder.mkdir()
        (directory / "shunt.yaml").write_text(self.settings())
        for first in range(0, services, A_FILE):
            self.write(first)

    def settings(self) -> str:
        """What an operator would set: what is needed, and a tenth to spare."""
        slots = self.services << maglev.log2_slots(self.backends)
        need = {
            "frontends": self.services,
            "services": self.services + 1,
            "backends": self.services * self.backends + 1,
            "slots": slots,
        }
        sizes = {name: -(-n * 11 // 10240) * 1024 for name, n in need.items()}
        limits = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        # What netfilter's tracker has room for by default; at the socket nothing is kept.
        nat = 2**18 if self.by_tc and not self.by_sockets else 1024
        rest = f"nat: {nat}, sources: 1024, rates: 1024"
        lines = [f"limits: {{{limits}, {rest}}}"]
        devices = ["eth0", "eth1"] if self.by_peers else ["eth0"]
        lines.append(f"interfaces: [{', '.join(devices)}]")
        if self.by_peers:
            lines.append("handover: peer")
        if self.by_tc:
            lines.append("xdp: off")
        if self.by_tc and not self.by_sockets:
            # connect() runs the programs of all nodes' sockets, also for other ways' clients.
            lines.append("sockets: off")
        return "\n".join(lines) + "\n"

    def write(self, first: int, weights: dict[int, int] | None = None) -> None:
        """A file of A_FILE services from the one of this number; it appears in one piece.

        `weights`: of a service's first backend, by the service's number.
        """
        lines = []
        for n in range(first, min(first + A_FILE, self.services)):
            lines += [
                f"- name: shop-{n}",
                f"  vip: {VIPS + n}",
                "  ports: [80]",
                "  health: none",
                *(["  mode: local"] if self.by_tc else []),
                *(f"  {line}" for line in self.service_lines),
                "  backends:",
            ]
            for b in range(self.backends):
                address = FIRST + n * self.backends + b
                weight = (weights or {}).get(n, 1) if b == 0 else 1
                lines.append(f"    - {{address: {address}, weight: {weight}}}")
        draft = self.folder / f".{first}.draft"
        draft.write_text("\n".join(lines) + "\n")
        draft.replace(self.folder / f"shop-{first:05}.yaml")

    @contextlib.contextmanager
    def running(self) -> Iterator[Shuntd]:
        """A daemon that begins without maps, and leaves none.

        Raises: ShuntError with the end of its log if it does not answer.
        """
        log = self.directory / "shuntd.log"
        process = self.here.start(
            [
                *(sys.executable, "-m", "shunt.agent.daemon"),
                *("--config", str(self.directory / "shunt.yaml")),
                *("--services", str(self.folder), "--bpffs", str(self.bpffs)),
                *("--run", str(self.directory / "run")),
            ],
            log,
        )
        try:
            yield Shuntd(process, self.directory / "run/shunt.sock", self.bpffs)
        finally:
            process.stop()
            remove_tree(self.bpffs)


class Shuntd:
    """A daemon that runs and answers, and its maps as the programs see them."""

    def __init__(self, process: Process, sock: Path, bpffs: Path) -> None:
        """Raises: ShuntError if it does not answer."""
        self.process, self.client, self.sock = process, Client(sock), sock
        self.until(self._answers, "answers")
        pinned = {name: Map.pinned(bpffs / "maps" / name) for name in ("slots", "svc", "backends")}
        self._words = pinned["slots"].mapped()["word"]
        self._svc, self._backends = pinned["svc"].mapped(), pinned["backends"].mapped()
        names = Map.pinned(bpffs / "maps/names")
        keys, values = names.items()
        for each in (names, *pinned.values()):
            each.close()
        self.named = {
            value.decode().rpartition("/")[0]: svc
            for svc, value in zip(keys.tolist(), values["name"].tolist(), strict=True)
        }
        self._names = sorted(self.named)

    def _answers(self) -> bool:
        try:
            self.client.get("errors")
        except Unreachable:
            return False
        return True

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Raises: ShuntError if it is not so in good time, or the daemon has ended."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            if not self.process.running or time.monotonic() > deadline:
                why = self.process.log_tail()
                raise ShuntError(f"shuntd {what}: it does not", why, "see what its log says")
            time.sleep(0.05)

    def status(self) -> Any:
        """As `shunt status` has it."""
        return self.client.get("status")

    def rss_anon_mb(self) -> float:
        """Memory that is the daemon's alone."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        row = next(line for line in text.splitlines() if line.startswith("RssAnon:"))
        return int(row.split()[1]) / 1024

    def map_mb(self) -> float:
        """What the kernel accounts to the maps that the daemon holds, each counted once."""
        found = {}
        for path in Path(f"/proc/{self.process.pid}/fdinfo").iterdir():
            try:
                lines = path.read_text().splitlines()
            except FileNotFoundError:  # closed meanwhile
                continue
            rows = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
            if "memlock" in rows and "map_id" in rows:  # links of iterators name maps, too
                found[rows["map_id"]] = int(rows["memlock"])
        return sum(found.values()) / 2**20

    def choose(self, chance: random.Random) -> Which:
        """A backend at random."""
        name = chance.choice(self._names)
        svc = self.named[name]
        i = chance.choice(np.flatnonzero(self._backends["svc"] == svc).tolist())
        address = IPv4Address(self._backends["addr"][i].tobytes()[12:])
        return Which(name, str(address), i, svc)

    def slots_of(self, which: Which) -> int:
        """How many slots the backend owns now, as a program would read them."""
        region = int(self._svc["region"][which.svc])
        first, log2 = region >> REGION_LOG2_BITS, region & (1 << REGION_LOG2_BITS) - 1
        return int(np.count_nonzero(slot.cur(self._words[first : first + (1 << log2)]) == which.id))

    def change_ms(self, which: Which, drained: bool) -> float:
        """Drain a backend, or end that: from the sending of the request to the slots' change.

        Raises: ShuntError if nothing changes, or the daemon says no.
        """
        verb = "drain" if drained else "undrain"
        path = f"/v1/services/{which.service}/backends/{which.address}/{verb}"
        request = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(TIMEOUT_S)
            s.connect(str(self.sock))
            began = time.monotonic()
            s.sendall(request)
            while (self.slots_of(which) == 0) != drained:
                if time.monotonic() > began + TIMEOUT_S:
                    raise ShuntError(f"{path} changes nothing", "no slot changed", "see its log")
            took = time.monotonic() - began
            answer = b""
            while part := s.recv(1 << 16):
                answer += part
        if not answer.startswith(b"HTTP/1.1 200"):
            raise ShuntError(f"{path} is refused", answer.decode(), "see its log")
        return took * 1000

    def reload(self, fleet: Fleet, chance: random.Random) -> tuple[float, list[float]]:
        """Write one file anew with one backend's weight changed.

        Units:  seconds until its slots have changed; of changes by the API meanwhile, each in ms.
        Raises: ShuntError if nothing changes.
        """
        n = chance.randrange(fleet.services)
        address = FIRST + n * fleet.backends
        svc = self.named[f"shop-{n}"]
        ids = np.flatnonzero(self._backends["svc"] == svc).tolist()
        raw = mapped(address)
        i = next(i for i in ids if self._backends["addr"][i].tobytes() == raw)
        which = Which(f"shop-{n}", str(address), i, svc)
        before = self.slots_of(which)
        began = time.monotonic()
        fleet.write(n - n % A_FILE, {n: chance.randrange(50, 60)})
        meanwhile = []
        while self.slots_of(which) == before:
            if time.monotonic() > began + TIMEOUT_S:
                raise ShuntError("a changed file changes nothing", str(which), "see its log")
            other = self.choose(chance)
            if other.svc != svc:
                meanwhile += [self.change_ms(other, drained) for drained in (True, False)]
        took = time.monotonic() - began
        fleet.write(n - n % A_FILE)
        self.until(lambda: self.slots_of(which) == before, "takes a file back")
        return took, meanwhile or [0.0]


@contextlib.contextmanager
def a_fleet(services: int, backends: int) -> Iterator[Fleet]:
    """A network and files for a daemon; all of it is gone on leaving."""
    directory = Path(tempfile.mkdtemp(prefix="shunt-scale-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        made = []
        for end in ("lb", "outside"):
            made.append(Namespace.create(f"shunt-scale-{os.getpid()}-{end}"))
            stack.callback(made[-1].delete)
        here, outside = made
        veth(here, "eth0", outside, "eth0", 1500)
        outside.ip("addr add 198.51.100.2/24 dev eth0")
        here.ip("addr add 198.51.100.1/24 dev eth0", "route add 10.0.0.0/8 via 198.51.100.2")
        yield Fleet(here, directory, services, backends)
