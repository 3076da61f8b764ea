# SPDX-License-Identifier: Apache-2.0
"""`shunt maglev`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from shunt.cli import render
from shunt.cli.options import Group, Options
from shunt.cli.render import count, number, percent

Json = dict[str, Any]


@click.group(cls=Group)
def maglev() -> None:
    """The tables that say which backend a flow goes to."""


@maglev.command()
@click.argument("service")
@click.pass_obj
def show(options: Options, service: str) -> None:
    """How a service's slots are spread over its backends."""
    found = options.client.get("services", service, "maglev")
    if options.json:
        render.print_json(found)
        return
    for n, table in enumerate(found["tables"]):
        if n:
            print()
        states = ", ".join(f"{number(k)} {state}" for state, k in table["states"].items())
        print(
            f"{service}/{table['protocol']}: {count(table['slots'], 'slots')} from"
            f" {number(table['first_slot'])}: {states}"
        )
        print(
            f"balance: at most {percent(table['most_above'])} above,"
            f" {percent(table['most_below'])} below what the weights are worth"
        )
        rows = [
            (
                row["backend"],
                row["state"],
                row["weight"] or "",
                number(row["slots"]),
                percent(row["share"]),
                f"{row['due']:,.1f}",
            )
            for row in table["backends"]
        ]
        columns = ("BACKEND", "STATE", "WEIGHT", "SLOTS", "SHARE", "WORTH")
        render.print_table(columns, rows, right=columns[2:])


@maglev.command()
@click.argument("service")
@click.option("--add", multiple=True, metavar="BACKEND[=WEIGHT]", help="Add a backend.")
@click.option("--remove", multiple=True, metavar="BACKEND", help="Take a backend out.")
@click.option("--drain", multiple=True, metavar="BACKEND", help="Drain a backend.")
@click.option("--undrain", multiple=True, metavar="BACKEND", help="Undrain a backend.")
@click.option("--weight", multiple=True, metavar="BACKEND=WEIGHT", help="Give another weight.")
@click.pass_obj
def simulate(
    options: Options,
    service: str,
    add: Sequence[str],
    remove: Sequence[str],
    drain: Sequence[str],
    undrain: Sequence[str],
    weight: Sequence[str],
) -> None:
    """What would move if a service's backends changed. Changes nothing.

    Each option may be given as often as needed. Backends that are added count as up.
    """
    body = {
        "add": dict(_weighted("--add", text, default=1) for text in add),
        "remove": list(remove),
        "drain": list(drain),
        "undrain": list(undrain),
        "weights": dict(_weighted("--weight", text) for text in weight),
    }
    if not any(body.values()):
        raise click.UsageError("Say what would change: --add, --remove, --drain, --weight ...")
    found = options.client.post("services", service, "maglev", "simulate", body=body)
    if options.json:
        render.print_json(found)
        return
    for n, table in enumerate(found["tables"]):
        if n:
            print()
        _show(service, table)


def _show(service: str, table: Json) -> None:
    size = count(table["slots_before"], "slots")
    if table["slots_after"] != table["slots_before"]:
        size += f", {number(table['slots_after'])} afterwards"
    least = f"at least {percent(table['least_share'])} with any table"
    print(
        f"{service}/{table['protocol']} ({size}): {count(table['moved'], 'slots')} of"
        f" {number(table['slots'])} would move, {percent(table['moved_share'])}; {least}"
    )
    rows = [
        (
            row["backend"],
            number(row["before"]),
            number(row["after"]),
            f"+{number(row['gained'])}",
            f"-{number(row['lost'])}",
            percent(row["after"] / table["slots"]),
        )
        for row in table["backends"]
    ]
    columns = ("BACKEND", "NOW", "THEN", "GAINS", "LOSES", "SHARE")
    render.print_table(columns, rows, right=columns[1:])


def _weighted(option: str, text: str, default: int | None = None) -> tuple[str, int]:
    name, equals, digits = text.partition("=")
    if not equals and default is not None:
        return name, default
    if not name or not digits.isascii() or not digits.isdigit():
        raise click.BadParameter(f"{text} is not BACKEND=WEIGHT.", param_hint=option)
    return name, int(digits)
