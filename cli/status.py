# SPDX-License-Identifier: Apache-2.0
"""`shunt status`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from shunt.cli import render
from shunt.cli.options import Command, Options
from shunt.cli.render import duration, number, percent

Json = dict[str, Any]
NEARLY_FULL = 0.8


@click.command(cls=Command)
@click.pass_context
def status(ctx: click.Context) -> None:
    """What the daemon does, and what is wrong.

    Exit code 1: the newest configuration is refused, an interface has lost the program, or all
    backends of a service are failing.
    """
    options = ctx.ensure_object(Options)
    shown = options.client.get("status")
    if options.json:
        render.print_json(shown)
    else:
        _show(shown)
    ctx.exit(1 if shown["problems"] else 0)


def _show(shown: Json) -> None:
    state = "in force" if shown["config_ok"] else "in force; a newer one is REFUSED"
    print(
        f"shuntd {shown['version']}, up {duration(shown['uptime_s'])};"
        f" configuration generation {shown['generation']} {state}\n"
    )
    render.print_pairs(_lines(shown))
    if shown["reasons"]:
        print()
        rows = [
            (render.label(name), number(count["packets"]), render.size(count["bytes"]))
            for name, count in shown["reasons"].items()
        ]
        render.print_table(("REASON", "PACKETS", "BYTES"), rows, right=("PACKETS", "BYTES"))
    if shown["events"]:
        print()
        times = [(render.label(name), number(n)) for name, n in shown["events"].items()]
        render.print_table(("EVENT", "TIMES"), times, right=("TIMES",))
    if shown["sockets"]["calls"]:
        print()
        calls = [(render.label(n), number(times)) for n, times in shown["sockets"]["calls"].items()]
        render.print_table(("SOCKETS", "CALLS"), calls, right=("CALLS",))
    if shown["sockets"]["streams"]["events"]:
        print()
        streams = [
            (render.label(n), number(times))
            for n, times in shown["sockets"]["streams"]["events"].items()
        ]
        render.print_table(("STREAMS", "TIMES"), streams, right=("TIMES",))
    _show_losses(shown["losses"])
    _show_problems(shown)


def _show_losses(losses: list[Json]) -> None:
    """What was sent, and did not leave."""
    if not losses:
        return
    print()
    rows = [
        (
            render.label(loss["reason"]),
            loss["interface"],
            loss["error"],
            number(loss["packets"]),
        )
        for loss in losses
    ]
    render.print_table(("LOST", "INTERFACE", "ERROR", "PACKETS"), rows, right=("PACKETS",))


def _lines(shown: Json) -> Iterator[tuple[str, str]]:
    for interface in shown["interfaces"]:
        yield f"interface {interface['name']}", _attached(interface)
    yield "sockets", _covered(shown["sockets"])
    for closed in _closed(shown["sockets"]["closing"]):
        yield "", closed
    for left_out in _not_covered(shown["sockets"]):
        yield "", left_out
    if (streams := shown["sockets"]["streams"])["attached"]:
        went = f"{number(streams['tcp'])} back on TCP" if streams["tcp"] else "none back on TCP"
        past = render.size(streams["bytes"])
        yield "streams", f"{number(streams['redirected'])} redirected, {went}; {past} past TCP"
    yield "services", number(shown["services"])
    yield "backends", ", ".join(f"{number(n)} {state}" for state, n in shown["backends"].items())
    slots = shown["slots"]
    moving = f"{number(slots['moving'])} moving ({percent(slots['moving_share'])})"
    used = f"{number(slots['used'])} of {number(slots['total'])} used"
    yield "slots", f"{used}; {moving}, {number(slots['lingering'])} lingering"
    flows, nat = shown["flows"], shown["nat"]
    remembered = f"{number(flows['remembered'])} of {number(flows['limit'])} remembered"
    clients = f", {number(flows['clients'])} clients" if flows["clients"] else ""
    yield "flows", f"{remembered}, {number(flows['exceptions'])} exceptions{clients}"
    yield "nat", f"{number(nat['pairs'])} of {number(nat['limit'])} translations"
    if nat["ports_busiest"] and nat["ports_busiest"] > NEARLY_FULL * nat["ports"]:
        share = percent(nat["ports_busiest"] / nat["ports"])
        yield (
            "",
            f"{share} of nat's ports are taken towards one destination: `shunt nat list --top`",
        )
    scan, apply = shown["scan"], shown["apply"]
    yield "last scan", "none yet" if scan["ago_s"] is None else f"{duration(scan['ago_s'])} ago"
    yield "last apply", f"{apply['took_ms']} ms; {number(apply['writes'])} writes since the start"
    checks = shown["checks"]
    made = f"{number(checks['made'])} made, {number(checks['failed'])} failed"
    yield "checks", f"{made}, {checks['late_ms_mean']} ms late in the mean"
    if checks["troubles"]:
        troubles = ", ".join(f"{name} {n} times" for name, n in checks["troubles"].items())
        yield "", f"checks that this host could not make: {troubles}"
    full = [
        f"{name} {percent(fill['used'] / fill['limit'])}"
        for name, fill in shown["maps"].items()
        if fill["used"] > NEARLY_FULL * fill["limit"]
    ]
    if full:
        yield "nearly full", ", ".join(full)


def _attached(interface: Json) -> str:
    if not interface["ifindex"]:
        return "there is no such interface"
    translating = "" if interface["tc"] == "none" else f", TC by {interface['tc']}"
    if interface["xdp"] == "off":
        return f"no XDP{translating}"
    if not interface["attached"]:
        return "the program is NOT ATTACHED"
    return f"{interface['mode']}, program {interface['program_id']}{translating}"


def _covered(sockets: Json) -> str:
    if sockets["scope"] == "off":
        return "off"
    if not sockets["attached"]:
        return "the programs are NOT ATTACHED"
    whose = {"host": "of this network namespace", "all": "of all network namespaces"}
    part = "" if sockets["whole"] else " (a container's part of the hierarchy)"
    return f"{whose[sockets['scope']]}, {sockets['cgroup']}{part}"


def _not_covered(sockets: Json) -> Iterator[str]:
    if sockets["scope"] == "off" or not sockets["attached"]:
        return
    groups = [
        each["cgroup"] + ("" if each["there"] else " (not there)")
        for each in sockets["excluded_cgroups"]
    ]
    if groups:
        yield f"not those of {', '.join(groups)}"
    if sockets["excluded_services"]:
        yield f"not to {', '.join(sockets['excluded_services'])}"
    if sockets["node_ports"] == "share":
        yield "node ports may be bound by others"


def _closed(closing: Json) -> Iterator[str]:
    counts = [f"{number(closing[p])} {p.upper()}" for p in ("udp", "tcp") if closing[p]]
    left = f"; {number(closing['left'])} cannot be closed" if closing["left"] else ""
    if counts or left:
        yield f"closed after backends went: {', '.join(counts) or 0}{left}"
    if closing["barred"]:
        yield "NOT CLOSED in every network namespace after backends went: see below"


def _show_problems(shown: Json) -> None:
    lines = [f"problem: {problem}" for problem in shown["problems"]]
    aside = [error for found in shown["set_aside"] for error in found["errors"]]
    barred = filter(None, [shown["sockets"]["closing"]["barred"]])
    for error in [*shown["errors"], *aside, *shown["nexthop_problems"], *barred]:
        lines.append(error["what"])
        lines += [f"  {part}: {error[part]}" for part in ("why", "fix") if error[part]]
    if lines:
        print("\n" + "\n".join(lines))
