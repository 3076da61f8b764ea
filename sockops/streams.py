# SPDX-License-Identifier: Apache-2.0
"""Redirected streams on a node: their programs and maps, there while a service asks for it.

Everything is pinned below the balancer's pins: streams/maps/NAME and streams/links/PROGRAM. The
program that judges messages is attached to the map of sockets, and each socket in the map keeps it,
with the maps that it reads, until it closes. So what is unpinned ends for new connections, and no
byte of the others is lost: they are told to go on by TCP before.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from shunt.kern import cgroup, links
from shunt.kern.maps import Map, empty
from shunt.kern.objects import Object, Program, open_pin, pin
from shunt.lb.errors import ShuntError

OBJECT = Path(__file__).parent / "stream.bpf.o"
FOLDER = "streams"
VERDICT = "shunt_stream"
# Options are watched before connections come.
ATTACHED = ("shunt_streamopt", "shunt_streams")
OWN_MAPS = (
    *("stream_optins", "stream_dials", "stream_pairs", "stream_events"),
    *("sock_streams", "sock_ends"),
)

# What one end may have sent and the other not read. Small requests and answers stay far below;
# a stream in one direction, which TCP carries faster, is past it at once.
BUDGET_MESSAGES, BUDGET_BYTES = 64, 128 << 10


class Streams:
    """The programs of streams in the kernel, under the balancer's pin directory."""

    def __init__(self, bpffs: Path, path: Path = OBJECT) -> None:
        self.bpffs, self.path = bpffs, path
        self.cgroup: Path | None = None  # where they are attached
        self._obj: Object | None = None

    @property
    def programs(self) -> list[Program]:
        """Those that are loaded."""
        return list(self._obj.programs.values()) if self._obj else []

    def follow(
        self, services: Collection[int], maps: Mapping[str, Map], peers: Map | None, *, anew: bool
    ) -> None:
        """Redirect the streams of these services, by their ids; of none, take the programs away.

        `maps` are the balancer's, `peers` is sock_peers (None: nothing is translated at sockets).
        `anew`: they are others than before.

        Raises: ShuntError if that cannot be. What was attached before goes on.
        """
        if not services or peers is None:
            self.stop()
            return
        if self._obj is None or anew:
            self._start(services, maps, peers)
        else:
            _opt_in(self._obj.maps["stream_optins"], services)

    def _start(self, services: Collection[int], maps: Mapping[str, Map], peers: Map) -> None:
        root = cgroup.root()
        shared = {"backends": maps["backends"], "sock_peers": peers}
        pins = self.bpffs / FOLDER
        try:
            obj = load(self.path, pins / "maps", shared)
        except ShuntError:
            if not (pins / "maps").exists():
                raise
            cleanup(self.bpffs)  # those of another version: its connections go on by TCP
            obj = load(self.path, pins / "maps", shared)
        try:
            _opt_in(obj.maps["stream_optins"], services)
            attach(obj, root, pins / "links")
        except BaseException:
            obj.close()
            raise
        self.close()
        self._obj, self.cgroup = obj, root

    def stop(self) -> None:
        """New connections are TCP's alone, and those that are redirected go on by TCP."""
        self.close()
        cleanup(self.bpffs)

    def attached(self) -> bool:
        """Whether the kernel has all of them where they belong, now."""
        if self._obj is None or self.cgroup is None:
            return False
        try:
            home = cgroup.identity(self.cgroup)
            for name in ATTACHED:
                fd = open_pin(self.bpffs / FOLDER / "links" / name)
                try:
                    if links.cgroup_info(fd) != (home, self._obj.programs[name].id()):
                        return False
                finally:
                    os.close(fd)
        except OSError:
            return False
        return True

    def events(self) -> dict[str, tuple[int, int]]:
        """What became of connections and messages: (times, bytes) by enum stream_event."""
        if self._obj is None:
            return {}
        totals = self._obj.maps["stream_events"].totals()
        known = self._obj.btf.enum("stream_event", "STREAM_")
        return {
            event.name: (int(totals["times"][event]), int(totals["bytes"][event]))
            for event in known
            if 0 < event < len(totals)
        }

    def live(self) -> dict[str, int]:
        """Connections with both ends in the map: redirected, and left to TCP since."""
        if self._obj is None:
            return {"redirected": 0, "tcp": 0}
        _, pairs = self._obj.maps["stream_pairs"].items()
        both = pairs[pairs["ready"] != 0]
        return {
            "redirected": int((both["why"] == 0).sum()),
            "tcp": int((both["why"] != 0).sum()),
        }

    def close(self) -> None:
        """Let go of them; what is pinned stays in force."""
        if self._obj is not None:
            self._obj.close()
        self._obj = self.cgroup = None


def load(path: Path, pins: Path, shared: Mapping[str, Map]) -> Object:
    """The programs, on the maps that are pinned there, or pinned there now; none is attached.

    Raises: ShuntError if a pinned map is not the one that this version uses.
    """
    obj = Object(path)
    try:
        for name, other in shared.items():
            obj.set_entries({name: other.spec.entries})
            obj.reuse(name, other.fd, name)
        config = obj.variable(".rodata", "config")
        config["messages"], config["bytes"] = BUDGET_MESSAGES, BUDGET_BYTES
        pins.mkdir(parents=True, exist_ok=True)
        there = {name for name in OWN_MAPS if (pins / name).exists()}
        for name in there:
            fd = open_pin(pins / name)
            try:
                obj.reuse(name, fd, str(pins / name))
            finally:
                os.close(fd)
        obj.load()
        # Those that are in the map keep the program that they came with.
        links.attach_verdict(obj.programs[VERDICT].fd, obj.maps["sock_ends"].fd)
        for name in OWN_MAPS:
            if name not in there:
                pin(obj.maps[name].fd, pins / name)
    except BaseException:
        obj.close()
        raise
    return obj


def attach(obj: Object, root: Path, pins: Path) -> None:
    """Attach to a control group, or swap what is pinned there.

    Raises: ShuntError. What was attached here is detached again.
    """
    pins.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    try:
        for name in ATTACHED:
            program, path = obj.programs[name], pins / name
            if not links.swap_cgroup(path, program.fd, cgroup.identity(root)):
                links.attach_cgroup_pin(program.fd, root, obj.attach_type(name), path)
                made.append(path)
    except OSError as e:
        for path in reversed(made):
            links.detach_pin(path)
        why = {
            errno.EPERM: "a program there lets none be beside it, or CAP_NET_ADMIN is missing",
            errno.E2BIG: "as many programs as the kernel allows are there",
        }.get(e.errno or 0, e.strerror or str(e))
        raise ShuntError(
            f"no stream of this host can be redirected from {root}",
            why,
            f"see who is there: bpftool cgroup show {root}; or leave `redirect` off",
        ) from e


def _opt_in(optins: Map, services: Collection[int]) -> None:
    """Connections of services that are not there any more go by TCP from their next message on."""
    there = {int(key) for key in optins.items()[0]}
    for svc in there - set(services):
        optins.delete(svc)
    value = optins.new_values(1)
    value["redirect"] = 1
    for svc in set(services) - there:
        optins.update(svc, value)


def cleanup(bpffs: Path) -> list[str]:
    """Detach all of them and remove the pins; says what it removed."""
    directory = bpffs / FOLDER
    removed = []
    for name in reversed(ATTACHED):
        path = directory / "links" / name
        if path.exists():
            links.detach_pin(path)
            removed.append(str(path))
    # Sockets that live on keep this map, in which no service is any more.
    empty(directory / "maps" / "stream_optins")
    for name in OWN_MAPS:
        path = directory / "maps" / name
        if path.exists():
            path.unlink()
            removed.append(str(path))
    for path in (directory / "links", directory / "maps", directory):
        if path.is_dir():
            path.rmdir()
    return removed
