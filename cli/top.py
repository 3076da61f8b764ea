# SPDX-License-Identifier: Apache-2.0
"""`shunt top`."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import click

from shunt.cli import render
from shunt.cli.client import Client
from shunt.cli.options import Command, Options
from shunt.cli.progress import silent
from shunt.cli.rates import Reading, rates, reading

Json = dict[str, Any]
COLUMNS = ("SERVICE", "BACKEND", "STATE", "PACKETS/S", "BITS/S", "MOVING")
RIGHT = ("PACKETS/S", "BITS/S", "MOVING")
# Lines of the screen that are not rows.
FRAME_LINES = 3


@click.command(cls=Command)
@click.argument("service", required=False)
@click.option(
    "--interval", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True,
    help="Seconds between two looks.",
)  # fmt: skip
@click.option("--once", is_flag=True, help="One interval, then end.")
@click.pass_obj
def top(options: Options, service: str | None, interval: float, once: bool) -> None:
    """Live rates of each service and backend, the busiest first, until Ctrl-C.

    With -o json one list a line, for each interval.
    """
    looks = _looks(options.client, service, interval)
    try:
        if once:
            found = next(looks)
            render.print_json(found) if options.json else _print(found)
        elif options.json:
            for found in looks:
                print(json.dumps(found), flush=True)
        elif sys.stdout.isatty():
            _live(looks)
        else:
            for found in looks:
                _print(found)
                print(flush=True)
    except KeyboardInterrupt:
        return


def _looks(client: Client, service: str | None, interval_s: float) -> Iterator[list[Json]]:
    """Rates over one interval after the other."""
    before, _, _ = _read(client, service)
    while True:
        time.sleep(interval_s)
        after, services, backends = _read(client, service)
        yield rates(before, after, services, backends)
        before = after


def _read(client: Client, service: str | None) -> tuple[Reading, list[Json], list[Json]]:
    if service is None:
        services = client.get("services")["services"]
        backends = client.get("backends")["backends"]
    else:
        found = client.get("services", service)
        services, backends = [found], found["backends"]
    return reading(time.monotonic(), services, backends), services, backends


def rows(found: list[Json]) -> list[tuple[str, ...]]:
    """A row for each service, and below it one for each of its backends."""
    lines: list[tuple[str, ...]] = []
    for service in found:
        lines.append(
            (
                service["service"],
                "",
                "",
                _packets(service),
                _bits(service),
                render.number(service["slots_moving"]),
            )
        )
        for backend in service["backends"]:
            name, state = backend["backend"], backend["state"]
            lines.append(("", name, state, _packets(backend), _bits(backend), ""))
    return lines


def _packets(row: Json) -> str:
    return f"{row['packets_per_s']:,.0f}"


def _bits(row: Json) -> str:
    return render.size(row["bits_per_s"]).replace("B", "bit")


def _print(found: list[Json]) -> None:
    render.print_table(COLUMNS, rows(found), RIGHT)


def _live(looks: Iterator[list[Json]]) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with silent(), Live("waiting for the first interval", console=console, screen=True) as live:
        for found in looks:
            lines = rows(found)
            room = max(1, console.height - FRAME_LINES)
            shown = render.rich_table(COLUMNS, lines[:room], RIGHT)
            if len(lines) > room:
                shown.caption = f"{len(lines) - room} more rows; `shunt top SERVICE` shows one"
            live.update(shown, refresh=True)
