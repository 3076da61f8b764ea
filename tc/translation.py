# SPDX-License-Identifier: Apache-2.0
"""The TC programs and their maps, which are those of the load balancer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shunt.kern.maps import Map
from shunt.kern.objects import Object, Program
from shunt.kern.tc import Direction
from shunt.kern.testrun import Ran, run_tc
from shunt.lb.model import Settings
from shunt.tc import attach
from shunt.xdp.attach import configure, entries, fit
from shunt.xdp.dry import DryRun

OBJECT = Path(__file__).parent / "translate.bpf.o"
DRY = Path(__file__).parent / "dry.bpf.o"


class Translation:
    """What is attached goes on by itself; this loads, swaps and takes away."""

    def __init__(self, bpffs: Path, *, use_tcx: bool | None = None) -> None:
        self.bpffs = bpffs
        self.use_tcx = attach.tcx_here() if use_tcx is None else use_tcx
        self._obj: Object | None = None
        self._maps: Mapping[str, Map] = {}
        self.config: Any = None  # of the loaded programs, a struct lb_config

    def load(self, settings: Settings, maps: Mapping[str, Map]) -> None:
        """Load the programs on the load balancer's maps; nothing is attached yet.

        Raises: ShuntError if the kernel refuses. The programs attached before go on.
        """
        obj = Object(OBJECT)
        try:
            obj.set_entries(entries(settings.limits))
            fit(obj)
            config = obj.variable(".rodata", "config")
            configure(config, settings)
            config = config.copy()
            for name in obj.map_names():
                obj.reuse(name, maps[name].fd, name)
            obj.load()
        except BaseException:
            obj.close()
            raise
        self.close()
        self._obj, self._maps = obj, maps
        self.config = config

    def dry_run(self, way: Direction) -> DryRun:
        """A program that tells what the loaded one does; of use until the next `load`.

        Raises: ShuntError if the kernel refuses.
        """

        def run(fd: int, frame: bytes, ifindex: int) -> Ran:
            return run_tc(fd, frame, ifindex=ifindex)

        return DryRun(self.config, self._maps, DRY, attach.PROGRAMS[way], run)

    @property
    def programs(self) -> list[Program]:
        """Those that are loaded."""
        return list(self._obj.programs.values()) if self._obj else []

    @property
    def loaded(self) -> bool:
        """Whether this process has them loaded."""
        return self._obj is not None

    def attach(self, interfaces: Iterable[str]) -> None:
        """Attach to these interfaces and to no others.

        Raises: ShuntError; what was attached before goes on.
        """
        assert self._obj is not None, "load() comes first"
        programs = {d: self._obj.programs[name].fd for d, name in attach.PROGRAMS.items()}
        attach.attach(self.bpffs, interfaces, programs, use_tcx=self.use_tcx)

    def detach(self) -> None:
        """Take the programs away from every interface."""
        attach.cleanup(self.bpffs)
        self.close()

    def attached(self) -> dict[str, str]:
        """How interfaces have them, by name: tcx or clsact."""
        return attach.attached(self.bpffs)

    def close(self) -> None:
        """Let go; what is attached stays."""
        if self._obj is not None:
            self._obj.close()
            self._obj = None
