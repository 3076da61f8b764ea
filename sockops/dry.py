# SPDX-License-Identifier: Apache-2.0
"""The decisions of sockets, asked without one, on the maps in force: sockops/dry.bpf.c."""

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
PROGRAM, BIND = "shunt_sock_try", "shunt_bind_try"


class DrySockets:
    """The programs, loaded. They write to none of these maps. One question at a time."""

    def __init__(
        self,
        maps: Mapping[str, Map],
        own: Mapping[str, Map],
        *,
        excludes: bool,
        netns: int,
        path: Path = OBJECT,
    ) -> None:
        """`maps` are the balancer's, `own` those of the programs of sockets; `netns` is the cookie
        of the network namespace whose ports node ports are.

        Raises: ShuntError if the maps are not those of this version, or the kernel refuses.
        """
        self._object = Object(path)
        try:
            share(self._object, maps)
            for name in set(self._object.map_names()) & own.keys():
                self._object.reuse(name, own[name].fd, name)
            config = self._object.variable(".rodata", "config")
            config["excludes"], config["netns"] = excludes, netns
            self._object.load()
            self._trace = self._object.variable(".bss", "trace")
        except BaseException:
            self._object.close()
            raise
        btf = self._object.btf
        self._try, self._bind = btf.struct("sock_try"), btf.struct("bind_try")
        self.kinds: Any = btf.enum("step_kind", "STEP_")

    def ask(self, cgroups: Sequence[int] = (), **fields: Any) -> tuple[Any, tuple[Step, ...]]:
        """What struct sock_ask of these fields is answered with (struct sock_answer), and the way.

        `cgroups`: ids of the process's control group and those above it, the outermost first; as
        many as the programs look at count.
        """
        context = np.zeros((), self._try)
        looked_at = context["cgroups"][: len(cgroups)]
        looked_at[:] = cgroups[: len(looked_at)]
        return self._run(PROGRAM, context, fields)["answer"], self._steps()

    def bind(self, **fields: Any) -> tuple[int, tuple[Step, ...]]:
        """How a bind() of these fields of struct bind_ask ends (enum sock_reason), and the way."""
        return int(self._run(BIND, np.zeros((), self._bind), fields)["reason"]), self._steps()

    def _run(self, program: str, context: Any, fields: Mapping[str, Any]) -> Any:
        """The context as the program left it."""
        for name, value in fields.items():
            context["ask"][name] = value
        self._trace["count"] = 0
        raw = run_syscall(self._object.programs[program].fd, context.tobytes())
        return np.frombuffer(raw, context.dtype)[0]

    def _steps(self) -> tuple[Step, ...]:
        """Those of the last question."""
        steps = np.copy(self._trace["step"][: int(self._trace["count"])])
        return tuple(Step(self.kinds(kind), a, b) for kind, a, b in steps.tolist())

    def instructions(self, program: str) -> bytes:
        """What was loaded. Units: 8 bytes an instruction."""
        return self._object.instructions(program)

    def close(self) -> None:
        """Unload."""
        self._object.close()
