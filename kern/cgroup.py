# SPDX-License-Identifier: Apache-2.0
"""The control groups of version 2, which programs of sockets are attached to."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from shunt.kern.mounts import Mount, mounts
from shunt.lb.errors import ShuntError

MOUNTINFO = Path("/proc/self/mountinfo")
WHOLE = 1  # the identity of the hierarchy's root


def root(mountinfo: Path = MOUNTINFO) -> Path:
    """Where the hierarchy is mounted: alone, or beside those of version 1 (hybrid).

    In a container with a namespace of control groups this is the container's own.

    Raises: ShuntError if it is mounted nowhere.
    """
    listed = list(mounts(mountinfo))
    found = [
        mount
        for n, mount in enumerate(listed)
        if mount.kind == "cgroup2" and not any(hides(on, mount) for on in listed[n + 1 :])
    ]
    if not found:
        raise ShuntError(
            "no cgroup v2 hierarchy is mounted here",
            f"{mountinfo} lists none, and programs of sockets are attached to one",
            "mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified  (beside version 1), and restart"
            " shuntd; or set `sockets: off`",
        )
    # A mount of a part of it covers that part alone.
    return min(found, key=lambda mount: (len(mount.root), len(mount.point.parts))).point


def hides(later: Mount, earlier: Mount) -> bool:
    """Whether a mount lies on top of one that was there before."""
    return later.point == earlier.point or later.point in earlier.point.parents


def identity(cgroup: Path) -> int:
    """The kernel's id of a control group."""
    return cgroup.stat().st_ino


def paths(root: Path) -> dict[int, str]:
    """Every control group below a root, as its path from there, by the kernel's id."""
    found = {identity(root): "/"}
    for place, groups, _ in os.walk(root):
        for group in groups:
            path = Path(place, group)
            with contextlib.suppress(OSError):  # it has gone
                found[identity(path)] = f"/{path.relative_to(root)}"
    return found


def line(root: Path, path: str) -> list[int]:
    """The ids of a control group and of those above it, but for the root; the outermost first.

    Raises: OSError if there is no such group.
    """
    at = root / path.lstrip("/")
    above = [at, *at.parents]
    return [identity(each) for each in reversed(above[: above.index(root)])]
