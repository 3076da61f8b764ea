# SPDX-License-Identifier: Apache-2.0
"""`shunt doctor`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from ipaddress import ip_address
from typing import TYPE_CHECKING

import click

from shunt.cli import render
from shunt.cli.client import Client, Unreachable
from shunt.cli.options import Command, Options, Places, asked_places, kept_in
from shunt.cli.progress import progress
from shunt.lb.errors import ShuntError

if TYPE_CHECKING:
    from shunt.agent.doctor import Finding


@click.command(cls=Command)
@asked_places
@click.option("--backend", is_flag=True, help="Judge this host as a backend.")
@click.option("--vip", "vips", multiple=True, metavar="ADDR", help="With --backend: its VIPs.")
@click.option(
    "--mode",
    type=click.Choice(["dsr-ipip", "dsr-l2", "dsr-geneve", "nat"]),
    default="dsr-ipip",
    show_default=True,
    help="With --backend: the service's mode.",
)
@click.option("--iface", metavar="DEV", help="With --backend: look at this device alone.")
@click.pass_context
def doctor(
    ctx: click.Context,
    places: Places,
    backend: bool,
    vips: Sequence[str],
    mode: str,
    iface: str | None,
) -> None:
    """What is right, doubtful or wrong about this host; each fix is a command.

    Looks and changes nothing; the daemon is not needed, and asked if it is there. Exit code 1:
    something is wrong.
    """
    if not backend and (vips or iface):
        raise click.UsageError("--vip and --iface go with --backend.")
    if backend and not vips:
        raise click.UsageError("--backend wants the VIPs: --vip ADDR, as often as needed.")
    from shunt.agent.doctor import Level, worst

    try:
        with progress("looking at this host"):
            findings = (
                _backend(vips, mode, iface)
                if backend
                else balancer_findings(ctx.ensure_object(Options).client, places)
            )
    except OSError as e:
        raise ShuntError(
            "this host cannot be looked at", e.strerror or str(e), "run it as root (sudo)"
        ) from e
    if ctx.ensure_object(Options).json:
        render.print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        _show(findings)
    ctx.exit(1 if worst(findings) is Level.ERROR else 0)


def balancer_findings(client: Client, places: Places) -> list[Finding]:
    """A node; also one whose files are wrong is looked at as far as it goes."""
    from shunt.agent.doctor import Finding, Level, check_balancer
    from shunt.agent.doctor_daemon import check_closing, check_resolution
    from shunt.agent.doctor_speed import check_speed, gather_speed
    from shunt.agent.doctor_trunk import check_trunks
    from shunt.agent.facts import gather_balancer
    from shunt.agent.sources.file import ConfigErrors, load
    from shunt.lb.model import Configuration, Settings

    wrong: list[Finding] = []
    try:
        told = client.get("status")
    except Unreachable:
        told = None
    config, services, state = places.found(told)
    try:
        configuration = load(config, services, kept_in(state))
    except ConfigErrors as e:
        wrong = [
            Finding(Level.ERROR, "configuration", f"{x.place}: {x.what}", x.why, x.fix)
            for x in e.errors
        ]
        configuration = Configuration(Settings(interfaces=()))
    facts = gather_balancer(configuration)
    speed = check_speed(gather_speed(facts.devices), facts, configuration)
    return [
        *check_balancer(facts, configuration),
        *check_trunks(facts, configuration),
        *((*check_resolution(told), *check_closing(told)) if told else ()),
        *speed,
        *wrong,
    ]


def _backend(vips: Sequence[str], mode: str, iface: str | None) -> list[Finding]:
    from shunt.agent.doctor_backend import check_backend
    from shunt.agent.facts import gather_backend
    from shunt.lb.model import Mode

    addresses = []
    for vip in vips:
        try:
            addresses.append(ip_address(vip))
        except ValueError as e:
            raise click.BadParameter(f"{vip} is not an address.", param_hint="--vip") from e
    facts = gather_backend()
    if iface is not None:
        if iface not in facts.devices:
            known = ", ".join(sorted(facts.devices)) or "none"
            raise ShuntError(
                f"{iface} is no Ethernet device of this host that is up and has an address",
                f"there are: {known}",
                "give one of them with --iface, or leave it away",
            )
        facts = dataclasses.replace(facts, devices={iface: facts.devices[iface]})
    return check_backend(facts, addresses, Mode(mode))


def _show(findings: Sequence[Finding]) -> None:
    width = max((len(finding.check) for finding in findings), default=0)
    for finding in findings:
        level = click.style(
            f"{finding.level.value:<5}",
            fg={"ok": "green", "warn": "yellow", "error": "red"}[finding.level.value],
        )
        click.echo(f"{level}  {finding.check.ljust(width)}  {finding.what}")
        if finding.level.value != "ok":
            for part in ("why", "fix"):
                if text := getattr(finding, part):
                    click.echo(f"{'':<5}  {'':<{width}}    {part}: {text}")
