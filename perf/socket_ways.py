# SPDX-License-Identifier: Apache-2.0
"""Ways from a node's process to services whose backends are its pods, alike but who translates.

```
    node                                     pods
    client   eth0 (the NIC: nobody there)    server
             eth1 192.0.2.N --------------- eth0 192.0.2.1, 10.0.0.0/8 (every address of it)
    direct, translated, redirected, nftables or iptables
```
Every service has backends that answer. All ways stand beside each other, each with namespaces and
an address (N) of its own, and do nothing until they are measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from perf.fleet import FIRST, VIPS, Fleet, Shuntd
from perf.rivals import Published, iptables, nftables_in_parts
from shunt.lab.netns import Namespace, Process, cable
from shunt.lb.errors import ShuntError
from shunt.lb.model import Service

BUILD = Path(__file__).parent.parent / "build"
# What a service needs to be redirected, where this Shunt can do it.
REDIRECT = "redirect"
CAN_REDIRECT = REDIRECT in {field.name for field in fields(Service)}
SHUNT = {"translated": [], "redirected": [f"{REDIRECT}: on"]}
KINDS = (
    "direct",
    *(kind for kind in SHUNT if kind != "redirected" or CAN_REDIRECT),
    *("nftables", "iptables"),
)
BACKENDS, PORT = 10, 80
A_TRANSACTION = 1000  # services
PATIENCE_S = 300.0
RUN_SECONDS = "shunt_program_run_seconds_total{"


@dataclass(frozen=True)
class Did:
    """What one run of a client did. The percentiles are zero where it takes none."""

    count: int
    wall_s: float
    cpu_s: float
    p50_us: float
    p99_us: float
    p999_us: float


def processors() -> tuple[int, int]:
    """The client's and the server's: two, if there are two."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[-1], allowed[-2 if len(allowed) > 1 else -1]


def kernel_threads() -> list[int]:
    """The kernel's own threads for packets that whoever sent them is relieved of."""
    found = []
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            if comm.read_text().startswith("ksoftirqd/"):
                found.append(int(comm.parent.name))
    return found


class Way:
    """A node with a client, and its pods. `kind` is one of KINDS, `number` its own."""

    def __init__(self, kind: str, services: int, number: int, directory: Path) -> None:
        """Raises: ShuntError; close() removes what there is."""
        self.kind, self.services, self.number, self.directory = kind, services, number, directory
        self.client_cpu, self.server_cpu = processors()
        self.shuntd: Shuntd | None = None
        self._stack = contextlib.ExitStack()
        try:
            self._connect()
            if kind in SHUNT:
                self._start_shuntd()
            elif kind != "direct":
                self._load_rules()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Remove everything."""
        self._stack.close()

    def _connect(self) -> None:
        made = []
        for end in ("node", "pods"):
            name = f"shunt-sockway-{os.getpid()}-{self.services}-{self.number}-{end}"
            made.append(Namespace.create(name))
            self._stack.callback(made[-1].delete)
        self.node, self.pods = made
        cable(self.node, "eth0", self.pods, "unused")
        cable(self.node, "eth1", self.pods, "eth0")
        self.node.ip(
            f"addr add 192.0.2.{10 + self.number}/24 dev eth1",
            # Without Shunt a VIP needs a route, if only to be translated on its way.
            "route add default via 192.0.2.1",
        )
        self.pods.ip(
            "addr add 192.0.2.1/24 dev eth0",
            "route add default via 192.0.2.1",
            "route add local 10.0.0.0/8 dev lo",
        )

    def _start_shuntd(self) -> None:
        fleet = Fleet(
            *(self.node, self.directory, self.services, BACKENDS),
            by_sockets=True,
            service_lines=SHUNT[self.kind],
        )
        self.shuntd = self._stack.enter_context(fleet.running())
        sockets = self.shuntd.status()["sockets"]
        if not sockets["attached"]:
            raise ShuntError("programs of sockets are not attached", str(sockets), "see its log")

    def _load_rules(self) -> None:
        published = (
            Published(
                *(n, str(VIPS + n), PORT),
                [str(FIRST + n * BACKENDS + b) for b in range(BACKENDS)],
            )
            for n in range(self.services)
        )
        rules = self.directory / "rules"
        if self.kind == "nftables":
            for part in nftables_in_parts(published, A_TRANSACTION):
                rules.write_text(part)
                self.node.run("nft", "-f", str(rules), timeout_s=PATIENCE_S)
        else:
            rules.write_text(iptables(published))
            self.node.run("iptables-restore", str(rules), timeout_s=PATIENCE_S)

    @property
    def asked(self) -> tuple[str, int]:
        """The first address that the client asks, and how many there are."""
        if self.kind == "direct":
            return str(FIRST), self.services * BACKENDS
        return str(VIPS), self.services

    @contextlib.contextmanager
    def serving(self, argv: Sequence[str], says: str = "") -> Iterator[Process]:
        """A server among the pods, on a processor of its own; it has ended on leaving.

        Raises: ShuntError if it does not listen on PORT, or, in `says`, does not say so.
        """
        log = self.directory / "server.log"
        log.unlink(missing_ok=True)
        server = self.pods.start(["taskset", "-c", str(self.server_cpu), *argv], log)
        try:
            deadline = time.monotonic() + PATIENCE_S
            while says not in server.log_tail() or not self._listens():
                if not server.running or time.monotonic() > deadline:
                    raise ShuntError(f"{argv[0]} does not listen", server.log_tail(), "see perf/")
                time.sleep(0.01)
            yield server
        finally:
            server.stop()

    def _listens(self) -> bool:
        with self.pods.inside():
            rows = Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]
        return any(row.split()[1].endswith(f":{PORT:04X}") and " 0A " in row for row in rows)

    def client(self, *argv: str, timeout_s: float = PATIENCE_S) -> str:
        """What a program prints that is run on the node, on a processor of its own.

        Raises: ShuntError if it failed.
        """
        pinned = ["taskset", "-c", str(self.client_cpu)]
        done = subprocess.run(
            [*pinned, *self.node.enter, *argv],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if done.returncode:
            why = "; ".join((done.stderr or done.stdout).splitlines()[-3:])
            raise ShuntError(f"{Path(argv[0]).name} {argv[1]}, {self}: failed", why, "see perf/")
        return done.stdout

    def did(
        self, what: str, seconds: float, number: int | None, server: Process, *, together: bool
    ) -> Did:
        """Run socket_client: `requests`, `connections` or `bulk`; the server on the same processor?

        Raises: ShuntError if one answer was not right.
        """
        os.sched_setaffinity(server.pid, {self.client_cpu if together else self.server_cpu})
        pids = ",".join(map(str, [server.pid, *kernel_threads()]))
        first, addresses = self.asked
        argv = [str(BUILD / "socket_client"), what, pids, first, str(addresses), str(PORT)]
        last = [] if number is None else [str(number)]
        return Did(**json.loads(self.client(*argv, str(seconds), *last)))

    def paced(self, seconds: float, rate: float, kept: int) -> Did:
        """Run socket_paced.

        Raises: ShuntError if one answer was not right.
        """
        first, addresses = self.asked
        argv = [str(BUILD / "socket_paced"), first, str(addresses), str(PORT)]
        return Did(**json.loads(self.client(*argv, str(seconds), str(rate), str(kept))))

    def redirected(self) -> int:
        """How many messages of this way's services have passed TCP by so far."""
        streams = self.shuntd.status()["sockets"].get("streams") if self.shuntd else None
        return int(streams["events"].get("REDIRECTED", 0)) if streams else 0

    def programs_s(self) -> float:
        """How long this way's programs have run while the kernel's statistics were on."""
        if not self.shuntd:
            return 0.0
        lines = "".join(self.shuntd.client.text("metrics")).splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(RUN_SECONDS))

    def __str__(self) -> str:
        return f"{self.kind}, {self.services} services"


@contextlib.contextmanager
def ways(services: Sequence[int], kinds: Sequence[str] = KINDS) -> Iterator[list[Way]]:
    """All of them, for each number of services; they are gone on leaving.

    Raises: ShuntError.
    """
    with contextlib.ExitStack() as stack:
        made: list[Way] = []
        for size in services:
            for kind in kinds:
                directory = Path(tempfile.mkdtemp(prefix="shunt-sockway-"))
                stack.callback(shutil.rmtree, directory, ignore_errors=True)
                way = Way(kind, size, len(made), directory)
                stack.callback(way.close)
                made.append(way)
        yield made
