# SPDX-License-Identifier: Apache-2.0
"""What the demo shows: redrawn in place on a terminal, lines in a pipe."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from shunt.lab.reports import FLOWS, Kind
from shunt.lab.scenario import SERVICES, LabService
from shunt.lab.topology import SEGMENT4, SEGMENT6, Lab
from shunt.lab.traffic import Counts, Traffic
from shunt.lab.verdict import Step

CELL = 10
STYLES = {
    "shuntd": "green",
    "nginx": "green",
    "drained": "yellow",
    "no shuntd": "yellow",
    "off": "bold red",
    "killed": "bold red",
}
ASCII = str.maketrans({"│": "|", "━": "=", "┯": "+", "┿": "+", "·": "-"})


class View:
    """The demo's screen. Whoever runs the script keeps `states`, `steps` and `doing` current."""

    def __init__(self, console: Console, lab: Lab) -> None:
        self.console, self.lab = console, lab
        self.states: dict[str, str] = {}
        self.steps: list[Step] = []
        self.doing = ""
        self.traffic: Traffic | None = None
        self.live = console.is_terminal

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """On a terminal, keep it current below what is printed; it goes with the lab."""
        if not self.live:
            self.console.print(self.drawing())
            yield
            return
        with Live(
            get_renderable=self.render, console=self.console, refresh_per_second=4, transient=True
        ):
            yield

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False)

    def finish(self, step: Step) -> None:
        """What the step cost stays readable above the screen."""
        self.console.print(self.step_text(step))
        if not self.live and len(self.steps) == 1:
            self.console.print(self.table())

    def render(self) -> RenderableType:
        parts: list[RenderableType] = [Text(), self.drawing()]
        if self.traffic:
            parts.append(self.table())
        parts.append(Text(f"\n{self.doing}", style="bold"))
        return Group(*parts)

    def drawing(self) -> Text:
        """The topology in lab/topology.py, with what runs where at this moment."""
        hosts = [*self.lab.balancers, *self.lab.backends]
        via = ", ".join(host.role for host in self.lab.announced) or "nobody"
        text = Text("   client\n      │\n   router · ECMP by five-tuple, by way of ")
        text.append(via, style="bold")
        text.append("\n      │\n ━━━━━┿" + ("━" * (CELL - 1) + "┯") * len(hosts))
        text.append(f"━━━ {SEGMENT4}, {SEGMENT6}\n")
        rows = (
            [(host.role, "bold") for host in hosts],
            [("." + str(host.address4).rsplit(".", 1)[1], "dim") for host in hosts],
            [self._state(host.role) for host in hosts],
        )
        for row in rows:
            line = Text()
            for number, (word, style) in enumerate(row, start=1):
                line.pad_right(6 + CELL * number - len(word) // 2 - len(line))
                line.append(word, style=style)
            text.append(line).append("\n")
        return self._encodable(text)

    def _state(self, role: str) -> tuple[str, str]:
        state = self.states.get(role, "")
        return state, STYLES.get(state, "dim")

    def table(self) -> Table:
        """Since the last step began: HTTP requests and who answered them; flows; losses."""
        assert self.traffic
        step = self.steps[-1] if self.steps else None
        counts = self.traffic.answers()
        recent = counts - step.before if step else counts
        live = Counter(flow.target for flow in self.traffic.live())
        lost = Counter(f.target for s in self.steps for f in s.lost)
        backends = [host.role for host in self.lab.backends]
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
        for name in ("service", "mode", "VIP"):
            table.add_column(name, no_wrap=True)
        for name in ("requests", *backends, "flows", "lost"):
            table.add_column(name, justify="right", no_wrap=True)
        for service in SERVICES:
            table.add_row(*self._row(service, recent, backends, live, lost))
        return table

    @staticmethod
    def _row(
        service: LabService,
        recent: Counts,
        backends: Sequence[str],
        live: Counter[str],
        lost: Counter[str],
    ) -> list[str]:
        http = [recent[service.name, Kind.HTTP, backend] for backend in backends]
        total = sum(http)
        requests = sum(
            n for (t, kind, _), n in recent.items() if t == service.name and kind not in FLOWS
        )
        return [
            service.name,
            str(service.mode),
            str(service.vip),
            str(requests),
            *(f"{100 * n / total:.0f} %" if n else "·" for n in http),
            str(live[service.name]),
            str(lost[service.name]),
        ]

    @staticmethod
    def step_text(step: Step) -> Text:
        text = Text()
        style = "green" if step.good else "bold red"
        text.append("ok  " if step.good else "BAD ", style=style)
        text.append(f"{step.title}: ", style="bold")
        text.append(
            f"{step.requests} requests, {step.lost_requests} lost; "
            f"{step.flows_before} flows, {step.lost_flows} lost"
        )
        shares = ", ".join(
            f"{backend} {100 * n / step.shares.total():.0f} %"
            for backend, n in sorted(step.shares.items())
        )
        for line in (*step.notes, f"new connections to: {shares}"):
            text.append(f"\n      {line}", style="dim")
        for name, number in sorted(step.excused.items()):
            text.append(f"\n      counted apart: {number} {name}", style="yellow")
        for line in step.broken:
            text.append(f"\n      not as it should be: {line}", style="bold red")
        for failure in step.lost[:5]:
            text.append(
                f"\n      lost: {failure.target} {failure.kind}: {failure.reason} {failure.detail}",
                style="red",
            )
        if len(step.lost) > 5:
            text.append(f"\n      and {len(step.lost) - 5} more", style="red")
        return text

    def _encodable(self, text: Text) -> Text:
        if self.console.encoding.lower().startswith("utf"):
            return text
        text.plain = text.plain.translate(ASCII)
        return text
