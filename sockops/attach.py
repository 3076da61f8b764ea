# SPDX-License-Identifier: Apache-2.0
"""The programs of sockets on a node: loaded on the balancer's maps, pinned, attached, swapped.

Everything is pinned below the balancer's pins: sockets/maps/NAME and sockets/links/PROGRAM. What
is pinned goes on while no agent runs.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from shunt.kern import cgroup, links, namespace
from shunt.kern.maps import Map
from shunt.kern.objects import Object, Program, open_pin, pin
from shunt.lb.errors import ShuntError
from shunt.lb.model import Settings
from shunt.lb.slots import BACKEND_BITS

OBJECT = Path(__file__).parent / "sock.bpf.o"
FOLDER = "sockets"
# Answers are translated before questions are, and until after.
PROGRAMS = (
    *("shunt_recvmsg4", "shunt_recvmsg6", "shunt_peername4", "shunt_peername6"),
    *("shunt_sendmsg4", "shunt_sendmsg6", "shunt_connect4", "shunt_connect6"),
)
OWN_MAPS = ("sock_peers", "sock_flows", "sock_clients", "sock_reasons")

Scope = Literal["host", "all", "off"]


class Sockets:
    """The programs of sockets in the kernel, under the balancer's pin directory."""

    def __init__(self, bpffs: Path, path: Path = OBJECT) -> None:
        self.bpffs, self.path = bpffs, path
        self.scope: Scope = "off"  # what was asked for
        self.cgroup: Path | None = None  # where they are attached
        self._obj: Object | None = None

    @property
    def programs(self) -> list[Program]:
        """Those that are loaded."""
        return list(self._obj.programs.values()) if self._obj else []

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
        obj = _load(self.path, self.bpffs / FOLDER / "maps", maps, settings)
        try:
            self._attach(obj, root)
        except BaseException:
            obj.close()
            raise
        self.close()
        self._obj, self.cgroup = obj, root

    def _attach(self, obj: Object, root: Path) -> None:
        pins = self.bpffs / FOLDER / "links"
        pins.mkdir(exist_ok=True)
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        made: list[Path] = []
        try:
            for name in PROGRAMS:
                path = pins / name
                if not _swap(path, obj.programs[name].fd, cgroup.identity(root)):
                    _attach_one(obj, name, fd, path)
                    made.append(path)
        except OSError as e:
            for path in reversed(made):
                links.detach_pin(path)
            raise _refused(root, e) from e
        finally:
            os.close(fd)

    def attached(self) -> bool:
        """Whether the kernel has all of them where they belong, now."""
        if self._obj is None or self.cgroup is None:
            return False
        try:
            home = cgroup.identity(self.cgroup)
            for name, program in self._obj.programs.items():
                fd = open_pin(self.bpffs / FOLDER / "links" / name)
                try:
                    if links.cgroup_info(fd) != (home, program.id()):
                        return False
                finally:
                    os.close(fd)
        except OSError:
            return False
        return True

    def reasons(self) -> dict[str, int]:
        """How often a call ended in which way, by the names of enum sock_reason."""
        if self._obj is None:
            return {}
        times = self._obj.maps["sock_reasons"].totals()["times"]
        known = self._obj.btf.enum("sock_reason", "SOCK_")
        return {reason.name: int(times[reason]) for reason in known if reason < len(times)}

    def close(self) -> None:
        """Let go of them; what is pinned stays in force."""
        if self._obj is not None:
            self._obj.close()
        self._obj = self.cgroup = None


def share(obj: Object, maps: Mapping[str, Map]) -> None:
    """Let an object that is not loaded yet use the balancer's maps.

    Raises: ShuntError if they are not what it wants.
    """
    for name in obj.map_names():
        if name in maps:
            obj.set_entries({name: maps[name].spec.entries})
            obj.reuse(name, maps[name].fd, name)
    obj.variable(".rodata", "config")["services_mask"] = maps["services"].spec.entries - 1


def _load(path: Path, pins: Path, maps: Mapping[str, Map], settings: Settings) -> Object:
    obj = Object(path)
    try:
        share(obj, maps)
        config = obj.variable(".rodata", "config")
        config["netns"], config["all"] = namespace.cookie(), settings.sockets == "all"
        config["check_mark"] = settings.check_mark << BACKEND_BITS
        obj.keep_programs(*PROGRAMS)
        pins.mkdir(parents=True, exist_ok=True)
        there = {name for name in OWN_MAPS if (pins / name).exists()}
        for name in there:
            fd = open_pin(pins / name)
            try:
                obj.reuse(name, fd, str(pins / name))
            finally:
                os.close(fd)
        obj.load()
        for name in OWN_MAPS:
            if name not in there:
                pin(obj.maps[name].fd, pins / name)
    except BaseException:
        obj.close()
        raise
    return obj


def _swap(path: Path, prog_fd: int, home: int) -> bool:
    """Swap the program of the link that is pinned there; False if there is none of this cgroup."""
    try:
        fd = open_pin(path)
    except FileNotFoundError:
        return False
    try:
        if links.cgroup_info(fd)[0] == home:
            links.update(fd, prog_fd)
            return True
    finally:
        os.close(fd)
    links.detach_pin(path)
    return False


def _attach_one(obj: Object, name: str, cgroup_fd: int, path: Path) -> None:
    fd = links.attach_cgroup(obj.programs[name].fd, cgroup_fd, obj.attach_type(name))
    try:
        pin(fd, path)
    finally:
        os.close(fd)


def _refused(root: Path, e: OSError) -> ShuntError:
    why = {
        errno.EPERM: "a program there lets none be beside it, or CAP_NET_ADMIN is missing",
        errno.E2BIG: "as many programs as the kernel allows are there",
    }.get(e.errno or 0, e.strerror or str(e))
    return ShuntError(
        f"the sockets of this host cannot be covered from {root}",
        why,
        f"see who is there: bpftool cgroup show {root}; or set `sockets: off`",
    )


def cleanup(bpffs: Path) -> list[str]:
    """Detach all of them and remove the pins; says what it removed."""
    removed = []
    directory = bpffs / FOLDER
    for name in reversed(PROGRAMS):
        path = directory / "links" / name
        if path.exists():
            links.detach_pin(path)
            removed.append(str(path))
    for name in OWN_MAPS:
        path = directory / "maps" / name
        if path.exists():
            path.unlink()
            removed.append(str(path))
    for path in (directory / "links", directory / "maps", directory):
        if path.is_dir():
            path.rmdir()
    return removed
