# SPDX-License-Identifier: Apache-2.0
"""`shunt hook`: a user's own program before or after balancing. The daemon is not needed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shunt.cli import render
from shunt.cli.host import as_root
from shunt.cli.options import Group, Options, bpffs_option
from shunt.cli.progress import progress
from shunt.cli.render import number

if TYPE_CHECKING:
    from shunt.xdp.hooks import Hook

POSITIONS = ("pre-lb", "post-lb")


@click.group(cls=Group)
def hook() -> None:
    """Your own programs in the packets' way: each may pass, drop or mark."""


@hook.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--at",
    "position",
    type=click.Choice(POSITIONS),
    required=True,
    help="Before balancing, or after it.",
)
@click.option("--name", help="What to call it.  [default: FILE's name, up to its first dot]")
@bpffs_option
@click.pass_obj
def load(options: Options, file: Path, position: str, name: str | None, bpffs: Path) -> None:
    """Load FILE.c (compiled by bcc) or FILE.o and put it in force at once.

    It stays when shuntd restarts and when programs are swapped, until it is unloaded.
    """
    from shunt.xdp import hooks
    from shunt.xdp.hook_source import Position

    chosen = name or file.name.partition(".")[0].lower()
    doing = "compiling and loading" if file.suffix == ".c" else "loading"
    with as_root("hook loads a program"), progress(f"{doing} {file.name}"):
        found = hooks.load(file, Position(position), chosen, bpffs)
    if options.json:
        render.print_json(_json(found))
    else:
        print(f"{found.name}: at {found.position}, program {found.program_id}")


@hook.command("list")
@bpffs_option
@click.pass_obj
def list_(options: Options, bpffs: Path) -> None:
    """Which hooks are loaded, and what they have answered."""
    from shunt.xdp import hooks

    with as_root("hook looks at programs"):
        found = hooks.listing(bpffs)
    if options.json:
        render.print_json([_json(each) for each in found])
        return
    rows = [
        (h.name, h.position, h.program_id, number(h.passed), number(h.dropped),
         number(sum(h.marked.values())), number(h.invalid))
        for h in found
    ]  # fmt: skip
    columns = ("NAME", "AT", "PROGRAM", "PASSED", "DROPPED", "MARKED", "INVALID")
    render.print_table(columns, rows, right=columns[2:])


@hook.command()
@click.argument("name")
@click.option("--map", "map_name", metavar="MAP", help="Print what is in one of its maps.")
@bpffs_option
@click.pass_obj
def show(options: Options, name: str, map_name: str | None, bpffs: Path) -> None:
    """One hook: its counters and its maps, or what is in one of them."""
    from shunt.xdp import hooks

    with as_root("hook reads maps"):
        found = hooks.find(name, bpffs)
        if map_name is None:
            _show(options, found, bpffs)
        else:
            _show_map(options, found, map_name, bpffs)


@hook.command()
@click.argument("name")
@bpffs_option
@click.pass_obj
def unload(options: Options, name: str, bpffs: Path) -> None:
    """Take a hook out again. What is in its maps is lost."""
    from shunt.xdp import hooks

    with as_root("hook removes a program"):
        hooks.unload(name, bpffs)
    if options.json:
        render.print_json({"unloaded": name})
    else:
        print(f"{name}: unloaded")


def _json(found: Hook) -> dict[str, object]:
    return dataclasses.asdict(found)


def _show(options: Options, found: Hook, bpffs: Path) -> None:
    from shunt.kern.raw_map import TYPE_NAMES
    from shunt.xdp import hooks

    if options.json:
        render.print_json(_json(found))
        return
    print(f"{found.name}: at {found.position}, program {found.program_id}")
    print(f"passed {number(found.passed)}, dropped {number(found.dropped)}", end="")
    print(f", no answer of the three {number(found.invalid)}" if found.invalid else "")
    for mark, packets in found.marked.items():
        print(f"marked {mark}: {number(packets)}")
    rows = []
    for name in found.maps:
        with hooks.open_map(found, name, bpffs) as one:
            kind = TYPE_NAMES.get(one.type, str(one.type))
            rows.append((name, kind, one.key_size, one.value_size, number(one.entries)))
    if rows:
        columns = ("MAP", "TYPE", "KEY_BYTES", "VALUE_BYTES", "ENTRIES")
        render.print_table(columns, rows, right=columns[2:])


def _show_map(options: Options, found: Hook, name: str, bpffs: Path) -> None:
    from shunt.kern.raw_map import plain
    from shunt.xdp import hooks

    with hooks.open_map(found, name, bpffs) as one:
        key_type, value_type = one.layouts()
        pairs = [
            (plain(key, key_type), [plain(value, value_type) for value in values])
            for key, values in one.items()
        ]
    if options.json:
        render.print_json([{"key": k, "value": v if one.copies > 1 else v[0]} for k, v in pairs])
        return
    for key, values in pairs:
        print(f"{_text(key)}  {', '.join(map(_text, values))}")


def _text(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}={_text(part)}" for name, part in value.items())
    return str(value)
