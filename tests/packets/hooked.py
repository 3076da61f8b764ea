# SPDX-License-Identifier: Apache-2.0
"""A user's hook around a balancer that a test has loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shunt.kern.program_array import ProgramArray
from shunt.xdp import hook_source
from shunt.xdp.hook_source import Position
from shunt.xdp.hooks import CHAIN
from tests.packets.balancer import Balancer

HOOKS = Path(__file__).resolve().parent


@contextmanager
def hooked(
    lb: Balancer, path: Path, position: Position = Position.PRE_LB, pins: Path = HOOKS
) -> Iterator[Path]:
    """The hook in `path`, in force until the context ends; its maps are pinned in `pins`."""
    slots = lb.object.btf.enum("hook_slot", "HOOK_")
    array = ProgramArray(lb.map("hooks").fd)
    for slot, program in CHAIN:
        array.put(slots[slot], lb.object.programs[program].fd)
    flags = lb.object.flags("shunt_lb")
    with hook_source.load(path, position, lb.object.maps, flags, pins) as loaded:
        array.put(slots[position.slot], loaded.fd)
        array.copy(slots["ENTER"], slots["ENTRY"])
        yield pins
        array.clear(slots["ENTRY"])
        array.clear(slots[position.slot])
