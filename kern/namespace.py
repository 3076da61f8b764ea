# SPDX-License-Identifier: Apache-2.0
"""Network namespaces: as programs know them, where they are found, and the way into them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

from shunt.kern import capabilities

SO_NETNS_COOKIE = 71  # asm-generic/socket.h; Python does not have it
CLONE_NEWNET = 0x40000000
PROC, NAMED = Path("/proc"), Path("/run/netns")

_libc = ctypes.CDLL(None, use_errno=True)


def cookie() -> int:
    """Of the namespace that this thread is in: what bpf_get_netns_cookie() gives for its sockets.

    Raises: OSError.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        return int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), "little")


def inode() -> int:
    """Of the namespace that this thread is in: by that the kernel tells them apart in /proc."""
    return (PROC / "thread-self/ns/net").stat().st_ino


def find(wanted: Collection[int], proc: Path = PROC, named: Path = NAMED) -> dict[int, Path]:
    """Where those of these inodes can be entered: each has a name, or a process or thread in it.

    Those of processes that this one may not look at (CAP_SYS_PTRACE) are not found.
    """
    found: dict[int, Path] = {}
    for pattern in _PLACES:
        for path in _of(pattern, proc, named):
            if len(found) == len(wanted):
                return found
            try:
                number = path.stat().st_ino
            except OSError:  # it has ended, or is not ours to look at
                continue
            if number in wanted:
                found.setdefault(number, path)
    return found


# The cheap ones first. A thread may be elsewhere than its process.
_PLACES = ("", "[0-9]*/ns/net", "[0-9]*/task/[0-9]*/ns/net")


def _of(pattern: str, proc: Path, named: Path) -> Iterator[Path]:
    if pattern:
        return proc.glob(pattern)
    return named.iterdir() if named.is_dir() else iter(())


def enter(path: Path) -> None:
    """Have this thread go there, for good.

    Raises: OSError (EPERM: without CAP_SYS_ADMIN, or by a seccomp filter); it has not moved then.
            RuntimeError in the main thread, whose namespace is the process's.
    """
    if threading.current_thread() is threading.main_thread():
        raise RuntimeError("the main thread stays in its network namespace")
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(fd, CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
    finally:
        os.close(fd)


def no_entry() -> str:
    """What keeps this process from entering others; empty if nothing does.

    It tries the way into its own: the kernel and a seccomp filter ask the same of that. Not to be
    asked of the main thread (`enter`).
    """
    try:
        enter(PROC / "thread-self/ns/net")
    except OSError as e:
        if capabilities.CAP_SYS_ADMIN in capabilities.effective():
            return f"setns() is refused in spite of CAP_SYS_ADMIN: {e.strerror}"
        return "CAP_SYS_ADMIN is missing, to enter them"
    return ""


def no_sight() -> str:
    """What keeps this process from finding those without a name; empty if nothing does."""
    if capabilities.CAP_SYS_PTRACE in capabilities.effective():
        return ""
    return "CAP_SYS_PTRACE is missing, to find those that have no name"


def named(directory: Path) -> dict[int, str]:
    """Those that `ip netns` keeps there, by number."""
    found: dict[int, str] = {}
    for path in directory.iterdir() if directory.is_dir() else ():
        with contextlib.suppress(OSError):  # it has gone
            found[path.stat().st_ino] = path.name
    return found
