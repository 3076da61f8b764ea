# SPDX-License-Identifier: Apache-2.0
"""What shuntd tells systemd, if systemd started it: sd_notify(3), sd_watchdog_enabled(3)."""

from __future__ import annotations

import asyncio
import os
import socket


def notify(*state: str) -> None:
    """Send assignments (READY=1, STATUS=...) if systemd asked for them."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
            s.connect("\0" + path[1:] if path.startswith("@") else path)
            s.send("\n".join(state).encode())


def watchdog_s() -> float | None:
    """How often a sign of life is due; None if nobody waits for one."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        timeout_us = int(os.environ.get("WATCHDOG_USEC", ""))
    except ValueError:
        return None
    # Half of the limit is what sd_watchdog_enabled(3) recommends; a busy loop gets a third try.
    return timeout_us / 3e6 if timeout_us > 0 else None


async def keep_alive() -> None:
    """Signs of life from the event loop: a daemon whose loop hangs is killed and started again."""
    interval_s = watchdog_s()
    while interval_s is not None:
        notify("WATCHDOG=1")
        await asyncio.sleep(interval_s)
    await asyncio.Event().wait()
