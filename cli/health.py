# SPDX-License-Identifier: Apache-2.0
"""`shunt health`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click

from shunt.cli import render
from shunt.cli.options import Group, Options
from shunt.cli.render import duration, percent

Json = dict[str, Any]


@click.group(cls=Group)
def health() -> None:
    """What the health checks find."""


@health.command("list")
@click.argument("service", required=False)
@click.pass_obj
def list_(options: Options, service: str | None) -> None:
    """The checked backends of a service, or of all."""
    found = options.client.get("health", service=service)
    if options.json:
        render.print_json(found)
        return
    now = datetime.now(UTC)
    columns = ("SERVICE", "BACKEND", "TYPE", "STATE", "SINCE", "LAST", "LATENCY", "REASON")
    rows = [
        (
            row["service"],
            row["backend"],
            row["type"],
            _state(row),
            duration(max(0.0, (now - datetime.fromisoformat(row["since"])).total_seconds())),
            {None: "", True: "ok", False: "failed"}[row["last_ok"]],
            "" if row["latency_ms"] is None else f"{row['latency_ms']:.1f} ms",
            row["reason"],
        )
        for row in found["health"]
    ]
    render.print_table(columns, rows, right=("SINCE", "LATENCY"))
    for panic in found["panic"]:
        print(
            f"\nservice {panic['service']} panics: {panic['up']} of {panic['backends']} backends"
            " are up; all are treated as up"
        )


def _state(row: Json) -> str:
    if row["weight_share"] < 1:
        return f"{row['state']}, {percent(row['weight_share'])} of its weight"
    return f"{row['state']}, removed" if row["removed"] else str(row["state"])
