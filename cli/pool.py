# SPDX-License-Identifier: Apache-2.0
"""`shunt pool`."""

from __future__ import annotations

import click

from shunt.cli import render
from shunt.cli.options import Group, Options


@click.group(cls=Group)
def pool() -> None:
    """VIP pools: addresses that services ask for."""


@pool.command("list")
@click.pass_obj
def list_(options: Options) -> None:
    """Every pool, and which service has which of its addresses."""
    pools = options.client.get("pools")["pools"]
    if options.json:
        render.print_json(pools)
        return
    rows = [
        (
            found["name"],
            ",".join(found["networks"]),
            f"{len(found['given'])}/{found['size']}",
            ",".join(f"{given['service']}={given['vip']}" for given in found["given"]),
        )
        for found in pools
    ]
    render.print_table(("POOL", "NETWORKS", "GIVEN", "SERVICES"), rows, right=("GIVEN",))
