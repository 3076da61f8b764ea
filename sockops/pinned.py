# SPDX-License-Identifier: Apache-2.0
"""Programs on a control group, and their maps, pinned in a directory: maps/NAME, links/PROGRAM."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from shunt.kern import cgroup, links
from shunt.kern.objects import Object, Program, open_pin, pin
from shunt.lb.errors import ShuntError


def load_on(
    obj: Object,
    pins: Path,
    own: Iterable[str],
    *,
    goes_on: Callable[[str, int], bool] = lambda _name, _fd: True,
    loaded: Callable[[], None] = lambda: None,
) -> None:
    """Load on those of its own maps that are pinned there, and pin the others.

    `goes_on`: whether a pinned map is taken; if not it is unpinned, and a new one begins. `loaded`
    is called before what is new is pinned.

    Raises: ShuntError if a pinned map is not the one that this version uses.
    """
    pins.mkdir(parents=True, exist_ok=True)
    taken = set()
    for name in own:
        path = pins / name
        if not path.exists():
            continue
        fd = open_pin(path)
        try:
            if goes_on(name, fd):
                obj.reuse(name, fd, str(path))
                taken.add(name)
            else:
                path.unlink()
        finally:
            os.close(fd)
    obj.load()
    loaded()
    for name in own:
        if name not in taken:
            pin(obj.maps[name].fd, pins / name)


def attach(
    obj: Object, names: Iterable[str], root: Path, pins: Path, *, what: str, instead: str
) -> None:
    """Attach programs to a control group, or swap those that are pinned there.

    Raises: ShuntError: `what` cannot be, or do `instead`. What was attached here is detached again.
    """
    pins.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    try:
        for name in names:
            path, program = pins / name, obj.programs[name]
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
        fix = f"see who is there: bpftool cgroup show {root}; or {instead}"
        raise ShuntError(f"{what} from {root}", why, fix) from e


def are_attached(programs: Mapping[str, Program], root: Path, pins: Path) -> bool:
    """Whether the kernel has all of them where they belong, now."""
    try:
        home = cgroup.identity(root)
        for name, program in programs.items():
            fd = open_pin(pins / name)
            try:
                if links.cgroup_info(fd) != (home, program.id()):
                    return False
            finally:
                os.close(fd)
    except OSError:
        return False
    return True


def detach(directory: Path, names: Iterable[str]) -> list[str]:
    """Detach the programs that are pinned there and remove their pins; says which."""
    removed = []
    for name in names:
        path = directory / "links" / name
        if path.exists():
            links.detach_pin(path)
            removed.append(str(path))
    return removed


def remove(directory: Path, own: Iterable[str]) -> list[str]:
    """Remove the pins of maps, and the directories; says which maps."""
    removed = []
    for name in own:
        path = directory / "maps" / name
        if path.exists():
            path.unlink()
            removed.append(str(path))
    for path in (directory / "links", directory / "maps", directory):
        if path.is_dir():
            path.rmdir()
    return removed
