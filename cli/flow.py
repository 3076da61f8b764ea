# SPDX-License-Identifier: Apache-2.0
"""`shunt flow` and `shunt nat`."""

from __future__ import annotations

import sys
from typing import Any

import click

from shunt.cli import render
from shunt.cli.options import Group, Options
from shunt.cli.render import duration, endpoint, number

Json = dict[str, Any]
LIMIT_MAX = 100_000

limit_option = click.option(
    "--limit", type=click.IntRange(1, LIMIT_MAX), default=1000, show_default=True
)


@click.group(cls=Group)
def flow() -> None:
    """Flows that shuntd remembers: those of slots that are not settled."""


@flow.command("list")
@click.argument("service", required=False)
@limit_option
@click.pass_obj
def list_(options: Options, service: str | None, limit: int) -> None:
    """Remembered flows, of one service or of all, in no order."""
    found = options.client.get("flows", service=service, limit=limit)
    if options.json:
        render.print_json(found["flows"])
    else:
        columns = ("SERVICE", "PROTOCOL", "CLIENT", "VIP", "BACKEND", "STATE", "IDLE")
        rows = [
            (
                row["service"],
                row["protocol"],
                endpoint(row["client"], row["client_port"]),
                endpoint(row["vip"], row["vip_port"]),
                row["backend"],
                row["state"],
                duration(row["idle_s"]),
            )
            for row in found["flows"]
        ]
        render.print_table(columns, rows, right=("IDLE",))
    note_more(found, limit)


@flow.command()
@click.argument("service", required=False)
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def flush(options: Options, service: str | None, yes: bool) -> None:
    """Forget remembered flows, and translations, of one service or of all.

    Connections on slots that are not settled may move to another backend, and break; those that
    are translated break.
    """
    whose = f"service {service}" if service else "all services"
    confirm(f"Forget the flows of {whose}? Established connections may break.", yes)
    deleted = options.client.post("flows", "flush", body={"service": service})["deleted"]
    if options.json:
        render.print_json({"deleted": deleted})
    else:
        print(f"{number(deleted)} flows of {whose} forgotten")


@click.group(cls=Group)
def nat() -> None:
    """Translations: of modes nat and local, and of what is masqueraded."""


@nat.command("list")
@click.argument("service", required=False)
@limit_option
@click.option(
    "--top", type=click.IntRange(1, LIMIT_MAX), is_flag=False, flag_value=10, metavar="[N]",
    help="Instead: the N (10) destinations that ran out of ports, or come nearest to it.",
)  # fmt: skip
@click.pass_obj
def nat_list(options: Options, service: str | None, limit: int, top: int | None) -> None:
    """Translations, of one service or of all, in no order."""
    if top is not None:
        if service is not None:
            raise click.UsageError("--top is of the whole node: several services share a backend.")
        print_top(options, top)
        return
    found = options.client.get("nat", service=service, limit=limit)
    if options.json:
        render.print_json(found["flows"])
    else:
        columns = ("SERVICE", "PROTOCOL", "CLIENT", "VIP", "OWN", "BACKEND", "STATE", "IDLE")
        rows = [
            (
                row["service"],
                row["protocol"],
                endpoint(row["client"], row["client_port"]),
                endpoint(row["vip"], row["vip_port"]),
                endpoint(row["own"], row["own_port"]),
                row["backend"],
                row["state"],
                duration(row["idle_s"]),
            )
            for row in found["flows"]
        ]
        render.print_table(columns, rows, right=("IDLE",))
    note_more(found, limit)


def print_top(options: Options, limit: int) -> None:
    """Destinations, by ports refused and taken."""
    found = options.client.get("nat", "top", limit=limit)["destinations"]
    if options.json:
        render.print_json(found)
        return
    columns = ("BACKEND", "PROTOCOL", "OWN", "TAKEN", "PORTS", "SHARE", "REFUSED")
    rows = [
        (
            row["backend"],
            row["protocol"],
            row["own"],
            number(row["taken"]),
            number(row["ports"]),
            f"{row['share']:.1%}",
            number(row["refused"]),
        )
        for row in found
    ]
    render.print_table(columns, rows, right=columns[3:])


def note_more(found: Json, limit: int) -> None:
    """Say on standard error that a listing was cut."""
    if found["more"]:
        print(
            f"shunt: there are more than {number(limit)}; --limit takes up to {number(LIMIT_MAX)}",
            file=sys.stderr,
        )


def confirm(question: str, yes: bool) -> None:
    """Ask before what cannot be taken back; without a terminal there is nobody to ask."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError("There is no terminal to ask on: give --yes.")
    if not click.confirm(question):
        raise click.exceptions.Exit(1)
