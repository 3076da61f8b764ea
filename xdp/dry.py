# SPDX-License-Identifier: Apache-2.0
"""Programs that only tell: xdp/dry.bpf.c or tc/dry.bpf.c, on the maps of the live one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Self

import numpy as np

from shunt.kern.maps import Map
from shunt.kern.objects import Object
from shunt.kern.testrun import Ran, run_xdp

OBJECT = Path(__file__).parent / "dry.bpf.o"
PROGRAM = "shunt_lb"
# The maps that it has for itself. To no other does it write.
OWN = frozenset(
    {
        *("scratch", "events", "budget", "restarts"),
        *("hooks", "hook_view", "hook_state", "hook_stats"),
    }
)


@dataclass(frozen=True, slots=True)
class Step:
    """What happened on the way: enum step_kind of bpf/step.h, which says what `a` and `b` are."""

    kind: IntEnum
    a: int
    b: int


@dataclass(frozen=True, slots=True)
class Tried:
    """What would become of a packet. `verdict` is what the program returns, `data` the frame as it
    leaves; the last step has the action and the reason."""

    verdict: int
    data: bytes
    steps: tuple[Step, ...]


class DryRun:
    """The program, loaded. One packet at a time."""

    def __init__(
        self,
        config: Any,
        maps: Mapping[str, Map],
        path: Path = OBJECT,
        program: str = PROGRAM,
        run: Callable[[int, bytes, int], Ran] = lambda fd, data, ifindex: run_xdp(
            fd, data, ifindex=ifindex
        ),
    ) -> None:
        """`config` is the live program's struct lb_config, and `maps` are its maps.

        Raises: ShuntError if the maps are not those of this version, or the kernel refuses.
        """
        self._live, self._program, self._run = maps, program, run
        self._object = Object(path)
        try:
            self._object.keep_programs(program)
            self._object.variable(".rodata", "config")[...] = config
            self._object.set_entries(
                {name: maps[name].spec.entries for name in self._object.map_names()}
            )
            for name in set(self._object.map_names()) - OWN:
                self._object.reuse(name, maps[name].fd, name)
            self._object.load()
            self.clock = self._object.variable(".bss", "test_now_ns")
            self._trace = self._object.variable(".bss", "trace")
        except BaseException:
            self._object.close()
            raise
        self.kinds: Any = self._object.btf.enum("step_kind", "STEP_")

    def run(self, frame: bytes, ifindex: int = 0) -> Tried:
        """What would become of a frame that comes in on an interface.

        Raises: OSError if there is no such interface, or the frame is shorter than its header or
                longer than a page has room for.
        """
        # Tokens are taken from a copy of what is left of them.
        budget = self._live["budget"].lookup(0)
        assert budget is not None
        self._object.maps["budget"].update(0, budget)
        self._trace["count"] = 0
        ran = self._run(self._object.programs[self._program].fd, frame, ifindex)
        steps = np.copy(self._trace["step"][: int(self._trace["count"])])
        return Tried(
            ran.verdict,
            ran.data,
            tuple(Step(self.kinds(kind), a, b) for kind, a, b in steps.tolist()),
        )

    def close(self) -> None:
        """Unload."""
        self._object.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
