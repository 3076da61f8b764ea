# SPDX-License-Identifier: Apache-2.0
"""`shunt metrics`."""

from __future__ import annotations

import sys

import click

from shunt.cli.options import Command, Options


@click.command(cls=Command)
@click.pass_obj
def metrics(options: Options) -> None:
    """The daemon's metrics, in Prometheus' text format. docs/metrics.md explains each."""
    for part in options.client.text("metrics"):
        sys.stdout.write(part)
