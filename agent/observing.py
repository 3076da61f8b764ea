# SPDX-License-Identifier: Apache-2.0
"""What watches the data path beside its own counters: the kernel's tracepoints, its statistics of
programs, and the time that changes take."""

from __future__ import annotations

import logging
import os

from prometheus_client import Histogram, disable_created_metrics

from shunt.agent.troubles import Troubles
from shunt.kern.objects import Program
from shunt.kern.programs import enable_statistics
from shunt.lb.errors import ShuntError
from shunt.xdp.trace import Loss, Trace

log = logging.getLogger("shunt")

# A series for each, of which nobody makes anything.
disable_created_metrics()  # type: ignore[no-untyped-call]

# Units: seconds. A change of one backend takes the first, a first apply of thousands the last.
APPLY_BUCKETS = (
    *(0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0),
)


class Observing:
    """Of one node. Nothing here is needed to forward: what fails is told, and done without."""

    def __init__(self) -> None:
        self.apply_s = Histogram(
            "shunt_apply_duration_seconds",
            "From a change to its last write to the maps, where there was one.",
            buckets=APPLY_BUCKETS,
            registry=None,
        )
        self.troubles = Troubles()
        self._trace: Trace | None = None
        self._statistics = -1

    def start_tracing(self) -> None:
        """Count what is lost after the program; without the tracepoints nothing is."""
        if self._trace is not None:
            return
        try:
            self._trace = Trace()
        except (ShuntError, OSError) as e:
            log.info("frames lost after the program are not counted: %s", e)

    def losses(self) -> list[Loss]:
        """Since this process started."""
        return self._trace.losses() if self._trace is not None else []

    def programs(self) -> list[Program]:
        """Those that trace."""
        return self._trace.programs if self._trace is not None else []

    def want_statistics(self, wanted: bool) -> None:
        """Have the kernel take the time of every run of a program, or no longer."""
        refused: ShuntError | None = None
        if wanted and self._statistics < 0:
            try:
                self._statistics = enable_statistics()
            except OSError as e:
                refused = ShuntError(
                    "the run time of programs cannot be measured",
                    f"the kernel refuses: {e.strerror or e}; it wants CAP_SYS_ADMIN",
                    "sysctl -w kernel.bpf_stats_enabled=1, and set metrics.program_times: off",
                )
        elif not wanted and self._statistics >= 0:
            os.close(self._statistics)
            self._statistics = -1
        self.troubles.tell("statistics", refused)

    def close(self) -> None:
        """Let go of everything."""
        self.want_statistics(False)
        if self._trace is not None:
            self._trace.close()
            self._trace = None
