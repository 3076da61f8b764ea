# SPDX-License-Identifier: Apache-2.0
"""`shunt bpf`: the maps as they are."""

from __future__ import annotations

import click

from shunt.cli import render
from shunt.cli.flow import limit_option, note_more
from shunt.cli.options import Group, Options
from shunt.cli.render import endpoint, number


@click.group(cls=Group)
def bpf() -> None:
    """The maps in the kernel as they are, with their ids and words."""


@bpf.group()
def lb() -> None:
    """Frontends, and the service ids that they lead to."""


@lb.command("list")
@click.argument("service", required=False)
@limit_option
@click.pass_obj
def lb_list(options: Options, service: str | None, limit: int) -> None:
    """Maps services and svc, of one service or of all, in the order in which they stand."""
    found = options.client.get("bpf", "lb", service=service, limit=limit)
    if options.json:
        render.print_json(found["frontends"])
    else:
        columns = ("FRONTEND", "SVC", "NAME", "MODE", "FIRST SLOT", "SLOTS", "IDLE NS")
        rows = [
            (
                row["frontend"],
                row["svc"],
                row["name"],
                row["mode"],
                row["first_slot"],
                number(1 << row["log2_slots"]),
                row["idle_ns"],
            )
            for row in found["frontends"]
        ]
        render.print_table(columns, rows, right=("SVC", "FIRST SLOT", "SLOTS", "IDLE NS"))
    note_more(found, limit)


@bpf.group()
def flow() -> None:
    """Lines of the table of remembered flows."""


@flow.command("list")
@click.argument("service", required=False)
@limit_option
@click.pass_obj
def flow_list(options: Options, service: str | None, limit: int) -> None:
    """Map flows, of one service or of all: each line that holds a flow."""
    found = options.client.get("bpf", "flows", service=service, limit=limit)
    if options.json:
        render.print_json(found["flows"])
    else:
        columns = (
            *("LINE", "SOURCE", "DESTINATION", "PROTOCOL", "SVC", "BACKEND ID", "STATE"),
            *("HASH", "WORD", "NEAR"),
        )
        rows = [
            (
                row["line"],
                endpoint(row["source"], row["source_port"]),
                endpoint(row["destination"], row["destination_port"]),
                row["protocol"],
                row["svc"],
                row["backend_id"],
                row["state"],
                row["hash"],
                row["word"],
                row["near"],
            )
            for row in found["flows"]
        ]
        render.print_table(columns, rows, right=("LINE", "SVC", "BACKEND ID"))
    note_more(found, limit)
