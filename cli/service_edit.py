# SPDX-License-Identifier: Apache-2.0
"""`shunt service add` and `shunt service remove`: services that no file has."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

from shunt.cli import render
from shunt.cli.client import Refused
from shunt.cli.options import Command, Options
from shunt.lb.errors import ShuntError

Json = dict[str, Any]
REQUEST = "request"  # what shuntd's errors call the text that was sent


@click.command(cls=Command)
@click.argument("what", metavar="NAME|FILE|-")
@click.option(
    "--vip", "vips", multiple=True, metavar="ADDRESS|pool/NAME|node/NETWORK", help="One or more."
)
@click.option("--port", "ports", multiple=True, metavar="PORT[/udp|/sctp]", help="One or more.")
@click.option("--backend", "backends", multiple=True, metavar="ADDRESS[:PORT]")
@click.option("--mode", type=click.Choice(["dsr-ipip", "dsr-l2", "dsr-geneve", "nat", "local"]))
@click.option("--health", type=click.Choice(["none", "tcp"]))
@click.option("--replace", is_flag=True, help="Also if the API has one of this name.")
@click.pass_obj
def add(
    options: Options,
    what: str,
    vips: Sequence[str],
    ports: Sequence[str],
    backends: Sequence[str],
    mode: str | None,
    health: str | None,
    replace: bool,
) -> None:
    """Add a service: by its name and options, or from a file as in services.d (- is stdin).

    shuntd keeps it, also across restarts. A service of that name in a file counts more.
    """
    given = [*vips, *ports, *backends, mode, health]
    if vips and ports:
        body = _body(what, vips, ports, backends, mode, health)
        name, shown = what, _put(options, what, body, replace, REQUEST)
    elif any(given):
        raise click.UsageError("Give --vip and --port; or a FILE, and none of these options.")
    else:
        text = _text(what)
        name = _name(text, what)
        shown = _put(options, name, text, replace, what)
    if options.json:
        render.print_json(shown)
    else:
        print(f"service {name}: {render.frontends(shown)}, {len(shown['backends'])} backends")


def _body(
    name: str,
    vips: Sequence[str],
    ports: Sequence[str],
    backends: Sequence[str],
    mode: str | None,
    health: str | None,
) -> Json:
    numbers = [int(port) if port.isascii() and port.isdecimal() else port for port in ports]
    body: Json = {"name": name, "vip": list(vips), "ports": numbers, "backends": list(backends)}
    return body | {k: v for k, v in (("mode", mode), ("health", health)) if v is not None}


def _text(file: str) -> str:
    try:
        if file == "-":
            return sys.stdin.read()
        with open(file, encoding="utf-8-sig") as stream:  # noqa: PTH123  a word, perhaps no path
            return stream.read()
    except FileNotFoundError as e:
        raise ShuntError(
            f"there is no file {file}",
            "without --vip and --port, what to add is read from a file",
            f"name the file; or: shunt service add {file} --vip ADDRESS --port PORT",
        ) from e
    except (OSError, UnicodeDecodeError) as e:
        why = getattr(e, "strerror", None) or str(e)
        raise ShuntError(f"{file} cannot be read", why, "give a file in YAML or JSON") from e


def _name(text: str, file: str) -> str:
    """The service's name, as it stands in its file."""
    from yaml.nodes import MappingNode, ScalarNode, SequenceNode

    from shunt.agent.sources.document import compose
    from shunt.agent.sources.problems import Problems

    problems = Problems()
    document = compose(file, text, problems)
    problems.raise_any()
    root = document.root if document is not None else None
    if isinstance(root, SequenceNode):
        raise ShuntError(
            f"{file} is a list of services",
            "each is added by itself, so that each is in force or refused as a whole",
            "give them in files of their own, without the dash",
        )
    for key, value in root.value if isinstance(root, MappingNode) else ():
        if key.value == "name" and isinstance(value, ScalarNode) and value.value:
            return str(value.value)
    raise ShuntError(
        f"{file} has no service with a name",
        "a service is a mapping with name, vip and ports",
        "see docs/configuration.md, or: shunt service add NAME --vip ADDRESS --port PORT",
    )


def _put(options: Options, name: str, body: Json | str, replace: bool, file: str) -> Any:
    headers = {} if replace else {"If-None-Match": "*"}
    try:
        return options.client.put("services", name, body=body, headers=headers)
    except Refused as e:
        for error in e.errors:
            if error["what"].startswith(REQUEST) and file != REQUEST:
                error["what"] = file + error["what"].removeprefix(REQUEST)
        raise


@click.command(cls=Command)
@click.argument("name")
@click.pass_obj
def remove(options: Options, name: str) -> None:
    """Remove a service that `service add` added. Its TCP connections end with it."""
    answer = options.client.delete("services", name)
    if options.json:
        render.print_json(answer)
    else:
        print(f"service {name} is removed; generation {answer['generation']}")
