# SPDX-License-Identifier: Apache-2.0
"""The programs of sockets on a node: loaded on the balancer's maps, pinned, attached, swapped.

Everything is pinned below the balancer's pins: sockets/maps/NAME and sockets/links/PROGRAM. What
is pinned goes on while no agent runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shunt.kern import cgroup, features, links, namespace
from shunt.kern.btf import Btf
from shunt.kern.maps import Map, spec_of_fd
from shunt.kern.objects import Object, Program
from shunt.lb.model import Settings
from shunt.lb.slots import BACKEND_BITS
from shunt.sockops import pinned

OBJECT = Path(__file__).parent / "sock.bpf.o"
FOLDER = "sockets"
# Answers are translated before questions are, and until after.
PROGRAMS = (
    *("shunt_recvmsg4", "shunt_recvmsg6", "shunt_peername4", "shunt_peername6"),
    *("shunt_sendmsg4", "shunt_sendmsg6", "shunt_connect4", "shunt_connect6"),
)
BINDS = ("shunt_bind4", "shunt_bind6")  # unless node ports are shared
OWN_MAPS = (
    *("sock_peers", "sock_flows", "sock_clients", "sock_reasons"),
    *("sock_excluded", "sock_node_ports", "sock_refused"),
)
COUNTS = "sock_reasons"

Scope = Literal["host", "all", "off"]


class Sockets:
    """The programs of sockets in the kernel, under the balancer's pin directory."""

    def __init__(self, bpffs: Path, path: Path = OBJECT) -> None:
        self.bpffs, self.path = bpffs, path
        self.scope: Scope = "off"  # what was asked for
        self.cgroup: Path | None = None  # where they are attached
        self.excluded: dict[str, int] = {}  # control groups, as written, with their ids; 0: absent
        self.reserves = False  # whether binds are looked at
        self._obj: Object | None = None

    @property
    def programs(self) -> list[Program]:
        """Those that are loaded."""
        return list(self._obj.programs.values()) if self._obj else []

    @property
    def maps(self) -> Mapping[str, Map]:
        """Those of their own; none while nothing is loaded."""
        return {name: self._obj.maps[name] for name in OWN_MAPS} if self._obj else {}

    def follow(self, settings: Settings, maps: Mapping[str, Map]) -> None:
        """Cover the sockets that the settings name with programs on the balancer's `maps`.

        What is attached is swapped; with `sockets: off` it is detached.

        Raises: ShuntError if that cannot be. What was attached before goes on.
        """
        self.scope = settings.sockets
        if self.scope == "off":
            self.close()
            cleanup(self.bpffs)
            return
        root = cgroup.root()
        wanted = PROGRAMS if settings.node_ports == "share" else (*PROGRAMS, *BINDS)
        obj = _load(self.path, self.bpffs / FOLDER / "maps", maps, settings, wanted)
        try:
            excluded = _exclude(obj.maps["sock_excluded"], root, settings.sockets_exclude)
            self._attach(obj, root, wanted)
        except BaseException:
            obj.close()
            raise
        self.close()
        self._obj, self.cgroup, self.excluded = obj, root, excluded
        self.reserves = wanted != PROGRAMS
        if not self.reserves:
            for name in BINDS:
                links.detach_pin(self.bpffs / FOLDER / "links" / name)

    def look_at_groups(self) -> None:
        """Find the excluded control groups again: some may have come or gone."""
        if self._obj is not None and self.cgroup is not None and self.excluded:
            groups = self._obj.maps["sock_excluded"]
            self.excluded = _exclude(groups, self.cgroup, self.excluded)

    @property
    def btf(self) -> Btf:
        """The types of their object. While something is loaded."""
        assert self._obj is not None
        return self._obj.btf

    def reserve(self, words: NDArray[np.uint64]) -> None:
        """Ports that nobody is to bind, as struct node_ports_val of bpf/abi.h has them."""
        if self._obj is not None:
            bits = self._obj.maps["sock_node_ports"].mapped()["bits"]
            for i in np.flatnonzero(bits != words).tolist():
                bits[i] = words[i]

    def _attach(self, obj: Object, root: Path, wanted: Iterable[str]) -> None:
        pinned.attach(
            *(obj, wanted, root, self.bpffs / FOLDER / "links"),
            what="the sockets of this host cannot be covered",
            instead="set `sockets: off`",
        )

    def covers_host(self) -> bool:
        """Whether they are attached to the root of all control groups, or to a container's part."""
        try:
            return self.cgroup is not None and cgroup.identity(self.cgroup) == cgroup.WHOLE
        except OSError:
            return False

    def attached(self) -> bool:
        """Whether the kernel has all of them where they belong, now."""
        if self._obj is None or self.cgroup is None:
            return False
        return pinned.are_attached(self._obj.programs, self.cgroup, self.bpffs / FOLDER / "links")

    def reasons(self) -> dict[str, int]:
        """How often a call ended in which way, by the names of enum sock_reason."""
        if self._obj is None:
            return {}
        times = self._obj.maps[COUNTS].totals()["times"]
        known = self._obj.btf.enum("sock_reason", "SOCK_")
        return {reason.name: int(times[reason]) for reason in known if reason < len(times)}

    def peers(self) -> Map | None:
        """The backends that sockets have in VIPs' places, while the programs are loaded."""
        return self._obj.maps["sock_peers"] if self._obj else None

    def close(self) -> None:
        """Let go of them; what is pinned stays in force."""
        if self._obj is not None:
            self._obj.close()
        self._obj = self.cgroup = None
        self.excluded, self.reserves = {}, False


def share(obj: Object, maps: Mapping[str, Map]) -> None:
    """Let an object that is not loaded yet use the balancer's maps.

    Raises: ShuntError if they are not what it wants.
    """
    for name in obj.map_names():
        if name in maps:
            obj.set_entries({name: maps[name].spec.entries})
            obj.reuse(name, maps[name].fd, name)
    obj.variable(".rodata", "config")["services_mask"] = maps["services"].spec.entries - 1


def _exclude(groups: Map, root: Path, wanted: Iterable[str]) -> dict[str, int]:
    """Have the map name these control groups and no others; their ids, 0 for those that are not."""
    found = {}
    for path in wanted:
        try:
            found[path] = cgroup.identity(root / path.lstrip("/"))
        except OSError:
            found[path] = 0
    there = {int(i) for i in groups.items()[0]["id"]}
    for i in {*found.values()} - there - {0}:
        groups.update(_record(groups.new_keys(1), i), _record(groups.new_values(1), 1))
    for i in there - {*found.values()}:
        groups.delete(_record(groups.new_keys(1), i))
    return found


def _record(one: NDArray[Any], value: int) -> NDArray[Any]:
    """A record of one field."""
    one[one.dtype.names[0]] = value  # type: ignore[index]
    return one


def _load(
    path: Path,
    pins: Path,
    maps: Mapping[str, Map],
    settings: Settings,
    programs: Iterable[str],
) -> Object:
    obj = Object(path)
    try:
        share(obj, maps)
        config = obj.variable(".rodata", "config")
        config["netns"], config["all"] = namespace.cookie(), settings.sockets == "all"
        config["mptcp"] = features.mptcp().present
        config["check_mark"] = settings.check_mark << BACKEND_BITS
        config["excludes"] = bool(settings.sockets_exclude)
        obj.keep_programs(*programs)
        pinned.load_on(obj, pins, OWN_MAPS, goes_on=lambda name, fd: _goes_on(obj, name, fd))
    except BaseException:
        obj.close()
        raise
    return obj


def _goes_on(obj: Object, name: str, fd: int) -> bool:
    """Counts of a version that had other reasons begin anew."""
    return name != COUNTS or spec_of_fd(fd, obj.spec(name)) == obj.spec(name)


def cleanup(bpffs: Path) -> list[str]:
    """Detach all of them and remove the pins; says what it removed."""
    directory = bpffs / FOLDER
    removed = pinned.detach(directory, reversed((*PROGRAMS, *BINDS)))
    return removed + pinned.remove(directory, OWN_MAPS)
