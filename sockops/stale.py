# SPDX-License-Identifier: Apache-2.0
"""Stale sockets: connected, to a backend that has gone since. Found and closed by stale.bpf.c.

What is closed is decided in the kernel, from what a socket keeps and what the tables say at that
moment. A kernel without bpf_sock_destroy() tells of them, and each is closed by its cookie.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Self

import numpy as np

from shunt.kern import features, iterators, namespace, sock_diag
from shunt.kern.maps import Map, Records
from shunt.kern.objects import Object, Program
from shunt.lb.errors import ShuntError
from shunt.lb.model import Protocol

OBJECT = Path(__file__).parent / "stale.bpf.o"
# Where `make install` puts it, seen from PREFIX/lib/shunt/shunt/sockops; a checkout has none there.
DROP_IN = (Path(__file__).resolve() / "../../../../../share/shunt/namespaces.conf").resolve()
# What is found is closed; what came meanwhile, or was missed where the kernel's own lists changed
# under the iterator, is found by another round.
ROUNDS = 4


class Method(StrEnum):
    """How sockets are closed."""

    ITERATOR = "iterator"
    DIAGNOSTICS = "diagnostics"


def method() -> Method:
    """The better one that this kernel has.

    Raises: ShuntError if it has none.
    """
    if features.sock_destroy().present:
        return Method.ITERATOR
    feature = features.diag_destroy()
    if not feature.present:
        raise feature.error()
    return Method.DIAGNOSTICS


@dataclass
class Swept:
    """What one sweep did."""

    closed: Counter[Protocol] = field(default_factory=Counter)
    left: int = 0  # still there, and stale
    refused: list[str] = field(default_factory=list)  # why, in short; each once
    namespaces: int = 0  # with stale sockets
    took_s: float = 0.0

    def refuse(self, why: str) -> None:
        if why not in self.refused:
            self.refused.append(why)


class Stale:
    """The programs, loaded on the maps of the balancer and of the socket programs."""

    def __init__(self, maps: Mapping[str, Map], by: Method, *, tcp: bool) -> None:
        """Raises: ShuntError, OSError. Nothing stays loaded then."""
        self.by, self.tcp = by, tcp
        telling = "tell" if by is Method.DIAGNOSTICS else "stale"
        self._names = [f"shunt_{telling}_udp", *([f"shunt_{telling}_tcp"] if tcp else [])]
        self._links: dict[str, int] = {}
        self._obj = Object(OBJECT)
        try:
            for name in self._obj.map_names():
                self._obj.set_entries({name: maps[name].spec.entries})
                self._obj.reuse(name, maps[name].fd, name)
            self._obj.variable(".rodata", "config")["tcp"] = tcp
            self._obj.keep_programs("shunt_stale_find", *self._names)
            self._obj.load()
            self._record = self._obj.btf.struct("stale_socket")
            for name, program in self._obj.programs.items():
                over = maps["sock_peers"].fd if name == "shunt_stale_find" else -1
                self._links[name] = iterators.attach(program.fd, over)
        except BaseException:
            self.close()
            raise

    @property
    def programs(self) -> list[Program]:
        """Those that are loaded."""
        return list(self._obj.programs.values())

    def close(self) -> None:
        for fd in self._links.values():
            os.close(fd)
        self._links.clear()
        self._obj.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def find(self) -> Records:
        """Stale sockets of all network namespaces. Shape: of struct stale_socket."""
        return self._run("shunt_stale_find")

    def _run(self, name: str) -> Records:
        return np.frombuffer(iterators.run(self._links[name]), self._record)

    def sweep(self, go_on: Callable[[], bool] = lambda: True) -> Swept:
        """Close what is stale, in every network namespace that has any; to be asked of a thread
        that nobody else uses, and that ends where it began.

        Raises: OSError.
        """
        began, swept, home = time.monotonic(), Swept(), namespace.inode()
        found = self.find()
        seen: set[int] = set()
        for _ in range(ROUNDS):
            before = swept.closed.total()
            numbers = {int(n) for n in np.unique(found["netns"])}
            if not numbers or not go_on():
                break
            seen |= numbers
            self._close_in(numbers, home, swept, go_on)
            found = self.find()
            if swept.closed.total() == before:
                break
        swept.left, swept.namespaces = len(found), len(seen)
        if not swept.left:
            swept.refused.clear()
        swept.took_s = time.monotonic() - began
        return swept

    def _close_in(
        self, numbers: set[int], home: int, swept: Swept, go_on: Callable[[], bool]
    ) -> None:
        if home in numbers:
            self._close_here(swept)
        others = numbers - {home}
        places = namespace.find(others) if others else {}
        if others - places.keys():
            swept.refuse("of a network namespace that has no name, and no process to be seen")
        if not places:
            return
        back = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        moved = False
        try:
            for place in places.values():
                if not go_on():
                    return
                try:
                    namespace.enter(place)
                except OSError as e:  # it has ended, or we may enter none
                    swept.refuse(f"network namespaces cannot be entered: {e.strerror}")
                    continue
                moved = True
                self._close_here(swept)
        finally:
            try:
                if moved:
                    namespace.enter(Path(f"/proc/thread-self/fd/{back}"))
            finally:
                os.close(back)

    def _close_here(self, swept: Swept) -> None:
        for name in self._names:
            found = self._run(name)
            protocol = Protocol.TCP if name.endswith("tcp") else Protocol.UDP
            closed = len(found)
            if self.by is Method.DIAGNOSTICS and closed:
                try:
                    with sock_diag.SockDiag() as diag:
                        closed = diag.destroy(map(_target, found))
                except OSError as e:
                    swept.refuse(f"socket diagnostics: {e.strerror}")
                    continue
            swept.closed[protocol] += closed


def _target(found: Records) -> sock_diag.Target:
    """As the kernel is asked for it: addresses of IPv4 sockets in the first four bytes."""
    own, other = found["saddr"].tobytes(), found["daddr"].tobytes()
    if found["family"] == socket.AF_INET:
        own, other = own[12:], other[12:]
    return sock_diag.Target(
        family=int(found["family"]),
        proto=int(found["proto"]),
        source=own,
        source_port=int(found["sport"]).to_bytes(2, "big"),
        destination=other,
        destination_port=int(found["dport"]).to_bytes(2, "big"),
        ifindex=int(found["ifindex"]),
        cookie=int(found["cookie"]),
    )


def barred(drop_in: Path = DROP_IN) -> ShuntError | None:
    """What keeps this process from the sockets of other network namespaces; None if nothing does.

    Not to be asked of the main thread.
    """
    entry, sight = namespace.no_entry(), namespace.no_sight()
    if not entry and not sight:
        return None
    where = "other network namespaces" if entry else "network namespaces that have no name"
    fix = "start shuntd with CAP_SYS_ADMIN and CAP_SYS_PTRACE, and let it call setns()"
    if drop_in.exists():
        fix = (
            f"install -D -m 644 -t /etc/systemd/system/shuntd.service.d {drop_in}"
            " && systemctl daemon-reload && systemctl restart shuntd"
        )
    return ShuntError(
        f"connections to backends that have gone are not closed in {where}",
        f"shuntd may not go there: {'; '.join(filter(None, (entry, sight)))}",
        fix,
    )


def refusal(swept: Swept, barred: ShuntError | None) -> ShuntError:
    """What is told of sockets that a sweep could not close, by a process that is barred, or not."""
    off = "set `sockets: {close: off}`"
    return ShuntError(
        f"connections to backends that have gone cannot be closed: {swept.left}",
        "; ".join(swept.refused) or "they come as fast as they are closed",
        f"{barred.fix}  # or {off}" if barred else off,
    )
