# SPDX-License-Identifier: Apache-2.0
"""Map services: a hash of frontends in a flat array, as the programs read it (bpf/abi.h).

A key's home is the line its hash names; it stands there or within `reach` lines after. Readers
never wait: an entry appears, changes its service, or vanishes by one 8-byte store. One that was
dropped is used again only after `reap`, which the caller calls once a grace period has passed.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shunt.lb.compile import mapped, unmapped
from shunt.lb.model import Frontend, Protocol
from shunt.lb.pools import full

LINE_ENTRIES = 2
WORDS = 4  # of 8 bytes in an entry: vip, vip, port to svc with reach, shortcut
REACH_MAX = 15
_MASK = (1 << 64) - 1
# In bpf/abi.h:
_SVC_SHIFT, _SVC_BITS, _REACH_SHIFT = 32, 24, 56
_SHORTCUT_SVC_SHIFT, _SHORTCUT_MODE_SHIFT = 40, 38
SHORTCUT_MODES = 2, 3  # MODE_DSR_IPIP, MODE_DSR_L2
UNSEEN = 32 | 64  # SVC_NO_SOCKETS, SVC_NODE: no packet cares
_KEY = np.uint64((1 << _REACH_SHIFT) - 1)  # of an entry's third word, all but the reach


def lines_for(frontends: int) -> int:
    """How many lines the array has for so many frontends: a quarter full at most.

    Units: lines of LINE_ENTRIES entries; a power of two.
    """
    return 2 << (max(1, frontends) - 1).bit_length()


def shortcut(svc: int, mode: int, flags: int, region: int) -> int:
    """The word that lets packets of a service's settled slots pass its record by; 0 if none may.

    Units: `mode`, `flags` and `region` as that record, struct svc_val, has them.
    """
    if mode not in SHORTCUT_MODES or flags & ~UNSEEN or region >> _SHORTCUT_MODE_SHIFT:
        return 0
    return svc << _SHORTCUT_SVC_SHIFT | mode << _SHORTCUT_MODE_SHIFT | region


def shortcuts(records: NDArray[Any]) -> NDArray[np.uint64]:
    """Of all services, by id; `records` is map svc."""
    fields = (records[name].tolist() for name in ("mode", "flags", "region"))
    each = enumerate(zip(*fields, strict=True))
    return np.array([shortcut(svc, *values) for svc, values in each], np.uint64)


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


def _svc(last: int) -> int:
    return last >> _SVC_SHIFT & (1 << _SVC_BITS) - 1


def _loopback(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Of addresses as they are stored, in two words."""
    v4 = second & np.uint64(0xFF_FFFFFFFF) == np.uint64(0x7F_FFFF0000)
    found: NDArray[np.bool_] = (first == 0) & (v4 | (second == np.uint64(1 << 56)))
    return found


class FrontendTable:
    """The table over the map's own memory.

    Shape: `words` is (lines, LINE_ENTRIES, WORDS) of uint64; lines is a power of two.
    """

    def __init__(self, words: NDArray[np.uint64]) -> None:
        self._words = words
        self._where: dict[Frontend, tuple[int, int]] = {}
        self._dropped: set[tuple[int, int]] = set()
        for line, entry in zip(*np.nonzero(words[:, :, 2] & _KEY), strict=True):
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
        return 0 if at is None else _svc(int(self._words[at][2]))

    def refresh(self, wanted: NDArray[np.uint64]) -> bool:
        """Bring all shortcuts to what they should be, by service id; whether any was not."""
        used = (self._words[:, :, 2] & _KEY) != 0
        last = self._words[used, 2]
        right = wanted[last >> np.uint64(_SVC_SHIFT) & np.uint64((1 << _SVC_BITS) - 1)]
        right[_loopback(self._words[used, 0], self._words[used, 1])] = 0
        if np.array_equal(self._words[used, 3], right):
            return False
        self._words[used, 3] = right
        return True

    def _read(self, at: tuple[int, int]) -> tuple[Frontend, int]:
        words = self._words[at]
        last = int(words[2])
        raw = last.to_bytes(8, "little")
        vip = unmapped(words[:2].tobytes())
        return Frontend(vip, int.from_bytes(raw[:2], "big"), Protocol(raw[2])), _svc(last)

    def put(self, frontend: Frontend, svc: int, shortcut: int = 0) -> None:
        """Let a frontend lead to a service; if it led to another, it changes in one store.

        The shortcut is there before, and of no use to a packet of another service. A loopback
        address gets none: only this host's own sockets may ask for it.

        Raises: ShuntError if there is no room. Nothing has changed then.
        """
        at = self._where.get(frontend)
        if at is None:
            home = frontend_hash(frontend) & (len(self._words) - 1)
            at, distance = self._room(home)
            self._words[at][:2] = np.frombuffer(mapped(frontend.vip), np.uint64)
            self._reach(home, distance)
        entry = self._words[at]
        reach = int(entry[2]) >> _REACH_SHIFT << _REACH_SHIFT
        entry[3] = 0 if frontend.vip.is_loopback else shortcut
        entry[2] = reach | svc << _SVC_SHIFT | _tail(frontend)
        self._where[frontend] = at

    def _reach(self, home: int, distance: int) -> None:
        entry = self._words[home, 0]
        if distance > int(entry[2]) >> _REACH_SHIFT:
            entry[2] = int(entry[2] & _KEY) | distance << _REACH_SHIFT

    def _room(self, home: int) -> tuple[tuple[int, int], int]:
        for distance in range(REACH_MAX + 1):
            line = (home + distance) % len(self._words)
            for n in range(LINE_ENTRIES):
                if not self._words[line, n, 2] & _KEY and (line, n) not in self._dropped:
                    return (line, n), distance
        raise full("frontends", self.capacity, f"no room near line {home}")

    def drop(self, frontend: Frontend) -> bool:
        """Let a frontend lead nowhere; whether it led anywhere."""
        at = self._where.pop(frontend, None)
        if at is None:
            return False
        self._words[at][2] &= ~_KEY
        self._dropped.add(at)
        return True

    def reap(self) -> None:
        """A grace period has passed: what was dropped may be used again."""
        self._dropped.clear()
