# SPDX-License-Identifier: Apache-2.0
"""`shunt explain`."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from shunt.cli import render
from shunt.cli.frames import PROTOCOLS, TCP_FLAGS, address_port, captured, make
from shunt.cli.options import Command, Options
from shunt.cli.render import endpoint
from shunt.cli.sockets import explain_call

Json = dict[str, Any]
CALLS = ("connect", "sendto", "bind")
# A request takes 64 KiB.
BATCH_BYTES, BATCH = 40_000, 200


def _flags(_ctx: click.Context, _param: click.Parameter, text: str) -> list[str]:
    flags = [flag for flag in text.split(",") if flag]
    for flag in flags:
        if flag not in TCP_FLAGS:
            raise click.BadParameter(f"{flag!r} is none of {', '.join(TCP_FLAGS)}")
    return flags


@click.command(cls=Command)
@click.option(
    "--from", "source", metavar="ADDR:PORT|socket", help="Who sends it; or a process's call."
)
@click.option("--to", "destination", metavar="ADDR:PORT", help="To whom.")
@click.option("--proto", type=click.Choice(PROTOCOLS), default="tcp", show_default=True)
@click.option("--flags", default="syn", show_default=True, callback=_flags, help="Of TCP: syn,ack")
@click.option("--payload", type=click.IntRange(0, 3000), default=0, help="So many bytes.")
@click.option("--on", "interface", help="Where it comes in.  [default: the first configured]")
@click.option("--leaving", is_flag=True, help="On its way out there instead, which TC sees.")
@click.option("--pcap", type=click.Path(path_type=Path), help="Each packet of a capture instead.")
@click.option(
    "--call", type=click.Choice(CALLS), default="connect", show_default=True, help="Of a socket."
)
@click.option("--bound", metavar="ADDR", help="The address that the socket is bound to.")
@click.option("--cgroup", metavar="PATH", help="The control group of the socket's process.")
@click.option("--netns", type=int, metavar="COOKIE", help="Its network namespace: `socket list`.")
@click.option("--ipv6-only", is_flag=True, help="Its socket has IPV6_V6ONLY.")
@click.option("-v", "--verbose", is_flag=True, help="With --pcap: the steps too.")
@click.pass_obj
def explain(
    options: Options,
    source: str | None,
    destination: str | None,
    proto: str,
    flags: list[str],
    payload: int,
    interface: str | None,
    leaving: bool,
    pcap: Path | None,
    call: str,
    bound: str | None,
    cgroup: str | None,
    netns: int | None,
    ipv6_only: bool,
    verbose: bool,
) -> None:
    """What would become of a packet, and why, step by step.

    The balancer's own program runs on the tables in force. Nothing is sent, counted or changed:
    each packet is explained as if it were the next to come. With --proto icmp, an echo request
    between addresses without ports; with --proto sctp an INIT, or DATA if there is a payload.

    With --from socket: what a call of a process on this host gets in a VIP's place; with --call
    bind, whether --to may be bound, or is a service's port.
    """
    if source == "socket":
        of = {"source": bound, "cgroup": cgroup, "netns": netns, "ipv6_only": ipv6_only or None}
        _explain_call(options, destination, proto, call, of)
        return
    if call != "connect" or bound or cgroup or netns is not None or ipv6_only:
        which = "--call, --bound, --cgroup, --netns and --ipv6-only"
        raise click.UsageError(f"{which} go with --from socket")
    where: Json = {"leaving": True} if leaving else {}
    if interface is not None:
        where["interface"] = interface
    if pcap is not None:
        if source or destination:
            raise click.UsageError("--pcap stands alone: its packets say from and to")
        _print_capture(options, _asked(options, captured(pcap), where), verbose)
        return
    if source is None or destination is None:
        raise click.UsageError("give --from and --to, or --pcap")
    ends = [address_port(text, proto != "icmp") for text in (source, destination)]
    frame = make(ends[0], ends[1], proto, flags, payload)
    (found,) = _asked(options, [frame], where)
    if options.json:
        render.print_json(found)
        return
    print(f"{packet(found)}, {'out' if leaving else 'in'} by {found['interface']}")
    _print_steps(found)


def _explain_call(
    options: Options, destination: str | None, proto: str, call: str, of: Json
) -> None:
    if destination is None or proto not in ("tcp", "udp"):
        raise click.UsageError("--from socket goes with --to ADDR:PORT, and with TCP or UDP")
    if call == "bind" and of["source"] is not None:
        raise click.UsageError("with --call bind, --to is what is bound: leave --bound away")
    vip, port = address_port(destination, True)
    body: Json = {"vip": str(vip), "port": port, "protocol": proto, "call": call}
    explain_call(options, body | {key: value for key, value in of.items() if value is not None})


def _asked(options: Options, frames: Iterable[bytes], where: Json) -> Iterator[Json]:
    """What shuntd says of each, with the interface that it is on."""
    batch: list[bytes] = []
    for frame in frames:
        if batch and (len(batch) == BATCH or sum(map(len, (*batch, frame))) > BATCH_BYTES):
            yield from _explained(options, batch, where)
            batch = []
        batch.append(frame)
    if batch:
        yield from _explained(options, batch, where)


def _explained(options: Options, frames: list[bytes], where: Json) -> Iterator[Json]:
    body: Json = {"frames": [base64.b64encode(frame).decode() for frame in frames], **where}
    found = options.client.post("explain", body=body)
    for each in found["packets"]:
        yield {"interface": found["interface"], **each}


def _print_capture(options: Options, packets: Iterable[Json], verbose: bool) -> None:
    """A line each; as JSON, an object a line."""
    for number, found in enumerate(packets, 1):
        if options.json:
            print(json.dumps(found))
            continue
        print(f"{number}  {packet(found)}: {found['text']}")
        if verbose:
            _print_steps(found)


def _print_steps(found: Json) -> None:
    if problem := found.get("problem"):
        print(f"  {problem['what']}\n  why: {problem['why']}\n  fix: {problem['fix']}")
    width = max((len(step["step"]) for step in found["steps"]), default=0)
    for step in found["steps"]:
        print(f"  {step['step'].ljust(width)}  {step['text']}")


def packet(found: Json) -> str:
    """Who sent what to whom."""
    shown = found["packet"]
    if "source" not in shown:
        return f"ethertype {shown.get('ethertype', '?')}"
    words = [
        shown["protocol"],
        endpoint(shown["source"], shown.get("source_port")),
        ">",
        endpoint(shown["destination"], shown.get("destination_port")),
        *([",".join(shown["tcp_flags"])] if shown.get("tcp_flags") else []),
    ]
    return " ".join(words)
