# SPDX-License-Identifier: Apache-2.0
from typing import Any

import numpy as np
from numpy.typing import NDArray

OPENING: int
CONFIRMED: int
CLOSING: int
STATE_SHIFT: int
STATE_MASK: int
SEEN_SHIFT: int
TICK_SHIFT: int
REACH: int

def delete(
    lines: NDArray[Any],
    index: NDArray[np.uint32],
    words: NDArray[np.uint64],
    deleted: NDArray[np.bool_],
    /,
) -> None: ...
def insert(lines: NDArray[Any], flows: NDArray[Any], /) -> tuple[int, int]: ...
def mend(lines: NDArray[Any], /) -> int: ...
