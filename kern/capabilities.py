# SPDX-License-Identifier: Apache-2.0
"""What this thread may do: linux/capability.h, and /proc/PID/status."""

from __future__ import annotations

import re
from pathlib import Path

CAP_NET_ADMIN, CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF = 12, 19, 21, 38, 39
STATUS = Path("/proc/thread-self/status")


def effective(status: Path = STATUS) -> frozenset[int]:
    """The numbers of those in force."""
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", status.read_text(), re.MULTILINE)
    held = int(found[1], 16) if found else 0
    return frozenset(bit for bit in range(held.bit_length()) if held >> bit & 1)
