# SPDX-License-Identifier: Apache-2.0
"""Redirected streams on a node: their programs and maps, there while a service asks for it.

Everything is pinned below the balancer's pins: streams/maps/NAME and streams/links/PROGRAM. The
program that judges messages is attached to the map of sockets, and each socket in the map keeps it,
with the maps that it reads, until it closes. So what is unpinned ends for new connections, and no
byte of the others is lost: they are told to go on by TCP before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from shunt.kern import cgroup, links
from shunt.kern.maps import Map, empty
from shunt.kern.objects import Object, Program
from shunt.lb.errors import ShuntError
from shunt.sockops import pinned

OBJECT = Path(__file__).parent / "stream.bpf.o"
FOLDER = "streams"
VERDICT = "shunt_stream"
# Options are watched before connections come.
ATTACHED = ("shunt_streamopt", "shunt_streams")
OWN_MAPS = (
    *("stream_optins", "stream_payers", "stream_dials", "stream_pairs", "stream_events"),
    *("sock_streams", "sock_ends"),
)

# What one end may have sent and the other not read. Small requests and answers stay far below;
# a stream in one direction, which TCP carries faster, is past it at once.
BUDGET_MESSAGES, BUDGET_BYTES = 64, 128 << 10

# Whose client sent fewer messages is brief; how many such a process may have that its other ones do
# not make good; and of how many connections one is paired when it has had them: sockops/payer.h.
BRIEF, CREDIT, TRIAL = 4, 16, 32


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

    @property
    def maps(self) -> Mapping[str, Map]:
        """Those of their own; none while nothing is loaded."""
        return {name: self._obj.maps[name] for name in OWN_MAPS} if self._obj else {}

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
        programs = {name: self._obj.programs[name] for name in ATTACHED}
        return pinned.are_attached(programs, self.cgroup, self.bpffs / FOLDER / "links")

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
        config["brief"], config["credit"], config["trial"] = BRIEF, CREDIT, TRIAL
        pinned.load_on(
            *(obj, pins, OWN_MAPS),
            # Those that are in the map keep the program that they came with.
            loaded=lambda: links.attach_verdict(obj.programs[VERDICT].fd, obj.maps["sock_ends"].fd),
        )
    except BaseException:
        obj.close()
        raise
    return obj


def attach(obj: Object, root: Path, pins: Path) -> None:
    """Attach to a control group, or swap what is pinned there.

    Raises: ShuntError. What was attached here is detached again.
    """
    pinned.attach(
        *(obj, ATTACHED, root, pins),
        what="no stream of this host can be redirected",
        instead="leave `redirect` off",
    )


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
    removed = pinned.detach(directory, reversed(ATTACHED))
    # Sockets that live on keep this map, in which no service is any more.
    empty(directory / "maps" / "stream_optins")
    return removed + pinned.remove(directory, OWN_MAPS)
