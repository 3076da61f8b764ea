# SPDX-License-Identifier: Apache-2.0
"""`shunt metrics`."""

from __future__ import annotations

import sys

import click
from prometheus_client.parser import text_string_to_metric_families

from shunt.cli import render
from shunt.cli.options import Command, Options


@click.command(cls=Command)
@click.pass_obj
def metrics(options: Options) -> None:
    """The daemon's metrics, in Prometheus' text format. docs/metrics.md explains each.

    With `-o json` a list of families, each with its samples.
    """
    parts = options.client.text("metrics")
    if not options.json:
        for part in parts:
            sys.stdout.write(part)
        return
    families = text_string_to_metric_families("".join(parts))
    render.print_json(
        [
            {
                "name": family.name,
                "type": family.type,
                "help": family.documentation,
                "samples": [
                    {"name": one.name, "labels": one.labels, "value": one.value}
                    for one in family.samples
                ],
            }
            for family in families
        ]
    )
