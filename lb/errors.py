# SPDX-License-Identifier: Apache-2.0
"""The one form of an error a person reads: what happened, why, and how to fix it."""


class ShuntError(Exception):
    """What is wrong, why, and the fix; what was in force before stays in force."""

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        lines = [what]
        if why:
            lines.append(f"  why: {why}")
        if fix:
            lines.append(f"  fix: {fix}")
        super().__init__("\n".join(lines))
