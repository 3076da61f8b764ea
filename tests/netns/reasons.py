# SPDX-License-Identifier: Apache-2.0
"""Whether packets have left for a reason meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any


def packets(status: Mapping[str, Any]) -> dict[str, int]:
    """By reason, of what `shunt status` has."""
    return {name: int(n["packets"]) for name, n in status["reasons"].items()}


@contextlib.contextmanager
def leaving(count: Callable[[], Mapping[str, int]], *reasons: str) -> Iterator[None]:
    """On leaving, `count` finds packets more for each of these."""
    before = count()
    yield
    after = count()
    for reason in reasons:
        assert after.get(reason, 0) > before.get(reason, 0), (reason, before, after)
