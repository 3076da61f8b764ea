# SPDX-License-Identifier: Apache-2.0
"""`shunt completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from shunt.cli.options import Command, Options


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what completes `shunt` in a shell: source it from the shell's start file."""
    if ctx.ensure_object(Options).json:
        raise click.UsageError("what it prints is a script for a shell, and has no JSON")
    found = get_completion_class(shell)
    assert found is not None  # click has all three
    print(found(ctx.find_root().command, {}, "shunt", "_SHUNT_COMPLETE").source())
