# SPDX-License-Identifier: Apache-2.0
"""What a node keeps about itself: the operator's wishes, and what it has counted."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Wish:
    """What the operator asked for at run time."""

    drained: bool = False
    weight: int = 0  # 0: as configured


@dataclass
class Counts:
    """Of this process."""

    reloads: int = 0
    refused: int = 0
    writes: int = 0
    apply_s: float = 0.0  # of the last one
    read_s: float = 0.0  # of the files, at the start
    first_apply_s: float = 0.0  # from then on until all was in force
    started_s: float = field(default_factory=time.monotonic)
