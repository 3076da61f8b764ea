# SPDX-License-Identifier: Apache-2.0
"""`shunt service list --watch`."""

from __future__ import annotations

import json
from typing import Any, NoReturn

import click

from shunt.cli import render
from shunt.cli.client import Unreachable
from shunt.cli.options import Options


def follow(options: Options, since: int | None) -> NoReturn:
    """Print changes as they come. Raises: Unreachable when the daemon ends."""
    try:
        for change in options.client.stream("watch", since=since):
            if options.json:
                print(json.dumps(change), flush=True)
            elif said := line(change):
                print(said, flush=True)
    except KeyboardInterrupt:
        raise click.exceptions.Exit(0) from None
    raise Unreachable(
        "the stream has ended", "shuntd was stopped", "systemctl status shuntd says why"
    )


def line(change: dict[str, Any]) -> str:
    """A change in one line; nothing for what only programs need."""
    if change["type"] == "service":
        said = f"service {change['service']} {change['change']}"
        return f"{said}: {render.frontends(change)} {change['mode']}" if "vips" in change else said
    if change["type"] == "backend":
        said = f"backend {change['backend']} of service {change['service']} {change['change']}"
        state = f": {change['state']}, weight {change['weight']}" if "state" in change else ""
        return said + state
    return ""
