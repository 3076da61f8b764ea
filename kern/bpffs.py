# SPDX-License-Identifier: Apache-2.0
"""The BPF file system, which pins need."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from shunt.kern.mounts import mounts
from shunt.lb.errors import ShuntError

BPFFS = Path("/sys/fs/bpf")


def kind_of(path: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> str:
    """The type of the file system that holds `path`, which need not exist."""
    path = path.absolute()
    best, kind = -1, ""
    for mount in mounts(mountinfo):
        point = mount.point
        if (path == point or point in path.parents) and len(point.parts) >= best:
            best, kind = len(point.parts), mount.kind
    return kind


def ensure_bpffs(path: Path) -> bool:
    """Make the directory `path` on a BPF file system, mounting one if there is none.

    True if it was mounted. Raises: ShuntError; nothing is mounted then.
    """
    mounted = False
    if kind_of(path) != "bpf":
        point = mount_point(path)
        try:
            point.mkdir(parents=True, exist_ok=True)
            _mount(point)
        except OSError as error:
            raise ShuntError(
                f"no BPF file system at {point}, and none can be mounted",
                why=f"{error.strerror}: pins need one",
                fix=f"mount -t bpf bpf {point} (as root; systemd does it at boot)",
            ) from error
        mounted = True
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ShuntError(
            f"cannot make the directory {path} for pins",
            why=str(error.strerror),
            fix="run as root; a BPF file system takes no name with a dot",
        ) from error
    return mounted


def mount_point(path: Path) -> Path:
    """Where a file system for `path` would be mounted."""
    return BPFFS if path == BPFFS or BPFFS in path.parents else path


def _mount(point: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    ms_nosuid_nodev_noexec = 2 | 4 | 8
    if libc.mount(b"bpf", os.fsencode(point), b"bpf", ms_nosuid_nodev_noexec, b"mode=0700") != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
