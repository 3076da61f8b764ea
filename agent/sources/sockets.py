# SPDX-License-Identifier: Apache-2.0
"""`sockets:` of shunt.yaml."""

from typing import Literal

from shunt.lb.model import Settings

from .shape import SettingsFile, SocketsEntry
from .typed import Path, Reader, each

Cover = Literal["host", "all", "off"]
NodePorts = Literal["reserve", "share"]
Close = Literal["udp", "all", "off"]
# The kernel's map has room for more.
MOST_GROUPS = 256
_DEFAULT = Settings(interfaces=())


def build_sockets(
    reader: Reader, written: SettingsFile
) -> tuple[Cover, tuple[str, ...], NodePorts, Close]:
    """Whose sockets are covered, which control groups are not, what becomes of binds, and which
    sockets are closed when their backends have gone.

    What is refused is noted as an error and left out.
    """
    entry, path = written.sockets, ("sockets",)
    if not isinstance(entry, SocketsEntry):
        return entry, (), _DEFAULT.node_ports, _DEFAULT.sockets_close
    found: dict[str, Path] = {}
    for where, text in each((*path, "exclude"), entry.exclude):
        parts = text.split("/")
        group = "/" + "/".join(part for part in parts if part)
        if not text.startswith("/") or group == "/" or {".", ".."} & set(parts) or "\0" in text:
            what = f"control group {text} is not one to exclude"
            wants = (
                "a path from the root of cgroup v2, and not the root itself (that is cover: off)"
            )
            reader.refuse(where, what, wants, "write it as /proc/PID/cgroup shows it behind `0::`")
        elif group in found:
            why = f"it is listed already at {reader.place(found[group])}"
            reader.error(where, f"control group {group} stands twice", why, "remove one of the two")
        else:
            found[group] = where
    if len(found) > MOST_GROUPS:
        what, fix = f"exclude has {len(found)} control groups", "exclude one that is above them"
        reader.error((*path, "exclude"), what, f"{MOST_GROUPS} fit", fix)
    return entry.cover, tuple(found), entry.node_ports, entry.close
