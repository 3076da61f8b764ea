# SPDX-License-Identifier: Apache-2.0
"""`shunt decap` and `shunt cleanup`: what changes this host without the daemon."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shunt.cli import render
from shunt.cli.flow import confirm
from shunt.cli.options import Command, Options, bpffs_option
from shunt.cli.progress import progress
from shunt.cli.render import number
from shunt.lb.errors import ShuntError

if TYPE_CHECKING:
    from shunt.xdp.decap import Decap


@click.command(cls=Command)
@click.option("--iface", metavar="DEV", help="Where the load balancers' packets come in.")
@click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="PREFIX",
    help="Accept outer packets from there alone, as often as needed."
    "  [default: 198.18.0.0/16 and 100::/64]",
)
@click.option(
    "--address",
    "addresses",
    multiple=True,
    metavar="ADDR",
    help="Open dsr-geneve, for services of this host at these addresses. The first of a family"
    " stands for VIPs of it if the load balancers know this host by the other family's.",
)
@click.option(
    "--flows",
    type=click.IntRange(1, 1 << 24),
    metavar="N",
    help="Of dsr-geneve: for how many flows there is room.  [default: 262144]",
)
@click.option(
    "--mode", type=click.Choice(["auto", "native", "generic"]), default="auto", show_default=True
)
@click.option("--detach", is_flag=True, help="Take it off again.")
@bpffs_option
@click.pass_obj
def decap(
    options: Options,
    iface: str | None,
    sources: Sequence[str],
    addresses: Sequence[str],
    flows: int | None,
    mode: str,
    detach: bool,
    bpffs: Path,
) -> None:
    """On a backend of mode dsr-ipip or dsr-geneve: take outer headers off.

    The kernel's own modules are not needed.

    It goes on until it is detached, or the host restarts. Without --iface: where it is attached,
    and what it has counted.
    """
    settings = bool(sources or addresses or flows)
    if iface is None and (settings or detach or mode != "auto"):
        raise click.UsageError("Name the interface: --iface DEV.")
    if detach and settings:
        raise click.UsageError("--detach takes no --source, --address or --flows.")
    with as_root("decap loads and attaches a program"), progress(_doing(iface, detach)):
        from shunt.xdp import decap as program

        if iface is None:
            shown = program.status(bpffs)
        elif detach:
            program.detach(iface, bpffs)
            shown = []
        else:
            shown = [program.attach(iface, sources, mode, bpffs, addresses=addresses, flows=flows)]
    if options.json:
        render.print_json([_json(found) for found in shown])
    elif detach:
        print(f"{iface}: decap is detached")
    elif shown:
        for found in shown:
            _show(found)
    else:
        print("decap is attached to no interface")


def _doing(iface: str | None, detach: bool) -> str:
    if iface is None:
        return "reading what decap has counted"
    return f"taking decap off {iface}" if detach else f"loading decap for {iface}"


def _json(found: Decap) -> dict[str, object]:
    return {
        "interface": found.interface,
        "mode": found.mode,
        "sources": [str(source) for source in found.sources],
        "addresses": [str(address) for address in found.addresses],
        "flows": found.flows,
        "flows_max": found.flows_max,
        "answers": found.answers or None,
        "packets": found.packets,
    }


def _show(found: Decap) -> None:
    sources = ", ".join(map(str, found.sources))
    print(f"{found.interface}: decap, {found.mode}, from {sources}")
    if found.addresses:
        own = ", ".join(map(str, found.addresses))
        print(f"  Geneve for {own}: {found.flows} of {found.flows_max} flows")
    if not found.answers:
        print("  nothing is done for answers: their program is not attached any more")
    rows = [(render.label(name), number(n)) for name, n in found.packets.items() if n]
    if rows:
        render.print_table(("REASON", "PACKETS"), rows, right=("PACKETS",))


@click.command(cls=Command)
@bpffs_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def cleanup(options: Options, bpffs: Path, yes: bool) -> None:
    """Detach and remove everything that Shunt left in the kernel. shuntd must be stopped.

    Services are no longer forwarded, and all connections are forgotten. This leaves the host as
    it was found; the configuration files stay.
    """
    confirm(f"Stop forwarding, and forget all connections ({bpffs})?", yes)
    removed: list[str] = []
    with as_root("cleanup detaches programs"), progress("detaching and removing"):
        if bpffs.is_dir():
            with _nobody_runs(bpffs):
                removed += _remove_pins(bpffs)
        removed += _check_path()
        removed += _release_neighbours()
        removed += _remove_socket(options.socket)
    if options.json:
        render.print_json({"removed": removed})
    else:
        for line in removed:
            print(f"removed {line}")
        if not removed:
            print(f"there was nothing to remove in {bpffs}")


def _remove_pins(bpffs: Path) -> list[str]:
    from shunt.sockops import attach as sockets
    from shunt.sockops import streams
    from shunt.tc import attach as tc
    from shunt.xdp import attach
    from shunt.xdp import decap as program

    removed = [
        *streams.cleanup(bpffs),
        *sockets.cleanup(bpffs),
        *tc.cleanup(bpffs),
        *program.cleanup(bpffs),
    ]
    return [*removed, *attach.cleanup(bpffs)]


def _check_path() -> list[str]:
    """What leads health checks through VIPs, of a shuntd that was killed."""
    from shunt.xdp import check

    return check.cleanup()


def _release_neighbours() -> list[str]:
    """Neighbours that the kernel keeps resolved because shuntd asked it to."""
    from shunt.kern import neighbours
    from shunt.kern.netlink import Netlink

    with Netlink() as netlink:
        released = neighbours.release_all(netlink)
    return [f"the mark `managed` of {released} neighbours"] if released else []


def _remove_socket(path: Path) -> list[str]:
    from shunt.agent.unix_socket import remove_stale

    there = path.exists()
    with contextlib.suppress(ShuntError):  # it is of another daemon, or no socket
        remove_stale(path)
    return [str(path)] if there and not path.exists() else []


@contextlib.contextmanager
def _nobody_runs(bpffs: Path) -> Iterator[None]:
    from shunt.agent.daemon import only_one

    try:
        lock = only_one(bpffs)
        lock.__enter__()
    except ShuntError as e:
        raise ShuntError(
            f"shuntd is running on {bpffs}",
            "it would go on writing to what is no longer there",
            "stop it first: systemctl stop shuntd",
        ) from e
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


@contextlib.contextmanager
def as_root(why: str) -> Iterator[None]:
    """What the kernel refuses in here becomes an error that says so; `why` says for what."""
    try:
        yield
    except PermissionError as e:
        raise ShuntError(
            "the kernel does not allow it", f"{why}: {e.strerror or e}", "run it as root (sudo)"
        ) from e
    except OSError as e:
        where = f" ({e.filename})" if e.filename else ""
        raise ShuntError(
            "the kernel refuses", f"{e.strerror or e}{where}", "see `shunt doctor`"
        ) from e
