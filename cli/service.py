# SPDX-License-Identifier: Apache-2.0
"""`shunt service`."""

from __future__ import annotations

from typing import Any

import click

from shunt.cli import render
from shunt.cli.backend import print_backends
from shunt.cli.options import Group, Options
from shunt.cli.render import number, size
from shunt.cli.service_edit import add, remove
from shunt.cli.service_watch import follow

Json = dict[str, Any]


@click.group(cls=Group)
def service() -> None:
    """Services: what clients address."""


@service.command("list")
@click.option("--watch", is_flag=True, help="How they are, and what changes, until Ctrl-C.")
@click.option("--since", type=click.IntRange(0), help="With --watch: after that revision alone.")
@click.pass_obj
def list_(options: Options, watch: bool, since: int | None) -> None:
    """Every service."""
    if since is not None and not watch:
        raise click.UsageError("--since goes with --watch.")
    if watch:
        follow(options, since)
    services = options.client.get("services")["services"]
    if options.json:
        render.print_json(services)
        return
    columns = ("NAME", "VIPS", "PORTS", "MODE", "UP", "MOVING", "PACKETS", "BYTES")
    rows = [
        (
            found["name"],
            ",".join(found["vips"]),
            ",".join(found["ports"]),
            found["mode"],
            _up(found),
            _moving(found),
            number(found["packets"]),
            size(found["bytes"]),
        )
        for found in services
    ]
    render.print_table(columns, rows, right=("UP", "MOVING", "PACKETS", "BYTES"))


@service.command()
@click.argument("name")
@click.pass_obj
def show(options: Options, name: str) -> None:
    """One service and its backends."""
    found = options.client.get("services", name)
    if options.json:
        render.print_json(found)
        return
    slots = found["slots"]
    check = found["health"]
    render.print_pairs(
        [
            ("service", found["name"]),
            ("origin", found["origin"]),
            ("vips", ", ".join(found["vips"])),
            *([("of this host", ", ".join(found["node"]))] if found["node"] else ()),
            ("ports", ", ".join(found["ports"])),
            ("mode", found["mode"]),
            (
                "slots",
                f"{number(slots['total'])}: "
                + ", ".join(f"{number(slots[s])} {s}" for s in ("settled", "moving", "lingering")),
            ),
            ("traffic", f"{number(found['packets'])} packets, {size(found['bytes'])}"),
            ("idle", ", ".join(f"{p} {s:g} s" for p, s in found["idle_s"].items())),
            ("health", _check(check) if check else "not checked"),
            *([("quic", _quic(found["quic"]))] if found["quic"] else []),
            *([("sockets", "see the VIP itself")] if not found["sockets"] else []),
            *([("streams", "pass TCP by on this node")] if found["redirect"] else []),
        ]
    )
    print()
    print_backends(found["backends"], with_service=False)


service.add_command(add)
service.add_command(remove)


def _quic(quic: Json) -> str:
    return (
        f"by connection id, configuration {quic['config_id']}:"
        f" server id {quic['server_id_length']} octets, nonce {quic['nonce_length']}"
    )


def _check(check: Json) -> str:
    port = f" to port {check['port']}" if check["port"] else ""
    return (
        f"{check['type']}{port} every {check['interval_s']:g} s, at most {check['timeout_s']:g} s;"
        f" up after {check['rise']}, failing after {check['fall']}"
    )


def _up(found: Json) -> str:
    states = found["backend_states"]
    return f"{states['up']}/{sum(states.values()) - states['removed']}"


def _moving(found: Json) -> str:
    slots = found["slots"]
    return render.percent(slots["moving"] / slots["total"] if slots["total"] else 0)
