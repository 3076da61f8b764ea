# SPDX-License-Identifier: Apache-2.0
"""The decision of sockets, asked without one, on the maps in force: sockops/dry.bpf.c."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shunt.kern.maps import Map
from shunt.kern.objects import Object
from shunt.kern.testrun import run_syscall
from shunt.sockops.attach import share
from shunt.xdp.dry import Step

OBJECT = Path(__file__).parent / "dry.bpf.o"
PROGRAM = "shunt_sock_try"


class DrySockets:
    """The program, loaded. It writes to none of these maps. One question at a time."""

    def __init__(
        self,
        maps: Mapping[str, Map],
        own: Mapping[str, Map],
        *,
        excludes: bool,
        path: Path = OBJECT,
    ) -> None:
        """`maps` are the balancer's, `own` those of the programs of sockets.

        Raises: ShuntError if the maps are not those of this version, or the kernel refuses.
        """
        self._object = Object(path)
        try:
            share(self._object, maps)
            for name in set(self._object.map_names()) & own.keys():
                self._object.reuse(name, own[name].fd, name)
            self._object.variable(".rodata", "config")["excludes"] = excludes
            self._object.load()
            self._trace = self._object.variable(".bss", "trace")
        except BaseException:
            self._object.close()
            raise
        btf = self._object.btf
        self._try = btf.struct("sock_try")
        self.kinds: Any = btf.enum("step_kind", "STEP_")

    def ask(self, cgroups: Sequence[int] = (), **fields: Any) -> tuple[Any, tuple[Step, ...]]:
        """What struct sock_ask of these fields is answered with (struct sock_answer), and the way.

        `cgroups`: ids of the process's control group and those above it, the outermost first; as
        many as the programs look at count.
        """
        context = np.zeros((), self._try)
        looked_at = context["cgroups"][: len(cgroups)]
        looked_at[:] = cgroups[: len(looked_at)]
        for name, value in fields.items():
            context["ask"][name] = value
        self._trace["count"] = 0
        raw = run_syscall(self._object.programs[PROGRAM].fd, context.tobytes())
        steps = np.copy(self._trace["step"][: int(self._trace["count"])])
        told = tuple(Step(self.kinds(kind), a, b) for kind, a, b in steps.tolist())
        return np.frombuffer(raw, self._try)[0]["answer"], told

    def instructions(self) -> bytes:
        """What was loaded. Units: 8 bytes an instruction."""
        return self._object.instructions(PROGRAM)

    def close(self) -> None:
        """Unload."""
        self._object.close()
