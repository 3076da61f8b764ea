# SPDX-License-Identifier: Apache-2.0
"""`shunt config`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from shunt.cli import render
from shunt.cli.options import Group, Options, config_options, kept_in, state_option
from shunt.cli.progress import progress
from shunt.cli.render import number


@click.group(cls=Group)
def config() -> None:
    """The configuration files."""


@config.command()
@config_options
@state_option
@click.pass_context
def check(ctx: click.Context, config: Path, services: Path, state: Path) -> None:
    """Check the files and list every error, with file and line. The daemon is not needed.

    Services of the API are looked at too, if their file can be read: those that would be set aside
    are told.
    """
    from shunt.agent.sources.file import ConfigErrors, FileSource

    options = ctx.ensure_object(Options)
    errors: list[dict[str, Any]] = []
    summary: dict[str, int] = {}
    try:
        kept = kept_in(state)
        with progress("reading the files"):
            # As for a daemon that has all of them in force: what no longer fits is an error.
            loaded = FileSource(config, services).merged(kept, kept.services)
    except ConfigErrors as e:
        errors = [
            {"file": x.file, "line": x.line, "what": x.what, "why": x.why, "fix": x.fix}
            for x in e.errors
        ]
        if not options.json:
            print("\n".join(str(x) for x in e.errors), file=sys.stderr)
            print(render.count(len(errors), "errors"), file=sys.stderr)
    else:
        found = loaded.configuration
        aside = [error for told in loaded.aside.values() for error in told]
        if aside and not options.json:
            print("\n".join(str(error) for error in aside), file=sys.stderr)
            count = render.count(len(loaded.aside), "services")
            print(f"{count} of the API set aside; the rest is not concerned", file=sys.stderr)
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
@click.option(
    "--services", is_flag=True, help="Of the files in services.d, instead of shunt.yaml's."
)
def schema(services: bool) -> None:
    """The JSON Schema of shunt.yaml, or of the files of services, for editors."""
    import msgspec

    from shunt.agent.sources.shape import ServicesFile, SettingsFile

    found = msgspec.json.schema(ServicesFile if services else SettingsFile)
    head = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "services.d/*.yaml of Shunt" if services else "shunt.yaml of Shunt",
    }
    render.print_json(head | found)


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
