# SPDX-License-Identifier: Apache-2.0
"""`shunt program`."""

from __future__ import annotations

import click

from shunt.cli import render
from shunt.cli.options import Group, Options


@click.group(cls=Group)
def program() -> None:
    """The program in the kernel."""


@program.command()
@click.pass_obj
def swap(options: Options) -> None:
    """Load the program anew from its file and put it in the old one's place.

    No packet is lost, and the maps stay. For after an upgrade of the package.
    """
    interfaces = options.client.post("programs", "swap")["interfaces"]
    if options.json:
        render.print_json(interfaces)
        return
    for interface in interfaces:
        print(f"{interface['name']}: program {interface['program_id']}, {interface['mode']}")
