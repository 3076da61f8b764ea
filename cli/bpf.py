# SPDX-License-Identifier: Apache-2.0
"""`shunt bpf`: the maps as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

import click

from shunt.cli import render
from shunt.cli.flow import limit_option, note_more
from shunt.cli.options import Group, Options
from shunt.cli.render import endpoint, number

Json = dict[str, Any]


@click.group(cls=Group)
def bpf() -> None:
    """The maps in the kernel as they are, with their ids and words."""


def _rows(
    options: Options,
    what: tuple[str, str],
    query: tuple[str | None, int],
    columns: Mapping[str, Callable[[Json], object]],
    right: Sequence[str],
) -> None:
    """What the API has at bpf/WHAT under that key, with a column for each function of a row."""
    path, key = what
    service, limit = query
    found = options.client.get("bpf", path, service=service, limit=limit)
    if options.json:
        render.print_json(found[key])
    else:
        rows = [tuple(cell(row) for cell in columns.values()) for row in found[key]]
        render.print_table(tuple(columns), rows, right=right)
    note_more(found, limit)


@bpf.group()
def lb() -> None:
    """Frontends, and the service ids that they lead to."""


@lb.command("list")
@click.argument("service", required=False)
@limit_option
@click.pass_obj
def lb_list(options: Options, service: str | None, limit: int) -> None:
    """Maps services and svc, of one service or of all, in the order in which they stand."""
    columns: dict[str, Callable[[Json], object]] = {
        "FRONTEND": itemgetter("frontend"),
        "SVC": itemgetter("svc"),
        "NAME": itemgetter("name"),
        "MODE": itemgetter("mode"),
        "FIRST SLOT": itemgetter("first_slot"),
        "SLOTS": lambda row: number(1 << row["log2_slots"]),
        "IDLE NS": itemgetter("idle_ns"),
    }
    right = ("SVC", "FIRST SLOT", "SLOTS", "IDLE NS")
    _rows(options, ("lb", "frontends"), (service, limit), columns, right)


@bpf.group()
def flow() -> None:
    """Lines of the table of remembered flows."""


@flow.command("list")
@click.argument("service", required=False)
@limit_option
@click.pass_obj
def flow_list(options: Options, service: str | None, limit: int) -> None:
    """Map flows, of one service or of all: each line that holds a flow."""
    columns: dict[str, Callable[[Json], object]] = {
        "LINE": itemgetter("line"),
        "SOURCE": lambda row: endpoint(row["source"], row["source_port"]),
        "DESTINATION": lambda row: endpoint(row["destination"], row["destination_port"]),
        "PROTOCOL": itemgetter("protocol"),
        "SVC": itemgetter("svc"),
        "BACKEND ID": itemgetter("backend_id"),
        "STATE": itemgetter("state"),
        "HASH": itemgetter("hash"),
        "WORD": itemgetter("word"),
        "NEAR": itemgetter("near"),
    }
    _rows(options, ("flows", "flows"), (service, limit), columns, ("LINE", "SVC", "BACKEND ID"))
