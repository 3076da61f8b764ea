# SPDX-License-Identifier: Apache-2.0
"""A Unix socket to listen on: only for whom it is meant, and never taken from a living daemon."""

from __future__ import annotations

import grp
import os
import socket
import stat
from pathlib import Path

from shunt.lb.errors import ShuntError

GROUP = "shunt"
# Of a socket's path in sun_path, without the zero at its end (unix(7)).
PATH_MAX = 107


def listen(path: Path) -> socket.socket:
    """A Unix socket at `path` for root, and for the group `shunt` if there is one.

    Raises: ShuntError if somebody listens there, or if the path cannot be used.
    """
    if len(os.fsencode(path)) > PATH_MAX:
        raise ShuntError(
            f"the socket's path {path} is too long",
            f"the kernel takes {PATH_MAX} bytes, it has {len(os.fsencode(path))}",
            "give a shorter --run",
        )
    remove_stale(path)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        before = os.umask(0o117)  # from its first moment on nobody else may connect
        try:
            listening.bind(os.fspath(path))
        finally:
            os.umask(before)
        try:
            gid = grp.getgrnam(GROUP).gr_gid
        except KeyError:
            pass
        else:
            os.chown(path, -1, gid)
            _let_group_through(path.parent, gid)
        listening.listen()
    except OSError as e:
        listening.close()
        raise ShuntError(
            f"cannot listen on {path}", e.strerror or str(e), "give another directory with --run"
        ) from e
    listening.setblocking(False)
    return listening


def _let_group_through(directory: Path, gid: int) -> None:
    """A directory that is root's alone would keep the group from its socket."""
    found = directory.stat()
    if found.st_uid == os.geteuid() and not found.st_mode & stat.S_IXOTH:
        os.chown(directory, -1, gid)


def remove_stale(path: Path) -> None:
    """Remove the socket of a daemon that was killed.

    Raises: ShuntError if one lives, or if it is no socket. It is still there then.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ShuntError(
            f"{path} is in the way",
            "it is not a socket",
            f"remove it, or give another --run: {path}",
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(os.fspath(path))
        except (ConnectionRefusedError, FileNotFoundError):
            path.unlink(missing_ok=True)  # of a daemon that was killed
            return
        except OSError:
            pass  # it is somebody's, and busy
    raise ShuntError(
        f"another daemon listens on {path}",
        "a second one would take its socket away",
        "stop it (systemctl stop shuntd), or give this one its own --run",
    )
