# SPDX-License-Identifier: Apache-2.0
"""Waiting until every program that was running has ended."""

from __future__ import annotations

import ctypes
import os
import platform

_MEMBARRIER = {"x86_64": 324, "aarch64": 283, "riscv64": 283}
_CMD_GLOBAL = 1


def synchronize() -> None:
    """Wait for an RCU grace period: whoever read a map before this call has finished with it.

    membarrier's global command is synchronize_rcu(), which also covers XDP programs
    (they run with bottom halves off).

    Raises: OSError if the kernel has no membarrier or this processor's number is not known.
    """
    number = _MEMBARRIER.get(platform.machine())
    if number is None:
        raise OSError(f"membarrier's number on {platform.machine()} is not known")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, _CMD_GLOBAL, 0, 0) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"membarrier: {os.strerror(code)}")
