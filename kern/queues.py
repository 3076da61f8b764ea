# SPDX-License-Identifier: Apache-2.0
"""A network device's receive rings, its queues, and which processors their interrupts go to."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyroute2.ethtool.ioctl import IoctlEthtool  # type: ignore[import-untyped]

SYS, PROC = Path("/sys"), Path("/proc")
# How drivers call the interrupts that packets come by: virtio0-input.0, eth0-TxRx-3, mlx5_comp0.
_RECEIVING = re.compile(r"input|rx|comp|queue|-\d+$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Queues:
    """What the driver tells; None where it does not. Pairs are (now, at most)."""

    ring: tuple[int, int] | None = None  # packets that a receive queue holds
    channels: tuple[int, int] | None = None  # queues that receive
    irqs: Mapping[int, frozenset[int]] = field(default_factory=dict)  # interrupt: processors


def queues(name: str, sys: Path = SYS, proc: Path = PROC) -> Queues:
    """Of one device. Raises: OSError if it has gone."""
    ethtool = IoctlEthtool(name)
    try:
        return Queues(
            _told(lambda: _ring(ethtool.get_rings())),
            _told(lambda: _channels(ethtool.get_channels())),
            interrupts(name, sys, proc),
        )
    finally:
        ethtool.close()


def interrupts(name: str, sys: Path = SYS, proc: Path = PROC) -> dict[int, frozenset[int]]:
    """The interrupts that a device's packets come by, and the processors that they go to."""
    device = (sys / "class/net" / name / "device").resolve()
    numbers: set[int] = set()
    for place in (device, device.parent):  # a virtio device's are its PCI device's
        folder = place / "msi_irqs"
        if folder.is_dir():
            numbers = {int(path.name) for path in folder.iterdir()}
            break
    found = {}
    table = (proc / "interrupts").read_text() if (proc / "interrupts").is_file() else ""
    for line in table.splitlines():
        number, _, rest = line.strip().partition(":")
        if not number.isdigit() or int(number) not in numbers:
            continue
        affinity = proc / "irq" / number / "effective_affinity_list"
        if _RECEIVING.search(rest.split()[-1]) and affinity.is_file():
            found[int(number)] = cpu_list(affinity.read_text())
    return found


def cpu_list(text: str) -> frozenset[int]:
    """'0-2,5' as the kernel writes it."""
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        low, _, high = part.partition("-")
        found.update(range(int(low), int(high or low) + 1))
    return frozenset(found)


def _told(ask: Callable[[], tuple[int, int]]) -> tuple[int, int] | None:
    # pyroute2 has an exception of its own for what a driver does not support.
    try:
        found = ask()
    except Exception:  # noqa: BLE001
        return None
    return found if found[1] else None


def _ring(told: Any) -> tuple[int, int]:
    return int(told.rx), int(told.rx_max)


def _channels(told: Any) -> tuple[int, int]:
    now = int(told.combined_count) + int(told.rx_count)
    return now, int(told.max_combined) or int(told.max_rx)
