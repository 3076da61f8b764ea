# SPDX-License-Identifier: Apache-2.0
"""`shunt backend`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from shunt.cli import render
from shunt.cli.client import Client
from shunt.cli.options import Group, Options
from shunt.cli.render import number, percent, size
from shunt.lb.errors import ShuntError

Json = dict[str, Any]


@click.group(cls=Group)
def backend() -> None:
    """Backends: the servers behind a service."""


@backend.command("list")
@click.argument("service", required=False)
@click.pass_obj
def list_(options: Options, service: str | None) -> None:
    """The backends of a service, or of all."""
    found = options.client.get("backends", service=service)["backends"]
    if options.json:
        render.print_json(found)
    else:
        print_backends(found)


@backend.command()
@click.argument("where", metavar="[SERVICE] BACKEND", nargs=-1)
@click.pass_obj
def drain(options: Options, where: tuple[str, ...]) -> None:
    """Send a backend no new flows; those that it has go on.

    Without a service, in every service that has it. Kept across restarts of shuntd.
    """
    _change(options, where, lambda c, s, b: c.post("services", s, "backends", b, "drain"))


@backend.command()
@click.argument("where", metavar="[SERVICE] BACKEND", nargs=-1)
@click.pass_obj
def undrain(options: Options, where: tuple[str, ...]) -> None:
    """Send a backend new flows again."""
    _change(options, where, lambda c, s, b: c.post("services", s, "backends", b, "undrain"))


@backend.command(context_settings={"ignore_unknown_options": True})  # -1 is no option
@click.argument("service")
@click.argument("backend")
@click.argument("weight", type=int, required=False)
@click.option("--reset", is_flag=True, help="The weight of the configuration again.")
@click.pass_obj
def weight(options: Options, service: str, backend: str, weight: int | None, reset: bool) -> None:
    """Give a backend another weight, from now on.

    It holds until `--reset`, also across restarts of shuntd; the configuration is not changed.
    """
    if reset == (weight is not None):
        raise click.UsageError("Give a WEIGHT, or --reset.")
    if weight is not None and weight < 1:
        raise ShuntError(
            f"weight {weight} for backend {backend}",
            "a weight is from 1 to 65535",
            f"to send it no new flows: shunt backend drain {service} {backend}",
        )
    body = {"weight": 0 if reset else weight}
    row = options.client.put("services", service, "backends", backend, "weight", body=body)
    _print_changed(options, [row])


def _change(
    options: Options, where: Sequence[str], change: Callable[[Client, str, str], Json]
) -> None:
    """Change one backend, in one service or in all that have it."""
    if len(where) not in (1, 2):
        raise click.UsageError("Give a BACKEND, or a SERVICE and its BACKEND.")
    client, name = options.client, where[-1]
    services = [where[0]] if len(where) == 2 else _services_with(client, name)
    _print_changed(options, [change(client, service, name) for service in services])


def _services_with(client: Client, name: str) -> list[str]:
    rows = [r for r in client.get("backends")["backends"] if r["state"] != "removed"]
    services = [row["service"] for row in rows if name in (row["backend"], row["address"])]
    if not services:
        known = ", ".join(sorted({row["backend"] for row in rows})[:20]) or "none"
        raise ShuntError(
            f"no service has a backend {name}", f"there are: {known}", "see `shunt backend list`"
        )
    return list(dict.fromkeys(services))


def _print_changed(options: Options, rows: list[Json]) -> None:
    if options.json:
        render.print_json(rows)
        return
    for row in rows:
        print(
            f"{row['backend']} of service {row['service']}: {row['state']}, weight {row['weight']},"
            f" {percent(row['share'])} of the slots"
        )


def print_backends(backends: Sequence[Json], with_service: bool = True) -> None:
    """A row each."""
    columns = ["SERVICE", "BACKEND", "STATE", "WEIGHT", "SHARE", "PACKETS", "BYTES", "NEXT HOP"]
    ids = any(row["server_id"] for row in backends)
    columns[2:2] = ["SERVER ID"] if ids else []
    rows = [
        [
            row["service"],
            row["backend"],
            *([row["server_id"]] if ids else []),
            row["state"],
            _weight(row),
            percent(row["share"]),
            number(row["packets"]),
            size(row["bytes"]),
            _nexthop(row["nexthop"]),
            row["reason"],
        ]
        for row in backends
    ]
    columns.append("REASON")
    first = 0 if with_service else 1
    last = None if any(row["reason"] for row in backends) else -1
    render.print_table(
        columns[first:last],
        [row[first:last] for row in rows],
        right=("WEIGHT", "SHARE", "PACKETS", "BYTES"),
    )


def _weight(row: Json) -> str:
    """The weight in force; with the configured one, if that is another."""
    if row["configured_weight"] is None or row["weight"] == row["configured_weight"]:
        return str(row["weight"] or "")
    return f"{row['weight']} (configured {row['configured_weight']})"


def _nexthop(hop: Json | None) -> str:
    if hop is None:
        return ""
    via = f"via {hop['via']} " if hop["gateway"] else ""
    return f"{via}{hop['device']} {hop['mac'] or '(unresolved)'}"
