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
@click.option("--type", "kind", type=click.Choice(["drop"]), default="drop", show_default=True)
@click.option("--count", type=click.IntRange(1), help="End after so many.")
@click.pass_obj
def monitor(options: Options, kind: str, count: int | None) -> None:
    """Dropped packets as they come, until Ctrl-C.

    A sample of them: at most `budgets: samples` a second for each processor. With -o json, one
    object a line.
    """
    seen = 0
    try:
        for sample in options.client.stream("monitor", type=kind):
            if options.json:
                print(json.dumps(sample), flush=True)
            elif "lost" in sample:
                print(f"shunt: too slow for {sample['lost']} samples", file=sys.stderr)
            else:
                print(line(sample), flush=True)
            seen += "lost" not in sample
            if seen == count:
                return
    except KeyboardInterrupt:
        return
    raise Unreachable(
        "the stream has ended", "shuntd was stopped", "systemctl status shuntd says why"
    )


def line(sample: dict[str, Any]) -> str:
    """A sample in one line: when, why, where, who to whom, for what."""
    at = datetime.fromtimestamp(sample["time"]).astimezone()
    words = [
        at.strftime("%H:%M:%S.") + f"{at.microsecond // 1000:03}",
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
