# SPDX-License-Identifier: Apache-2.0
"""What was asked for and cannot be had; everything else goes on without it."""

from __future__ import annotations

import logging
from collections.abc import Container

from shunt.lb.errors import ShuntError

log = logging.getLogger(__name__)


class Troubles(dict[str, ShuntError]):
    """By what is concerned, as `shunt status` shows them. Each is logged once, when it begins."""

    def tell(self, what: str, error: ShuntError | None) -> None:
        """What is wrong now, or (None) no longer."""
        if error is None:
            self.pop(what, None)
            return
        if str(self.get(what)) != str(error):
            log.warning("%s", error)
        self[what] = error

    def forget_others(self, kind: str, wanted: Container[str]) -> None:
        """Of those named `KIND NAME`, keep the ones whose name is wanted."""
        for what in [w for w in self if w.startswith(f"{kind} ")]:
            if what.removeprefix(f"{kind} ") not in wanted:
                del self[what]
