# SPDX-License-Identifier: Apache-2.0
"""Map server_ids: which backend a QUIC connection id leads to, by service and server id."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from shunt.kern.maps import Map, Records

SERVER_ID_MAX = 15  # bpf/abi.h; a test compares


@dataclass(frozen=True, slots=True)
class PutServerId:
    """A server id of a service leads to a backend."""

    svc: int
    server_id: bytes
    backend: int


@dataclass(frozen=True, slots=True)
class DropServerId:
    """A server id of a service leads nowhere."""

    svc: int
    server_id: bytes


class ServerIds:
    """The map, and what is in it."""

    def __init__(self, table: Map) -> None:
        self._table = table
        self.there: dict[int, dict[bytes, int]] = {}  # by service
        keys, values = table.items()
        for key, word in zip(keys, values["word"].tolist(), strict=True):
            raw = key["id"].tobytes()[: int(key["id_bytes"])]
            self.there.setdefault(int(key["svc"]), {})[raw] = word & 0xFFFFFFFF

    def __len__(self) -> int:
        return sum(map(len, self.there.values()))

    @property
    def capacity(self) -> int:
        """How many there is room for."""
        return self._table.spec.entries

    def of(self, svc: int) -> dict[bytes, int]:
        """A service's: backends by server id."""
        return self.there.get(svc, {})

    def put(self, write: PutServerId) -> None:
        """Raises: ShuntError if the map is full."""
        value = self._table.new_values(1)
        value["word"] = write.svc << 32 | write.backend
        self._fill(value, write.server_id)
        self._table.update(self._key(write.svc, write.server_id), value)
        self.there.setdefault(write.svc, {})[write.server_id] = write.backend

    def drop(self, write: DropServerId) -> None:
        """Remove one that is there."""
        self._table.delete(self._key(write.svc, write.server_id))
        del self.there[write.svc][write.server_id]
        if not self.there[write.svc]:
            del self.there[write.svc]

    def _key(self, svc: int, server_id: bytes) -> Records:
        key = self._table.new_keys(1)
        key["svc"] = svc
        self._fill(key, server_id)
        return key

    @staticmethod
    def _fill(record: Records, server_id: bytes) -> None:
        padded = server_id.ljust(SERVER_ID_MAX, b"\0")
        record["id"], record["id_bytes"] = np.frombuffer(padded, np.uint8), len(server_id)
