# SPDX-License-Identifier: Apache-2.0
"""The backend's side of dsr-ipip: the decap program on an interface, `shunt decap`.

Its link is pinned as decap-INTERFACE, so that it goes on when the command has ended. Nothing
else is pinned: what it has counted and which sources it accepts is read from the program.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_network
from pathlib import Path
from typing import Any

import numpy as np

from shunt.kern import links
from shunt.kern.features import ensure_bpffs
from shunt.kern.objects import Object, open_pin, pin
from shunt.kern.programs import inside
from shunt.lb.compile import mapped
from shunt.lb.errors import ShuntError
from shunt.lb.model import Settings

OBJECT = Path(__file__).parent / "decap.bpf.o"
PROGRAM, COUNTERS = "shunt_decap", "decap_reasons"
BPFFS = Path("/sys/fs/bpf/shunt")
PREFIX = "decap-"

Network = IPv4Network | IPv6Network


@dataclass(frozen=True, slots=True)
class Decap:
    """What is attached to an interface. `packets` are counted by the names of enum decap_reason."""

    interface: str
    mode: str  # native, generic
    sources: tuple[Network, ...]
    packets: dict[str, int]


def default_sources() -> tuple[Network, ...]:
    """Where the load balancers' outer headers come from, unless configured otherwise."""
    settings = Settings(interfaces=())
    return settings.ipip_source4, settings.ipip_source6


def attach(
    iface: str,
    sources: Iterable[Network | str] = (),
    mode: str = "auto",
    bpffs: Path = BPFFS,
) -> Decap:
    """Unwrap what comes to `iface` from `sources`; if it is attached already, change the sources.

    Raises: ShuntError if the interface is absent, or holds another program, or decap in another
            mode; or if a source is no prefix. What was attached before goes on.
    """
    accepted = _prefixes(sources) or default_sources()
    ifindex = _ifindex(iface)
    ensure_bpffs(bpffs)
    _sweep(bpffs)
    path = _find(iface, ifindex, bpffs)
    with Object(OBJECT) as obj:
        configure(obj.variable(".rodata", "config"), accepted)
        obj.load()
        program = obj.programs[PROGRAM].fd
        if path:
            _swap(path, iface, ifindex, mode, program)
        else:
            link, _ = links.attach_xdp(program, ifindex, iface, mode)
            try:
                pin(link, _free_path(iface, bpffs))
            finally:
                os.close(link)
    return next(decap for decap in status(bpffs) if decap.interface == iface)


def detach(iface: str, bpffs: Path = BPFFS) -> None:
    """Take the program off again.

    Raises: ShuntError if none of ours is there; another program is left alone.
    """
    _sweep(bpffs)
    ifindex = _ifindex(iface)
    path = _find(iface, ifindex, bpffs)
    if not path:
        holder = links.query(ifindex)
        raise ShuntError(
            f"decap is not attached to {iface}",
            f"its program is {holder.prog_name!r}, and not pinned in {bpffs}"
            if holder.prog_id
            else "it has no XDP program",
            "`ip link` shows which interface has which program",
        )
    link = open_pin(path)
    try:
        links.detach(link)
    finally:
        os.close(link)
    path.unlink()


def status(bpffs: Path = BPFFS) -> list[Decap]:
    """Where decap is attached in this network namespace, by interface."""
    found = []
    for ifindex, iface in sorted(socket.if_nameindex(), key=lambda pair: pair[1]):
        if _find(iface, ifindex, bpffs):
            found.append(_describe(iface, ifindex))
    return found


def _file_name(iface: str) -> str:
    """bpffs takes no name with a dot, and no interface's name has a colon."""
    return PREFIX + iface.replace(".", ":")


def _free_path(iface: str, bpffs: Path) -> Path:
    """Where to pin: namespaces may share one bpffs, and have interfaces of one name."""
    path = bpffs / _file_name(iface)
    namespace = Path("/proc/thread-self/ns/net").stat().st_ino
    return bpffs / f"{path.name}@{namespace}" if path.exists() else path


def _find(iface: str, ifindex: int, bpffs: Path) -> Path | None:
    """Our pin for this interface. That of a namesake elsewhere holds another program."""
    attached = links.query(ifindex).prog_id
    for path, (_, prog_id) in _pins(bpffs):
        if prog_id == attached and path.name.partition("@")[0] == _file_name(iface):
            return path
    return None


def _prefixes(sources: Iterable[Network | str]) -> tuple[Network, ...]:
    found = []
    for source in sources:
        try:
            found.append(ip_network(source))
        except ValueError as error:
            raise ShuntError(
                f"{source} is not a prefix to accept packets from",
                str(error),
                "give the load balancers' `ipip` sources, such as 198.18.0.0/16 or 100::/64",
            ) from error
    return tuple(found)


def configure(config: Any, sources: tuple[Network, ...]) -> None:
    """Fill struct decap_config.

    Raises: ShuntError if there are more sources than it holds.
    """
    for version in (4, 6):
        chosen = [source for source in sources if source.version == version]
        rows = config[f"source{version}"]
        if len(chosen) > len(rows):
            raise ShuntError(
                f"{len(chosen)} IPv{version} sources are too many",
                f"the program compares each packet with {len(rows)} at most",
                "give fewer, larger prefixes",
            )
        for row, source in zip(rows, chosen, strict=False):
            row["addr"] = np.frombuffer(mapped(source.network_address), np.uint8)
            row["mask"] = np.frombuffer(mapped(source.netmask), np.uint8)
        config[f"count{version}"] = len(chosen)


def _sources(config: Any) -> Iterator[Network]:
    """The inverse of configure."""
    for version, size in ((4, 4), (6, 16)):
        for row in config[f"source{version}"][: int(config[f"count{version}"])]:
            ones = sum(int(byte).bit_count() for byte in row["mask"][16 - size :])
            address = IPv6Address(row["addr"].tobytes())
            yield ip_network((address.ipv4_mapped or address, ones))


def _ifindex(iface: str) -> int:
    try:
        return socket.if_nametoindex(iface)
    except OSError:
        names = ", ".join(sorted(name for _, name in socket.if_nameindex()))
        raise ShuntError(
            f"interface {iface} does not exist",
            f"this host has {names}",
            "name the interface that faces the load balancers",
        ) from None


def _swap(path: Path, iface: str, ifindex: int, mode: str, program: int) -> None:
    """Put a program with other sources in the place of the one that is attached."""
    current = links.query(ifindex).mode
    if mode not in {"auto", current}:
        raise ShuntError(
            f"decap is attached to {iface} in mode {current}",
            "a link keeps its mode",
            f"shunt decap --iface {iface} --detach, and attach again",
        )
    link = open_pin(path)
    try:
        links.update(link, program)
    finally:
        os.close(link)


def _pins(bpffs: Path) -> Iterator[tuple[Path, tuple[int, int]]]:
    """Pinned links with their (ifindex, prog_id); ifindex 0: the interface has gone."""
    with contextlib.suppress(FileNotFoundError):
        for path in bpffs.iterdir():
            if path.name.startswith(PREFIX):
                link = open_pin(path)
                try:
                    yield path, links.info(link)
                finally:
                    os.close(link)


def _sweep(bpffs: Path) -> None:
    """Remove the pins of interfaces that have gone, in whatever namespace."""
    for path, (ifindex, _) in list(_pins(bpffs)):
        if not ifindex:
            path.unlink()


def _describe(iface: str, ifindex: int) -> Decap:
    with Object(OBJECT) as obj:
        reasons = obj.btf.enum("decap_reason", "DECAP_")
    attached = links.query(ifindex)
    with inside(attached.prog_id) as program:
        totals = program.maps[COUNTERS].totals()["packets"]
        return Decap(
            interface=iface,
            mode=attached.mode,
            sources=tuple(_sources(program.constants["config"])),
            packets={reasons(i).name.lower(): int(n) for i, n in enumerate(totals)},
        )
