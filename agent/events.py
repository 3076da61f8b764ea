# SPDX-License-Identifier: Apache-2.0
"""The main events of a node, and the fields that their log records carry into the journal."""

from __future__ import annotations

import logging
from enum import StrEnum

from shunt.lb.compile import Endpoint
from shunt.lb.health import Turn

log = logging.getLogger("shunt")

# Where a record keeps its fields (`extra=about(...)`).
ATTRIBUTE = "journal"


class Event(StrEnum):
    """The main events, by MESSAGE_ID: `journalctl MESSAGE_ID=...` finds each kind.

    The ids are random (sd_id128_randomize(3)) and never change.
    """

    STARTED = "07c5bc8950554df7b7744afa365f0586"
    IN_FORCE = "c694b0d204c844f69c857b8d8dcd2bee"
    REFUSED = "52fb5013d8a0466ea4592effc6f75699"
    BACKEND_UP = "90dfc14192bb4a5cb94901b66edb60b7"
    BACKEND_DOWN = "6af2f9582fa041a98da7445e4347fba0"
    SOCKETS_CLOSED = "99064c7c5260e7eba7f228f256265b90"
    BIND_REFUSED = "b4dea3083f604d1fbddc05b85900fe45"
    STOPPED = "a51dd9002922497b8ce6940a1e248a87"


def about(event: Event | None = None, **fields: object) -> dict[str, dict[str, str]]:
    """The `extra` of a log call: a field `backend` becomes SHUNT_BACKEND in the journal."""
    found = {f"SHUNT_{name.upper()}": str(value) for name, value in fields.items()}
    if event is not None:
        found["MESSAGE_ID"] = event.value
    return {ATTRIBUTE: found}


def turned(service: str, endpoint: Endpoint, turn: Turn, reason: str) -> None:
    """Log that a backend is up, fails, or is given up."""
    up = turn is Turn.UP
    log.log(
        logging.INFO if up else logging.WARNING,
        "backend %s of service %s is %s%s",
        endpoint,
        service,
        turn,
        f": {reason}" if reason else "",
        extra=about(
            Event.BACKEND_UP if up else Event.BACKEND_DOWN,
            service=service,
            backend=endpoint,
            turn=turn,
            reason=reason,
        ),
    )
