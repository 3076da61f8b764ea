# SPDX-License-Identifier: Apache-2.0
"""Map services: a hash of frontends in a flat array, as the programs read it (bpf/abi.h).

A key's home is the line its hash names; it stands there or within `reach` lines after. Readers
never wait: an entry appears, changes its service, or vanishes by one 8-byte store. One that was
dropped is used again only after `reap`, which the caller calls once a grace period has passed.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address

import numpy as np
from numpy.typing import NDArray

from shunt.lb.compile import mapped, unmapped
from shunt.lb.model import Frontend, Protocol
from shunt.lb.pools import full

LINE_ENTRIES = 2
WORDS = 4  # of 8 bytes in an entry: vip, vip, port to svc, reach
REACH_MAX = 15
_MASK = (1 << 64) - 1


def lines_for(frontends: int) -> int:
    """How many lines the array has for so many frontends: a quarter full at most.

    Units: lines of LINE_ENTRIES entries; a power of two.
    """
    return 2 << (max(1, frontends) - 1).bit_length()


def frontend_hash(frontend: Frontend) -> int:
    """bpf/parse.h's frontend_hash, of 64 bits."""
    tail = _tail(frontend)
    if isinstance(frontend.vip, IPv4Address):
        return _stir(int.from_bytes(frontend.vip.packed, "little") << 32 | tail)
    low, high = (int.from_bytes(half, "little") for half in _halves(frontend))
    return _stir(_stir(_stir(low) ^ high) ^ tail)


def _stir(x: int) -> int:
    x ^= x >> 33
    x = x * 0xFF51AFD7ED558CCD & _MASK
    return x ^ x >> 33


def _halves(frontend: Frontend) -> tuple[bytes, bytes]:
    raw = mapped(frontend.vip)
    return raw[:8], raw[8:]


def _tail(frontend: Frontend) -> int:
    raw = frontend.port.to_bytes(2, "big") + bytes((int(frontend.protocol), 0))
    return int.from_bytes(raw, "little")


class FrontendTable:
    """The table over the map's own memory.

    Shape: `words` is (lines, LINE_ENTRIES, WORDS) of uint64; lines is a power of two.
    """

    def __init__(self, words: NDArray[np.uint64]) -> None:
        self._words = words
        self._where: dict[Frontend, tuple[int, int]] = {}
        self._dropped: set[tuple[int, int]] = set()
        for line, entry in zip(*np.nonzero(words[:, :, 2]), strict=True):
            at = int(line), int(entry)
            self._where[self._read(at)[0]] = at

    def __len__(self) -> int:
        return len(self._where)

    @property
    def capacity(self) -> int:
        """How many frontends it is meant for."""
        return len(self._words) // 2

    def items(self) -> Iterator[tuple[Frontend, int]]:
        """Each frontend with its service id."""
        for at in list(self._where.values()):
            yield self._read(at)

    def get(self, frontend: Frontend) -> int:
        """The service id that a frontend leads to; 0 if nowhere."""
        at = self._where.get(frontend)
        return 0 if at is None else int(self._words[at][2]) >> 32

    def _read(self, at: tuple[int, int]) -> tuple[Frontend, int]:
        words = self._words[at]
        last = int(words[2])
        raw = last.to_bytes(8, "little")
        vip = unmapped(words[:2].tobytes())
        return Frontend(vip, int.from_bytes(raw[:2], "big"), Protocol(raw[2])), last >> 32

    def put(self, frontend: Frontend, svc: int) -> None:
        """Let a frontend lead to a service; if it led to another, it changes in one store.

        Raises: ShuntError if there is no room. Nothing has changed then.
        """
        last = np.uint64(svc << 32 | _tail(frontend))
        if at := self._where.get(frontend):
            self._words[at][2] = last
            return
        home = frontend_hash(frontend) & (len(self._words) - 1)
        at, distance = self._room(home)
        entry = self._words[at]
        entry[:2] = np.frombuffer(mapped(frontend.vip), np.uint64)
        self._words[home, 0, 3] = max(self._words[home, 0, 3], distance)
        entry[2] = last
        self._where[frontend] = at

    def _room(self, home: int) -> tuple[tuple[int, int], int]:
        for distance in range(REACH_MAX + 1):
            line = (home + distance) % len(self._words)
            for n in range(LINE_ENTRIES):
                if not self._words[line, n, 2] and (line, n) not in self._dropped:
                    return (line, n), distance
        raise full("frontends", self.capacity, f"no room near line {home}")

    def drop(self, frontend: Frontend) -> bool:
        """Let a frontend lead nowhere; whether it led anywhere."""
        at = self._where.pop(frontend, None)
        if at is None:
            return False
        self._words[at][2] = 0
        self._dropped.add(at)
        return True

    def reap(self) -> None:
        """A grace period has passed: what was dropped may be used again."""
        self._dropped.clear()
