# SPDX-License-Identifier: Apache-2.0
"""Every socket of the host that has something in a VIP's place: sockops/list.bpf.c."""

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


class Listing:
    """The programs, loaded. They change nothing."""

    def __init__(self, path: Path = OBJECT) -> None:
        """Raises: ShuntError if the kernel refuses them."""
        self._object = Object(path)
        try:
            self._row = self._object.btf.struct("sock_row")
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
            iterators.run_once(program.fd, maps[OF[name]].fd)
            for name, program in self._object.programs.items()
        )
        return np.frombuffer(told, self._row)

    def close(self) -> None:
        """Unload."""
        self._object.close()
