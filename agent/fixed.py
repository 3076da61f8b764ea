# SPDX-License-Identifier: Apache-2.0
"""What of the settings can't change while shuntd runs."""

from shunt.lb.errors import ShuntError
from shunt.lb.model import Settings

FIXED = ("limits", "hash_seed", "xdp_mode")


def check_change(before: Settings, after: Settings) -> None:
    """Raises: ShuntError if it did change."""
    for name in FIXED:
        old, new = getattr(before, name), getattr(after, name)
        if old != new:
            raise ShuntError(
                f"{name} can't change while shuntd runs",
                f"it is {old}, and the file now says {new}",
                "restart shuntd for it (packets go on meanwhile), or put it back",
            )
