# SPDX-License-Identifier: Apache-2.0
"""Users' hooks on a node: loaded, listed, unloaded, and put back when the balancer is swapped.

Each is pinned: hooks/POSITION/NAME/program and hooks/POSITION/NAME/maps/MAP under the balancer's
pins. No process is needed for them to work; bpf/hooks.h says how packets come to them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shunt.kern import program_array
from shunt.kern.maps import Map
from shunt.kern.objects import Object, open_pin, pin
from shunt.kern.program_array import ProgramArray
from shunt.kern.raw_map import RawMap
from shunt.lb.errors import ShuntError
from shunt.xdp import hook_source
from shunt.xdp.hook_source import HERE, SHARED, Position

log = logging.getLogger("shunt")

BALANCER, PROGRAM = HERE / "lb.bpf.o", "shunt_lb"
# The balancer's own programs of the chain, by slot: what follows before what leads there.
CHAIN = (("EXIT", "shunt_hook_exit"), ("BALANCE", "shunt_hook_bal"), ("ENTER", "shunt_hook_enter"))
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_LOADING = "loading-"


@dataclass(frozen=True)
class Hook:
    """A loaded hook, and what it has answered since it was loaded. `marked`: packets by mark."""

    name: str
    position: Position
    program_id: int
    maps: list[str]
    passed: int = 0
    dropped: int = 0
    invalid: int = 0
    marked: dict[int, int] = field(default_factory=dict)


def load(path: Path, position: Position, name: str, bpffs: Path) -> Hook:
    """Load the hook in `path` and put it in force.

    Raises: ShuntError if the name or the position is taken, the balancer is not loaded, or the
            file is refused. What was in force stays.
    """
    if not _NAME.fullmatch(name):
        raise ShuntError(
            f"a hook cannot be called {name!r}",
            "a name is 1 to 63 of a-z 0-9 _ -, a letter or digit first",
            "name it: --name NAME",
        )
    for other in listing(bpffs):
        if other.position is position or other.name == name:
            raise ShuntError(
                f"there is hook {other.name} at {other.position}",
                "a position has one hook, and names are unique",
                f"unload it first: shunt hook unload {other.name}",
            )
    with _balancer(bpffs) as maps, Object(BALANCER) as balancer:
        slots = balancer.btf.enum("hook_slot", "HOOK_")
        pins = _new_pins(bpffs, name)
        try:
            flags = balancer.flags(PROGRAM)
            with hook_source.load(path, position, maps, flags, pins / "maps") as loaded:
                pin(loaded.fd, pins / "program")
                _clear_counters(maps["hook_stats"], balancer.btf, position)
                _publish(pins.parent, bpffs / "hooks" / position, name)
                array = ProgramArray(maps["hooks"].fd)
                array.put(slots[position.slot], loaded.fd)
                array.copy(slots["ENTER"], slots["ENTRY"])
        except BaseException:
            remove_tree(pins.parent)
            raise
    return next(hook for hook in listing(bpffs) if hook.name == name)


def unload(name: str, bpffs: Path) -> None:
    """Take a hook out and remove its pins, its maps with them.

    Raises: ShuntError if there is none of that name.
    """
    hook = find(name, bpffs)
    others = [other for other in listing(bpffs) if other.name != name]
    with _balancer(bpffs) as maps, Object(BALANCER) as balancer:
        slots, array = balancer.btf.enum("hook_slot", "HOOK_"), ProgramArray(maps["hooks"].fd)
        if not others:
            array.clear(slots["ENTRY"])
        array.clear(slots[hook.position.slot])
    remove_tree(bpffs / "hooks" / hook.position)
    _drop_if_empty(bpffs / "hooks")


def find(name: str, bpffs: Path) -> Hook:
    """Raises: ShuntError if there is none of that name."""
    hooks = listing(bpffs)
    for hook in hooks:
        if hook.name == name:
            return hook
    there = ", ".join(hook.name for hook in hooks)
    raise ShuntError(
        f"there is no hook {name}",
        f"there are: {there}" if there else "none is loaded",
        "see `shunt hook list`",
    )


def listing(bpffs: Path) -> list[Hook]:
    """The hooks that are loaded, pre-lb before post-lb."""
    found = list(_pinned(bpffs))
    if not found:
        return []
    with _balancer(bpffs) as maps, Object(BALANCER) as balancer:
        result = balancer.btf.enum("hook_result", "HOOK_")
        packets = maps["hook_stats"].totals()["packets"].tolist()
        return [_counted(hook, packets, result) for hook in found]


def in_force(bpffs: Path) -> list[tuple[str, Position]]:
    """The hooks' names and positions, pre-lb before post-lb; for who may look at no more."""
    return [(name, at) for at in Position for name in _names(bpffs / "hooks" / at)]


def open_map(hook: Hook, name: str, bpffs: Path) -> RawMap:
    """One of a hook's own maps, for the caller to close.

    Raises: ShuntError if it has none of that name.
    """
    if name not in hook.maps:
        raise ShuntError(
            f"hook {hook.name} has no map {name}",
            f"it has: {', '.join(hook.maps)}" if hook.maps else "it has none",
            f"see `shunt hook show {hook.name}`",
        )
    return RawMap(bpffs / "hooks" / hook.position / hook.name / "maps" / name)


def install(obj: Object, bpffs: Path) -> None:
    """Put the balancer's programs, just loaded, in the place of those before, hooks kept.

    A hook that was loaded beside other maps than these cannot go on, and is removed.
    """
    slots, array = obj.btf.enum("hook_slot", "HOOK_"), ProgramArray(obj.maps["hooks"].fd)
    for slot, program in CHAIN:
        array.put(slots[slot], obj.programs[program].fd)
    kept = 0
    here = program_array.map_id(obj.maps["hooks"].fd)
    for position in Position:
        for name in _names(bpffs / "hooks" / position):
            fd = open_pin(bpffs / "hooks" / position / name / "program")
            try:
                if here in program_array.map_ids(fd):
                    array.put(slots[position.slot], fd)
                    kept += 1
                    break
            finally:
                os.close(fd)
            log.warning("hook %s belongs to maps that are gone: it is unloaded", name)
            remove_tree(bpffs / "hooks" / position)
        else:
            array.clear(slots[position.slot])
    if kept:
        array.copy(slots["ENTER"], slots["ENTRY"])
    else:
        array.clear(slots["ENTRY"])


def cleanup(bpffs: Path) -> list[str]:
    """Remove the pins of every hook; says which. The programs go with the balancer's maps."""
    directory = bpffs / "hooks"
    removed = [str(path) for path in sorted(directory.glob("*/*"))]
    if directory.is_dir():
        remove_tree(directory)
    return removed


def remove_tree(directory: Path) -> None:
    """Remove a directory of pins, if it is there."""
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        if path.is_dir():
            remove_tree(path)
        else:
            path.unlink()
    directory.rmdir()


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []


def _pinned(bpffs: Path) -> Iterator[Hook]:
    for name, position in in_force(bpffs):
        directory = bpffs / "hooks" / position / name
        try:
            fd = open_pin(directory / "program")
        except FileNotFoundError:  # just being unloaded
            continue
        try:
            found = program_array.prog_id(fd)
        finally:
            os.close(fd)
        yield Hook(name, position, found, _names(directory / "maps"))


def _counted(hook: Hook, packets: list[int], result: Any) -> Hook:
    first = list(Position).index(hook.position) * result["RESULTS"]
    mine = packets[first : first + result["RESULTS"]]
    marks = {n: count for n, count in enumerate(mine[result["INVALID"] + 1 :], 1) if count}
    return Hook(
        hook.name, hook.position, hook.program_id, hook.maps,
        mine[result["PASSED"]], mine[result["DROPPED"]], mine[result["INVALID"]], marks,
    )  # fmt: skip


def _clear_counters(stats: Map, btf: Any, position: Position) -> None:
    results = int(btf.enum("hook_result", "HOOK_")["RESULTS"])
    first = list(Position).index(position) * results
    for index in range(first, first + results):
        stats.clear(index)


@contextlib.contextmanager
def _balancer(bpffs: Path) -> Iterator[dict[str, Map]]:
    """The maps through which hooks and the balancer meet."""
    with contextlib.ExitStack() as stack:
        maps = {}
        for name in (*SHARED, "hook_stats"):
            try:
                maps[name] = Map.pinned(bpffs / "maps" / name)
            except FileNotFoundError as e:
                raise ShuntError(
                    f"no balancer is loaded in {bpffs}",
                    f"there is no map {name}, through which packets come to a hook",
                    "start shuntd of this version once: systemctl start shuntd",
                ) from e
            stack.callback(maps[name].close)
        yield maps


def _new_pins(bpffs: Path, name: str) -> Path:
    """A directory for a hook's pins, aside until it is complete."""
    for path in (bpffs / "hooks").glob(f"{_LOADING}*"):
        if not Path(f"/proc/{path.name.removeprefix(_LOADING)}").exists():
            remove_tree(path)  # of a command that was cut off
    pins = bpffs / "hooks" / f"{_LOADING}{os.getpid()}" / name
    (pins / "maps").mkdir(parents=True)
    return pins


def _publish(aside: Path, place: Path, name: str) -> None:
    try:
        aside.rename(place)
    except OSError as e:
        raise ShuntError(
            f"hook {name} was not loaded",
            f"another was loaded at {place.name} meanwhile ({e.strerror})",
            "see `shunt hook list`",
        ) from e


def _drop_if_empty(directory: Path) -> None:
    with contextlib.suppress(OSError):
        directory.rmdir()
