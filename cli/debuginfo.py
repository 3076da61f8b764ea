# SPDX-License-Identifier: Apache-2.0
"""`shunt debuginfo`: one archive of what somebody who helps wants to see."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import platform
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from shunt.cli import render
from shunt.cli.client import Client, Refused, Unreachable
from shunt.cli.options import Command, Options, Places, asked_places
from shunt.cli.progress import progress
from shunt.lb.errors import ShuntError

Json = dict[str, Any]
Piece = tuple[str, Callable[[], str]]  # its name in the archive, and what makes it

LOG_LINES = 2000
COMMAND_S = 10.0
# Nothing here changes anything; what is not installed is left out.
COMMANDS = {
    "ip-link.txt": ["ip", "-d", "-s", "link", "show"],
    "ip-address.txt": ["ip", "address", "show"],
    "ip-route.txt": ["ip", "route", "show", "table", "all"],
    "ip6-route.txt": ["ip", "-6", "route", "show", "table", "all"],
    "ip-neighbour.txt": ["ip", "neighbour", "show"],
    "bpf-programs.txt": ["bpftool", "prog", "show"],
    "bpf-links.txt": ["bpftool", "link", "show"],
    "log.txt": ["journalctl", "-u", "shuntd", "-n", str(LOG_LINES), "--no-pager"],
}
FILES = {
    "kernel/version": "/proc/version",
    "kernel/cpus": "/sys/devices/system/cpu/online",
    "kernel/bpf_jit_enable": "/proc/sys/net/core/bpf_jit_enable",
    "kernel/bpf_jit_harden": "/proc/sys/net/core/bpf_jit_harden",
    "kernel/bpf_stats_enabled": "/proc/sys/kernel/bpf_stats_enabled",
    "kernel/meminfo": "/proc/meminfo",
    "kernel/softnet_stat": "/proc/net/softnet_stat",
    "kernel/interrupts": "/proc/interrupts",
    "kernel/os-release": "/etc/os-release",
}


@click.command(cls=Command)
@asked_places
@click.option("--file", "path", type=click.Path(path_type=Path), help="Where to write it.")
@click.pass_obj
def debuginfo(options: Options, places: Places, path: Path | None) -> None:
    """One archive for whoever helps you: status, tables' fill, doctor, files, kernel, log.

    Secrets are taken out, and flows are not in it; addresses of services, backends, this host and
    its neighbours are. Works also while shuntd does not answer. Look into it before you send it.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    name = f"shunt-debuginfo-{platform.node() or 'host'}-{stamp}"
    path = path or Path(f"{name}.tar.gz")
    with progress("collecting") as say:
        pieces = [
            *_of_the_daemon(options.client),
            ("doctor.json", lambda: _doctor(options.client, places)),
            *_files(options.client, places),
            *_of_the_kernel(),
        ]
        contents, missing = _collected(pieces, say)
        _write(path, name, contents, missing)
    if options.json:
        render.print_json({"file": str(path), "files": sorted(contents), "missing": missing})
        return
    print(f"{path}: {render.count(len(contents), 'files')}, {render.size(path.stat().st_size)}")
    for piece, why in missing.items():
        print(f"  without {piece}: {why}")


def _collected(
    pieces: list[Piece], say: Callable[[str], None]
) -> tuple[dict[str, str], dict[str, str]]:
    """Each piece's text without secrets, and why others could not be had."""
    from shunt.agent.redact import redact_text

    contents: dict[str, str] = {}
    missing: dict[str, str] = {}
    for name, make in pieces:
        say(f"collecting {name}")
        try:
            contents[name] = redact_text(make())
        except Unreachable as e:
            missing[name] = f"{e.what}: {e.why}"
        except (Refused, ShuntError) as e:
            missing[name] = e.what
        except (OSError, subprocess.SubprocessError) as e:
            missing[name] = str(e)
    return contents, missing


def _of_the_daemon(client: Client) -> Iterator[Piece]:
    def asked(*parts: str, **query: object) -> Callable[[], str]:
        return lambda: _pretty(client.get(*parts, **query))

    yield "status.json", asked("status")
    yield "errors.json", asked("errors")
    yield "services.json", asked("services")
    yield "backends.json", asked("backends")
    yield "bpf-lb.json", asked("bpf", "lb", limit=1000)
    yield "metrics.txt", lambda: "".join(client.text("metrics"))


def _doctor(client: Client, places: Places) -> str:
    from shunt.cli.doctor import balancer_findings

    findings = balancer_findings(client, places)
    return _pretty([dataclasses.asdict(finding) for finding in findings])


def _files(client: Client, places: Places) -> Iterator[Piece]:
    """The configuration; also files that are wrong, which is often the point."""
    from shunt.agent.redact import redact_yaml

    try:
        config, services, _state = places.found(client.get("status"))
    except ShuntError:
        config, services, _state = places.found(None)

    def read(path: Path) -> Callable[[], str]:
        return lambda: redact_yaml(path.read_text(errors="replace"))

    yield "config/shunt.yaml", read(config)
    for path in sorted(services.glob("*.yaml")) if services.is_dir() else []:
        yield f"config/services.d/{path.name}", read(path)


def _of_the_kernel() -> Iterator[Piece]:
    for name, file in FILES.items():
        yield name, Path(file).read_text
    vulnerabilities = Path("/sys/devices/system/cpu/vulnerabilities")
    if vulnerabilities.is_dir():
        yield (
            "kernel/vulnerabilities",
            lambda: "".join(
                f"{path.name}: {path.read_text()}" for path in sorted(vulnerabilities.iterdir())
            ),
        )
    for name, argv in COMMANDS.items():
        if shutil.which(argv[0]):
            yield name, lambda argv=argv: _said(argv)  # type: ignore[misc]


def _said(argv: list[str]) -> str:
    done = subprocess.run(
        argv, capture_output=True, text=True, errors="replace", timeout=COMMAND_S, check=False
    )
    return f"$ {' '.join(argv)}\n{done.stdout}{done.stderr}"


def _pretty(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _write(path: Path, name: str, contents: dict[str, str], missing: dict[str, str]) -> None:
    """Raises: ShuntError if it cannot be written."""
    manifest = {"made": name, "kernel": platform.release(), "missing": missing}
    contents["manifest.json"] = _pretty(manifest)
    try:
        # From the first byte on only for whoever made it.
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
            for piece, text in sorted(contents.items()):
                data = text.encode(errors="replace")
                member = tarfile.TarInfo(f"{name}/{piece}")
                member.size, member.mtime, member.mode = len(data), int(time.time()), 0o600
                archive.addfile(member, io.BytesIO(data))
    except OSError as e:
        raise ShuntError(
            f"{path} cannot be written", e.strerror or str(e), "give another with --file"
        ) from e
