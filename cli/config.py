# SPDX-License-Identifier: Apache-2.0
"""`shunt config`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from shunt.cli import render
from shunt.cli.options import Group, Options, config_options
from shunt.cli.progress import progress
from shunt.cli.render import number


@click.group(cls=Group)
def config() -> None:
    """The configuration files."""


@config.command()
@config_options
@click.pass_context
def check(ctx: click.Context, config: Path, services: Path) -> None:
    """Check the files and list every error, with file and line. The daemon is not needed."""
    from shunt.agent.sources.file import ConfigErrors, load

    options = ctx.ensure_object(Options)
    errors: list[dict[str, Any]] = []
    summary: dict[str, int] = {}
    try:
        with progress("reading the files"):
            found = load(config, services)
    except ConfigErrors as e:
        errors = [
            {"file": x.file, "line": x.line, "what": x.what, "why": x.why, "fix": x.fix}
            for x in e.errors
        ]
        if not options.json:
            print("\n".join(str(x) for x in e.errors), file=sys.stderr)
            print(render.count(len(errors), "errors"), file=sys.stderr)
    else:
        summary = {
            "services": len(found.services),
            "frontends": sum(1 for s in found.services for _ in s.frontends()),
            "backends": sum(len(s.backends) for s in found.services),
            "slots": sum(s.region_slots() * len(s.protocols()) for s in found.services),
        }
        if not options.json:
            words = ", ".join(render.count(n, noun) for noun, n in summary.items())
            print(f"ok: {words} of {number(found.settings.limits.slots)}")
    if options.json:
        render.print_json({"ok": not errors, "errors": errors, **summary})
    ctx.exit(1 if errors else 0)


@config.command()
@click.pass_obj
def reload(options: Options) -> None:
    """Have shuntd read its files now, and say if it refuses them.

    It also does so by itself when they change.
    """
    answer = options.client.post("reload")
    if options.json:
        render.print_json(answer)
    else:
        print(f"in force: generation {answer['generation']}")
