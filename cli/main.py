# SPDX-License-Identifier: Apache-2.0
"""The command `shunt`. docs/cli.md shows every command with its output.

Exit codes: 0 done, and nothing is wrong; 1 refused, or something is wrong; 2 not a command; 3 the
daemon does not answer.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from shunt.cli import (
    backend,
    bpf,
    completion,
    config,
    debuginfo,
    doctor,
    explain,
    flow,
    health,
    hook,
    host,
    maglev,
    metrics,
    monitor,
    pool,
    program,
    service,
    sockets,
    status,
    top,
)
from shunt.cli.client import Refused, Unreachable
from shunt.cli.options import Group, ReaderGone
from shunt.cli.render import print_error, print_errors
from shunt.lb.errors import ShuntError

OK, WRONG, USAGE, NO_DAEMON = range(4)
INTERRUPTED = 130


def _print_version(ctx: click.Context, _param: click.Parameter, asked: bool) -> None:
    if asked:
        from importlib import metadata

        try:
            print(f"shunt {metadata.version('shunt')}")
        except metadata.PackageNotFoundError:
            print("shunt, from a source tree")
        ctx.exit()


@click.group(cls=Group, root=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version,
    help="Print the version and exit.",
)  # fmt: skip
def shunt() -> None:
    """See and steer the load balancer shuntd.

    Exit codes: 0 done, and nothing is wrong; 1 refused, or something is wrong; 2 not a command;
    3 the daemon does not answer.
    """


for command in (
    status.status,
    service.service,
    backend.backend,
    health.health,
    pool.pool,
    flow.flow,
    flow.nat,
    sockets.socket,
    explain.explain,
    monitor.monitor,
    metrics.metrics,
    top.top,
    maglev.maglev,
    bpf.bpf,
    config.config,
    program.program,
    completion.completion,
    doctor.doctor,
    debuginfo.debuginfo,
    hook.hook,
    host.decap,
    host.cleanup,
):
    shunt.add_command(command)


def _finish_output() -> None:
    """Write what is still buffered. Raises: ShuntError if there is no room for it."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as e:
        _discard_output()
        raise ShuntError(
            "the answer could not be written",
            why=f"standard output: {os.strerror(e.errno or 0)}",
            fix="make room where it goes, and ask again",
        ) from None


def _discard_output() -> None:
    """Keep the interpreter from writing the rest at its exit: Python 3.13 then exits with 120."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. Errors are printed, never raised."""
    try:
        code = shunt.main(
            args=None if argv is None else list(argv), prog_name="shunt", standalone_mode=False
        )
        _finish_output()
    except click.ClickException as e:  # all of them are about how the command was written
        e.show()
        return USAGE
    except click.Abort:
        print("shunt: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Unreachable as e:
        print_error(e)
        return NO_DAEMON
    except Refused as e:
        print_error(e)
        print_errors(e.errors)
        return WRONG
    except ShuntError as e:
        print_error(e)
        return WRONG
    except (BrokenPipeError, ReaderGone):
        _discard_output()
        return OK
    return code if isinstance(code, int) else OK


def main() -> NoReturn:
    """The entry point."""
    sys.exit(run())


if __name__ == "__main__":
    main()
