# SPDX-License-Identifier: Apache-2.0
"""`shunt socket`, and what `shunt explain` says of a socket's call."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from shunt.cli import render
from shunt.cli.flow import limit_option, note_more
from shunt.cli.options import Group, Options
from shunt.cli.render import duration, endpoint

Json = dict[str, Any]
PROC = Path("/proc")


@click.group(cls=Group)
def socket() -> None:
    """Sockets of this host that have backends in VIPs' places."""


@socket.command("list")
@click.argument("service", required=False)
@click.option("-p", "--processes", is_flag=True, help="Who has each: looks through /proc.")
@limit_option
@click.pass_obj
def list_(options: Options, service: str | None, processes: bool, limit: int) -> None:
    """Translated sockets of all namespaces, of one service or of all, in no order.

    UDP that is not connected has a line for each VIP that it sent to. Of connections that pass TCP
    by, or might have, the server's ends have one, too.
    """
    found = options.client.get("sockets", service=service, limit=limit)
    rows: list[Json] = found["sockets"]
    if processes:
        holders = _holders()
        rows = [{**row, "processes": holders.get(row["inode"], [])} for row in rows]
    if options.json:
        render.print_json(rows)
    else:
        columns = ["PROTOCOL", "END", "LOCAL", "VIP", "SERVICE", "BACKEND", "STATE", "STREAM"]
        columns += ["SINCE", "NAMESPACE", "CGROUP", *(["PROCESSES"] if processes else [])]
        render.print_table(columns, [_cells(row) for row in rows], right=("SINCE",))
    note_more(found, limit)


def _cells(row: Json) -> list[str]:
    state = row["backend_state"]
    cells = [
        row["protocol"],
        row["end"],
        endpoint(row["local"], row["local_port"]),
        endpoint(row["vip"], row["vip_port"]),
        row["service"],
        row["backend"] + (f" ({state})" if state != "up" else ""),
        row["state"] if row["connected"] else "sent",
        _stream(row),
        duration(row["since_s"]),
        row["netns"],
        row["cgroup"],
    ]
    if "processes" in row:
        cells.append(",".join(f"{each['name']}/{each['pid']}" for each in row["processes"]))
    return cells


def _stream(row: Json) -> str:
    why = row["stream_why"].lower().replace("_", "-")
    return f"{row['stream']} ({why})" if why else row["stream"].replace("off", "-")


def _holders(proc: Path = PROC) -> Mapping[int, list[Json]]:
    """Which processes have a socket, by its inode; those that this user may look at."""
    found: dict[int, list[Json]] = defaultdict(list)
    for process in proc.iterdir():
        if not process.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            inodes = set(_inodes(process / "fd"))
            name = (process / "comm").read_text().rstrip("\n")
            for inode in inodes:
                found[inode].append({"pid": int(process.name), "name": name})
    return found


def _inodes(directory: Path) -> Iterator[int]:
    for fd in directory.iterdir():
        with contextlib.suppress(OSError):  # it was closed meanwhile
            text = str(fd.readlink())
            if text.startswith("socket:["):
                yield int(text[8:-1])


def explain_call(options: Options, body: Json) -> None:
    """What would become of a process's call."""
    found = options.client.post("explain", "socket", body=body)
    if options.json:
        render.print_json(found)
        return
    print(f"{body['call']}() of {body['protocol']} to {endpoint(body['vip'], body['port'])}")
    told = [(step["step"], step["text"]) for step in found["steps"]]
    told += [("fix", found["fix"])] if found["fix"] else []
    width = max(len(name) for name, _ in told)
    for name, text in told:
        print(f"  {name.ljust(width)}  {text}")
