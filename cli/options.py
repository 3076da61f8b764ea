# SPDX-License-Identifier: Apache-2.0
"""What all commands share: the options of every command, and where they stand."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shunt.cli.client import Client

if TYPE_CHECKING:
    from shunt.agent.sources.store import State

SOCKET = Path("/run/shunt/shunt.sock")
CONFIG = Path("/etc/shunt/shunt.yaml")
SERVICES = Path("/etc/shunt/services.d")
STATE = Path("/var/lib/shunt")
BPFFS = Path("/sys/fs/bpf/shunt")


@dataclass
class Options:
    """The options that may stand before or after a command's name."""

    socket: Path = SOCKET
    output: str = "table"

    @property
    def client(self) -> Client:
        return Client(self.socket)

    @property
    def json(self) -> bool:
        return self.output == "json"


def _remember(field: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def callback(ctx: click.Context, _param: click.Parameter, value: Any) -> None:
        options = ctx.ensure_object(Options)
        if value is not None:
            setattr(options, field, value)

    return callback


def _shared(root: bool) -> list[click.Parameter]:
    return [
        click.Option(
            ["--socket"],
            type=click.Path(path_type=Path),
            envvar="SHUNT_SOCKET" if root else None,
            expose_value=False,
            callback=_remember("socket"),
            help=f"shuntd's socket (or SHUNT_SOCKET).  [default: {SOCKET}]",
            hidden=not root,
        ),
        click.Option(
            ["-o", "--output"],
            type=click.Choice(["table", "json"]),
            expose_value=False,
            callback=_remember("output"),
            help="A table for people, or JSON for programs.  [default: table]",
        ),
    ]


class Command(click.Command):
    """A command that also takes the shared options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += _shared(root=False)


class ReaderGone(Exception):
    """Nobody reads the output any more: `shunt flow list | head`."""


class Group(click.Group):
    """A noun; its commands take the shared options too."""

    command_class = Command

    def __init__(self, *args: Any, root: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += _shared(root)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as e:  # which click would make exit code 1 of
            raise ReaderGone from e


Group.group_class = Group


def config_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--config and --services, as shuntd has them."""
    for name, default in (("--services", SERVICES), ("--config", CONFIG)):
        option = click.option(
            name, type=click.Path(path_type=Path), default=default, show_default=True
        )
        command = option(command)
    return command


bpffs_option = click.option(
    "--bpffs",
    type=click.Path(path_type=Path),
    default=BPFFS,
    show_default=True,
    help="Where the programs and maps are pinned.",
)

_STATE_HELP = "Where shuntd keeps services of the API and addresses given by pools."
state_option = click.option(
    "--state",
    type=click.Path(path_type=Path),
    default=STATE,
    show_default=True,
    help=_STATE_HELP,
)


@dataclass(frozen=True)
class Places:
    """Where shuntd's files are; of those that are None it is asked, if it answers."""

    config: Path | None
    services: Path | None
    state: Path | None

    def found(self, told: Mapping[str, Any] | None) -> tuple[Path, Path, Path]:
        """The three; `told` is shuntd's status, or None."""
        said = told or {}
        return (
            self.config or Path(said.get("config_file", CONFIG)),
            self.services or Path(said.get("services_directory", SERVICES)),
            self.state or Path(said.get("state_directory", STATE)),
        )


def asked_places(command: Callable[..., Any]) -> Callable[..., Any]:
    """--config, --services and --state as `places`, for commands that ask the daemon anyway."""

    @functools.wraps(command)
    def with_places(
        *args: Any, config: Path | None, services: Path | None, state: Path | None, **kwargs: Any
    ) -> Any:
        return command(*args, places=Places(config, services, state), **kwargs)

    for name, default, text in (
        ("--state", STATE, f"{_STATE_HELP}  "),
        ("--services", SERVICES, ""),
        ("--config", CONFIG, ""),
    ):
        said = f"{text}[default: as the running shuntd says; {default}]"
        with_places = click.option(name, type=click.Path(path_type=Path), help=said)(with_places)
    return with_places


def kept_in(directory: Path) -> State:
    """What the daemon keeps; nothing for who may not read it.

    Raises: ShuntError if it is broken.
    """
    from shunt.agent.sources.store import State, Store

    store = Store(directory)
    return store.read() if os.access(store.path, os.R_OK) else State()
