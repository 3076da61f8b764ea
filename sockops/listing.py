# SPDX-License-Identifier: Apache-2.0
"""Sockets of the host that have something in a VIP's place, and streams' ends: list.bpf.c."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shunt.kern import iterators
from shunt.kern.maps import Map
from shunt.kern.objects import Object

OBJECT = Path(__file__).parent / "list.bpf.o"
# Which map each program is for.
OF = {"shunt_peers": "sock_peers", "shunt_flows": "sock_flows"}
ENDS, ENDS_MAP = "shunt_ends", "sock_streams"


class Listing:
    """The programs, loaded. They change nothing."""

    def __init__(self, path: Path = OBJECT) -> None:
        """Raises: ShuntError if the kernel refuses them."""
        self._object = Object(path)
        try:
            self.btf = self._object.btf
            self._row, self._end = self.btf.struct("sock_row"), self.btf.struct("stream_row")
            self._object.load()
        except BaseException:
            self._object.close()
            raise

    def rows(self, maps: Mapping[str, Map]) -> NDArray[Any]:
        """As it is now. `maps` are those of the programs of sockets.

        Shape: struct sock_row, one for each VIP that a socket has.
        Raises: OSError.
        """
        told = b"".join(
            iterators.run_once(self._object.programs[name].fd, maps[of].fd)
            for name, of in OF.items()
        )
        return np.frombuffer(told, self._row)

    def ends(self, maps: Mapping[str, Map]) -> NDArray[Any]:
        """The ends of streams, as they are now; none without the streams' own `maps`.

        Shape: struct stream_row.
        Raises: OSError.
        """
        if ENDS_MAP not in maps:
            return np.zeros(0, self._end)
        told = iterators.run_once(self._object.programs[ENDS].fd, maps[ENDS_MAP].fd)
        return np.frombuffer(told, self._end)

    def close(self) -> None:
        """Unload."""
        self._object.close()
