# SPDX-License-Identifier: Apache-2.0
"""Files and directories that change, told by inotify.

What is watched are directories: an editor replaces a file by renaming another one over it, which
a watch on the file itself would miss. The parent of each directory is watched as well, so that
one that comes, goes, or comes back is noticed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from shunt.lb.errors import ShuntError

# sys/inotify.h. A file counts when its writer closes it, not with every write.
IN_MODIFY, IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO = 0x2, 0x8, 0x40, 0x80
IN_CREATE, IN_DELETE, IN_DELETE_SELF, IN_MOVE_SELF = 0x100, 0x200, 0x400, 0x800
IN_Q_OVERFLOW, IN_IGNORED, IN_ONLYDIR, IN_MASK_ADD = 0x4000, 0x8000, 0x1000000, 0x20000000
IN_ISDIR = 0x40000000
_CONTENT = IN_CLOSE_WRITE | IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE
_MASK = _CONTENT | IN_MODIFY | IN_DELETE_SELF | IN_MOVE_SELF | IN_ONLYDIR
_EVENT = struct.Struct("=iIII")  # watch, mask, cookie, length of the name

_libc = ctypes.CDLL(None, use_errno=True)


class Watch:
    """Changes at and directly below some paths, which may be files or directories.

    Shape:  `read()` gives the paths that changed; a watched path itself among them says that
            anything there may have: it came, went, or there was more to tell than fitted.
            `writing` has those that somebody has begun to write and not yet closed; they have not
            changed yet.
    Raises: ShuntError if the kernel grants no further watch.
    """

    def __init__(self, paths: Iterable[str | Path]) -> None:
        # Not resolved: a link that is pointed elsewhere is a change, too.
        self._wanted = {Path(path).absolute() for path in paths}
        self._directories: dict[int, set[Path]] = {}
        self.writing: set[str] = set()
        self._fd: int = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise _refused("the configuration", ctypes.get_errno())
        try:
            self._add_all()
        except ShuntError:
            self.close()
            raise

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self) -> set[str]:
        """The paths that changed since the last call, without waiting."""
        changed: set[Path] = set()
        moved = False
        while data := self._take():
            for watch, mask, name in _events(data):
                if mask & IN_Q_OVERFLOW:
                    self.writing.clear()
                    changed |= self._wanted
                    moved = True
                elif mask & (IN_IGNORED | IN_DELETE_SELF | IN_MOVE_SELF):
                    moved = True
                    changed |= self._directories.get(watch, set()) & self._wanted
                    self._forget(watch, mask)
                else:
                    for place in self._directories.get(watch, ()):
                        found = self._concerned(place / name)
                        if mask & IN_MODIFY or _is_begun(place / name, mask):
                            self.writing |= {str(path) for path in found}
                        else:
                            self.writing -= {str(path) for path in found}
                            changed |= found
                    # Perhaps a directory that we wait for, or one on the way to it.
                    moved |= bool(mask & ~IN_CLOSE_WRITE & _CONTENT)
        if moved:
            # What came into being between its creation and our watch was not told.
            changed |= self._add_all()
        return {str(path) for path in changed}

    def _concerned(self, path: Path) -> set[Path]:
        """What to report for an event at `path`."""
        # A wanted link may lead by way of any name beside it: Kubernetes swaps `..data`.
        found = {p for p in self._wanted if p.parent == path.parent and p.is_symlink()}
        if path in self._wanted or path.parent in self._wanted:
            found.add(path)
        return found

    def _take(self) -> bytes:
        try:
            return os.read(self._fd, 1 << 16)
        except BlockingIOError:
            return b""

    def _add_all(self) -> set[Path]:
        """Watch each wanted path and its nearest ancestor; those that can be seen only now."""
        watched = {place for places in self._directories.values() for place in places}
        new: set[Path] = set()
        for path in self._wanted:
            if path not in watched and self._add(path):
                new.add(path)
            # Also when the path exists: it may be deleted or renamed.
            nearest = next(p for p in path.parents if p in watched or self._add(p))
            if nearest == path.parent and nearest not in watched and path.exists():
                new.add(path)
        return new

    def _add(self, path: Path) -> bool:
        # The same directory may have two names; watches are one for each inode.
        watch = _libc.inotify_add_watch(self._fd, os.fsencode(path), _MASK | IN_MASK_ADD)
        if watch >= 0:
            self._directories.setdefault(watch, set()).add(path)
            return True
        code = ctypes.get_errno()
        if code in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise _refused(str(path), code)

    def _forget(self, watch: int, mask: int) -> None:
        self._directories.pop(watch, None)
        if mask & IN_MOVE_SELF:
            # It lives on under another name, which is not ours.
            _libc.inotify_rm_watch(self._fd, watch)


def _events(data: bytes) -> Iterable[tuple[int, int, str]]:
    offset = 0
    while offset < len(data):
        watch, mask, _, length = _EVENT.unpack_from(data, offset)
        offset += _EVENT.size
        yield watch, mask, os.fsdecode(data[offset : offset + length].rstrip(b"\0"))
        offset += length


def _is_begun(path: Path, mask: int) -> bool:
    """Whether this event is of a file that its writer will close: no directory, no link."""
    if not mask & IN_CREATE or mask & IN_ISDIR:
        return False
    try:
        found = path.lstat()
    except OSError:  # gone already
        return False
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def _refused(path: str, code: int) -> ShuntError:
    limit = ""
    with contextlib.suppress(OSError):
        name = "max_user_instances" if code == errno.EMFILE else "max_user_watches"
        current = Path("/proc/sys/fs/inotify", name).read_text().strip()
        limit = f"sysctl -w fs.inotify.{name}={2 * int(current)}"
    return ShuntError(
        f"cannot watch {path} for changes",
        why=f"inotify: {os.strerror(code)}",
        fix=limit if code in (errno.EMFILE, errno.ENOSPC) else f"make {path} readable for shuntd",
    )
