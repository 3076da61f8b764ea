# SPDX-License-Identifier: Apache-2.0
"""Which backends are in slow start, kept for a daemon that comes later.

Times are of the monotonic clock, which goes on over a restart of the daemon and begins anew with
the host; so does everything else that a backend is. What cannot be kept or read is done without: a
backend has its whole share a little early then.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path

import msgspec

from shunt.lb.compile import Endpoint

log = logging.getLogger("shunt")

Key = tuple[str, Endpoint]  # service name, endpoint
FILE = "starts.json"
BOOT = Path("/proc/sys/kernel/random/boot_id")
# Many begin at once; they are written together. Who is killed within it loses the newest.
COALESCE_S = 0.1


class _File(msgspec.Struct, forbid_unknown_fields=True):
    boot: str
    starts: list[tuple[str, str, int, float]]  # service, address, port, since when in seconds


class Starts:
    """The file in `directory`. `begun` says when each began: it is asked when it is written."""

    def __init__(self, directory: Path, begun: Mapping[Key, float]) -> None:
        self.path = directory / FILE
        self._begun = begun
        self._writing: asyncio.TimerHandle | None = None

    def read(self) -> dict[Key, float]:
        """What was kept since the host booted."""
        try:
            found = msgspec.json.decode(self.path.read_bytes(), type=_File)
            if found.boot != _boot():
                return {}
            return {
                (service, Endpoint(ip_address(address), port)): began_s
                for service, address, port, began_s in found.starts
            }
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as e:  # msgspec's errors are ValueErrors
            log.warning("slow starts of before are not known: %s: %s", self.path, e)
        return {}

    def changed(self) -> None:
        """Some began or ended: keep it, soon."""
        if self._writing is None:
            self._writing = asyncio.get_running_loop().call_later(COALESCE_S, self._write)

    def close(self) -> None:
        """Keep what is now."""
        if self._writing is not None:
            self._writing.cancel()
            self._write()

    def _write(self) -> None:
        self._writing = None
        starts = [
            (service, str(endpoint.address), endpoint.port, began_s)
            for (service, endpoint), began_s in self._begun.items()
        ]
        new = self.path.with_name(f".{FILE}.new")
        try:
            if not starts:
                self.path.unlink(missing_ok=True)
                return
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            new.write_bytes(msgspec.json.encode(_File(_boot(), starts)))
            new.rename(self.path)
        except OSError as e:
            log.warning("slow starts are not kept for a restart: %s: %s", self.path, e)


def _boot() -> str:
    return BOOT.read_text().strip()
