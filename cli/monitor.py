# SPDX-License-Identifier: Apache-2.0
"""`shunt monitor`."""

from __future__ import annotations

import json
import sys
from datetime import datetime
from typing import Any

import click

from shunt.cli.client import Unreachable
from shunt.cli.options import Command, Options
from shunt.cli.render import endpoint, label


@click.command(cls=Command)
@click.option(
    "--type", "kind", type=click.Choice(["drop", "nat"]), default="drop", show_default=True
)
@click.option("--service", help="Of this service alone.")
@click.option("--backend", help="Of this backend alone, as `shunt backend list` names it.")
@click.option("--from", "network", metavar="NETWORK", help="Of clients in this network alone.")
@click.option("--reason", help="Dropped for this reason alone: drop-no-backend, ...")
@click.option("--count", type=click.IntRange(1), help="End after so many.")
@click.pass_obj
def monitor(options: Options, /, kind: str, count: int | None, **filters: str | None) -> None:
    """Dropped packets as they come, or translations, until Ctrl-C.

    Of drops a sample: at most `budgets: samples` a second for each processor. With -o json, one
    object a line.
    """
    shown = line if kind == "drop" else translation
    seen = 0
    try:
        for found in options.client.stream("monitor", type=kind, **filters):
            if options.json:
                print(json.dumps(found), flush=True)
            elif "lost" in found:
                print(f"shunt: too slow for {found['lost']} samples", file=sys.stderr)
            else:
                print(shown(found), flush=True)
            seen += "lost" not in found
            if seen == count:
                return
    except KeyboardInterrupt:
        return
    raise Unreachable(
        "the stream has ended", "shuntd was stopped", "systemctl status shuntd says why"
    )


def clock(seconds: float) -> str:
    """A time of this day, in milliseconds."""
    at = datetime.fromtimestamp(seconds).astimezone()
    return at.strftime("%H:%M:%S.") + f"{at.microsecond // 1000:03}"


def translation(found: dict[str, Any]) -> str:
    """A translation in one line: when it began or ended, who to whom, as what, for what."""
    words = [
        clock(found["time"]),
        found["event"],
        found["protocol"],
        endpoint(found["client"], found["client_port"]),
        ">",
        endpoint(found["vip"], found["vip_port"]),
        "as",
        endpoint(found["own"], found["own_port"]),
        *([f"service {found['service']}"] if found["service"] else []),
        *([f"backend {found['backend']}"] if found["backend"] else []),
    ]
    return " ".join(words)


def line(sample: dict[str, Any]) -> str:
    """A sample in one line: when, why, where, who to whom, for what."""
    words = [
        clock(sample["time"]),
        label(sample["reason"]),
        sample["interface"],
    ]
    if "source" in sample:
        words += [
            sample["protocol"],
            endpoint(sample["source"], sample.get("source_port")),
            ">",
            endpoint(sample["destination"], sample.get("destination_port")),
        ]
        words += [",".join(sample["tcp_flags"])] if sample.get("tcp_flags") else []
    words += [f"{sample['bytes']} bytes"]
    words += [f"service {sample['service']}"] if sample["service"] else []
    words += [f"backend {sample['backend']}"] if sample["backend"] else []
    return " ".join(words)
