# SPDX-License-Identifier: Apache-2.0
"""A dry program beside a live one, loaded for whoever asks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Closable(Protocol):
    def close(self) -> None: ...


T = TypeVar("T", bound=Closable)


class Twin(Generic[T]):
    """Loaded when it is asked for first, and again for each new live one."""

    def __init__(self, live: Callable[[], object], load: Callable[[], T]) -> None:
        """`live` is something of the live program, another object with each load of it."""
        self._live, self._load = live, load
        self._dry: T | None = None
        self._of: object = None
        self._loading = asyncio.Lock()

    def close(self) -> None:
        """Unload it."""
        if self._dry is not None:
            self._dry.close()
            self._dry = None

    async def ready(self) -> T:
        """Raises: what `live` and `load` raise, such as ShuntError if the kernel refuses it."""
        async with self._loading:
            # Looked at anew, since the live one may change while this is being loaded.
            while self._dry is None or self._of is not self._live():
                self.close()
                self._of = self._live()
                # The verifier may take a good part of a second over it.
                self._dry = await asyncio.to_thread(self._load)
        return self._dry
