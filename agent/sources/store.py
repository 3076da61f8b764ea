# SPDX-License-Identifier: Apache-2.0
"""What the daemon must know after a restart: services of the API, and addresses given by pools.

One file, replaced in one step: after a crash there is the old one or the new one, whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import msgspec

from shunt.ipam.pools import Request
from shunt.lb.errors import ShuntError
from shunt.lb.model import IPAddress

FILE = "state.json"
VERSION = 1


@dataclass(frozen=True)
class State:
    """Services as they were given, the oldest first; addresses by who asked which pool."""

    services: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    vips: Mapping[Request, IPAddress] = field(default_factory=dict)


class _File(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    services: dict[str, dict[str, Any]]
    vips: dict[str, dict[str, str]]  # service, pool: address


class Store:
    """The file in `directory`, which is made when there is something to keep."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.path = directory / FILE

    def read(self) -> State:
        """What was kept; nothing, if nothing was.

        Raises: ShuntError if it cannot be read. It is left as it is.
        """
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return State()
        except OSError as e:
            raise self._unusable("cannot be read", e.strerror or str(e)) from e
        try:
            found = msgspec.json.decode(raw, type=_File)
            if found.version != VERSION:
                raise ValueError(f"it is of version {found.version}, this shuntd knows {VERSION}")
            vips = {
                Request(service, pool): ip_address(address)
                for service, given in found.vips.items()
                for pool, address in given.items()
            }
        except ValueError as e:  # msgspec's errors are ValueErrors
            raise self._unusable("is not what shuntd wrote", str(e)) from e
        return State(found.services, vips)

    def _unusable(self, what: str, why: str) -> ShuntError:
        return ShuntError(
            f"{self.path} {what}",
            why,
            "put it right, or move it away: then services of the API are gone, and pools give anew",
        )

    def write(self, state: State) -> None:
        """Keep `state`: when this returns, a loss of power does not lose it.

        Raises: ShuntError; what was kept before still is.
        """
        vips: dict[str, dict[str, str]] = {}
        for request, address in sorted(state.vips.items()):
            vips.setdefault(request.service, {})[request.pool] = str(address)
        raw = msgspec.json.encode(_File(VERSION, dict(state.services), vips))
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            _replace(self.path, msgspec.json.format(raw, indent=1) + b"\n")
        except OSError as e:
            raise ShuntError(
                f"{self.path} cannot be written",
                e.strerror or str(e),
                "make room and let shuntd write there, or name another directory with --state",
            ) from e


def _replace(path: Path, data: bytes) -> None:
    new = path.with_name(f".{path.name}.new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    new.rename(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)  # the name, too
    finally:
        os.close(directory)
