# SPDX-License-Identifier: Apache-2.0
"""VIPs of this run alone. Programs of sockets are the whole machine's: another run's daemon that
covers all namespaces would translate VIPs that both have."""

from __future__ import annotations

import os

_PID = os.getpid()


def vip4(n: int) -> str:
    """One of 64."""
    assert 0 <= n < 64
    return f"100.{64 + n}.{_PID >> 8 & 255}.{_PID & 255}"


def vip6(n: int) -> str:
    return f"2001:db8:{_PID >> 16:x}:{_PID & 0xFFFF:x}::{n:x}"


def named(text: str) -> str:
    """The same without what is this run's: processes have to agree on the names of tests."""
    four, six = f".{_PID >> 8 & 255}.{_PID & 255}", f":{_PID >> 16:x}:{_PID & 0xFFFF:x}::"
    return text.replace(four, ".own").replace(six, ":own::")
