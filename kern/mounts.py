# SPDX-License-Identifier: Apache-2.0
"""What is mounted where, from /proc/self/mountinfo."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Mount(NamedTuple):
    """One line; later ones lie on top of earlier ones. `root`: which part of it is mounted."""

    root: str
    point: Path
    kind: str


def mounts(mountinfo: Path) -> Iterator[Mount]:
    """In the order in which they were mounted."""
    for line in mountinfo.read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        root, point = fields.split()[3:5]
        # Spaces stand as \040 there.
        yield Mount(
            root, Path(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), point)), rest.split()[0]
        )
