# SPDX-License-Identifier: Apache-2.0
"""Ids and slot regions: handed out, and not handed out again while something can name them."""

from __future__ import annotations

from collections.abc import Iterable

from shunt.lb.errors import ShuntError


class Ids:
    """Small integers from 1 to limit - 1. A retired one waits until `release`."""

    def __init__(self, name: str, limit: int, used: Iterable[int] = ()) -> None:
        self.name, self.limit = name, limit
        self._used = bytearray(limit)  # a byte each: a set takes 40
        for i in used:
            if i < limit:
                self._used[i] = 1
        self._next = 1
        self._free: list[int] = []

    def in_use(self) -> int:
        """How many are in use or waiting."""
        return self._used.count(1, 1)

    def available(self) -> int:
        """How many can be taken now."""
        return self.limit - 1 - self.in_use()

    def take(self) -> int:
        """Raises: ShuntError if all are in use or waiting; nothing changes."""
        if self._free:
            found = self._free.pop()
        else:
            found = self._used.find(0, self._next)
            if found < 0:
                self._next = self.limit
                raise full(self.name, self.limit)
            self._next = found
        self._used[found] = 1
        return found

    def release(self, ids: Iterable[int]) -> None:
        """Nothing names these any more: they may be handed out again."""
        for i in ids:
            if i < self.limit and self._used[i]:
                self._used[i] = 0
                if i < self._next:
                    self._free.append(i)


class Regions:
    """Aligned power-of-two ranges of a flat array: a buddy allocator (Knowlton, 1965)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._free: dict[int, set[int]] = {}
        at = 0
        while at < size:  # the largest aligned blocks that fit
            log2 = (size - at).bit_length() - 1
            if at:
                log2 = min(log2, (at & -at).bit_length() - 1)
            self._free.setdefault(log2, set()).add(at)
            at += 1 << log2

    def free_slots(self) -> int:
        """How many slots belong to nobody."""
        return sum(len(starts) << log2 for log2, starts in self._free.items())

    def take(self, log2: int) -> int:
        """The first slot of a free region of 2**log2.

        Raises: ShuntError if there is none; nothing changes.
        """
        fitting = [k for k, starts in self._free.items() if k >= log2 and starts]
        if not fitting:
            raise full("slots", self.size, f"no free run of {1 << log2}")
        k = min(fitting)
        first = min(self._free[k])
        self._split(first, k, log2, first)
        return first

    def claim(self, first: int, log2: int) -> None:
        """Take this very region, as found in the maps.

        Raises: ShuntError if it is not free.
        """
        for k, starts in self._free.items():
            block = first >> k << k
            if k >= log2 and block in starts:
                self._split(block, k, log2, first)
                return
        raise ShuntError(
            f"two services share slots {first}..{first + (1 << log2) - 1}",
            "the pinned maps contradict each other",
            "take them away with `shunt cleanup` and start again",
        )

    def _split(self, block: int, k: int, log2: int, want: int) -> None:
        self._free[k].remove(block)
        while k > log2:
            k -= 1
            half = block + (1 << k)
            keep, block = (block, half) if want >= half else (half, block)
            self._free.setdefault(k, set()).add(keep)

    def give(self, first: int, log2: int) -> None:
        """Give a region back; nothing may name it any more."""
        while (buddy := first ^ 1 << log2) in self._free.get(log2, ()):
            self._free[log2].remove(buddy)
            first, log2 = min(first, buddy), log2 + 1
        self._free.setdefault(log2, set()).add(first)


def full(name: str, limit: int, why: str = "") -> ShuntError:
    """The error of a table with no room."""
    return ShuntError(
        f"table {name} is full",
        f"it holds {limit} elements" + (f", {why}" if why else ""),
        f"raise limits.{name} in shunt.yaml and restart shuntd",
    )
