# SPDX-License-Identifier: Apache-2.0
"""The backend's side of dsr-ipip and dsr-geneve: the decap program on an interface, `shunt decap`.

It goes on when the command has ended. What that takes stands in decap-INTERFACE: the links of the
program for what comes in and of the one for answers (without TCX: clsact/, if that qdisc is ours),
and the maps that both share. What they have counted and how they are set is read from the program.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shunt.kern import features, links, tc
from shunt.kern.bpffs import ensure_bpffs
from shunt.kern.maps import Map
from shunt.kern.objects import Object, open_pin, pin
from shunt.kern.programs import inside
from shunt.kern.tc import Direction
from shunt.kern.testrun import run_xdp
from shunt.lb.errors import ShuntError
from shunt.lb.model import IPAddress
from shunt.xdp.decap_config import (
    Network,
    configure,
    default_sources,
    own_addresses,
    prefixes,
    read_addresses,
    read_sources,
)

OBJECT, ANSWER_OBJECT = (Path(__file__).parent / f"{n}.bpf.o" for n in ("decap", "answer"))
PROGRAM, ANSWER_PROGRAM, COUNTERS = "shunt_decap", "shunt_answer", "decap_reasons"
BPFFS = Path("/sys/fs/bpf/shunt")
PREFIX = "decap-"
LINK, ANSWER, CLSACT = "link", "answer", "clsact"  # within a directory
FLOWS = "ways_back"
KEPT = FLOWS, "tunneled"  # pinned, and used again when the sources change
SWEEP_PROGRAM, SWEEP = "shunt_sweep", "sweep"  # run for each look at the flows
SHARED = *KEPT, COUNTERS
DEFAULT_FLOWS = 262144


@dataclass(frozen=True, slots=True)
class Decap:
    """What is attached to an interface. `packets` are counted by the names of enum decap_reason."""

    interface: str
    mode: str  # native, generic
    sources: tuple[Network, ...]
    packets: dict[str, int]
    addresses: tuple[IPAddress, ...] = ()  # without any Geneve is left alone
    flows: int = 0  # whose way back is remembered
    flows_max: int = 0
    answers: str = ""  # how their program is attached: tcx, clsact, or not at all


def attach(
    iface: str,
    sources: Iterable[Network | str] = (),
    mode: str = "auto",
    bpffs: Path = BPFFS,
    *,
    addresses: Iterable[IPAddress | str] = (),
    flows: int | None = None,
) -> Decap:
    """Unwrap what comes to `iface` from `sources`; if it is attached already, change the settings.

    `addresses` are this host's, of services behind Geneve; `flows` how many of theirs have room.
    Raises: ShuntError if the interface is absent, or holds another program, or decap in another
            mode or with room for other flows; or if an argument is wrong. What was attached before
            goes on.
    """
    accepted = prefixes(sources) or default_sources()
    own = own_addresses(addresses)
    ifindex = _ifindex(iface)
    ensure_bpffs(bpffs)
    _sweep(bpffs)
    held = _find(iface, ifindex, bpffs)
    with Object(OBJECT) as obj, Object(ANSWER_OBJECT) as answer:
        for each in (obj, answer):
            configure(each.variable(".rodata", "config"), accepted, own)
        load(obj, answer, iface, held, flows)
        program, replies = obj.programs[PROGRAM].fd, answer.programs[ANSWER_PROGRAM].fd
        if held:
            _swap(held, iface, ifindex, mode, program, replies)
        else:
            path = _free_path(iface, bpffs)
            path.mkdir()
            try:
                for name in KEPT:
                    pin(obj.maps[name].fd, path / name)
                pin(obj.programs[SWEEP_PROGRAM].fd, path / SWEEP)
                _attach_answers(path, iface, ifindex, replies)
                link, _ = links.attach_xdp(program, ifindex, iface, mode)
                try:
                    pin(link, path / LINK)
                finally:
                    os.close(link)
            except BaseException:
                _remove(path, ifindex)
                raise
    return next(decap for decap in status(bpffs) if decap.interface == iface)


def load(obj: Object, answer: Object, iface: str, held: Path | None, flows: int | None) -> None:
    """Both programs on the same maps; those that are pinned in `held` are kept.

    Raises: ShuntError.
    """
    obj.set_entries({FLOWS: flows or DEFAULT_FLOWS})
    for path in [held / name for name in KEPT] if held else []:
        with contextlib.closing(Map.pinned(path)) as found:
            if path.name == FLOWS and flows not in {None, found.spec.entries}:
                raise ShuntError(
                    f"decap on {iface} has room for {found.spec.entries} flows",
                    "the flows that it remembers cannot be moved to another map",
                    f"shunt decap --iface {iface} --detach, and attach again: flows end",
                )
            obj.set_entries({path.name: found.spec.entries})
            obj.reuse(path.name, found.fd, str(path))
    obj.load()
    for name in SHARED:
        answer.set_entries({name: obj.maps[name].spec.entries})
        answer.reuse(name, obj.maps[name].fd, name)
    answer.load()


def _attach_answers(path: Path, iface: str, ifindex: int, program: int) -> None:
    """Raises: ShuntError, OSError."""
    if features.tcx().present:
        link = tc.attach_link(program, ifindex, Direction.EGRESS)
        try:
            pin(link, path / ANSWER)
        finally:
            os.close(link)
        return
    if CLSACT not in tc.qdiscs(ifindex):
        # The mark first: a qdisc that nobody remembers would stay.
        (path / CLSACT).mkdir()
        tc.create_clsact(ifindex, iface)
    tc.attach_filter(program, ifindex, Direction.EGRESS, ANSWER_PROGRAM)


def _remove(path: Path, ifindex: int) -> None:
    """All that stands in a directory, and what it is about; ifindex 0: the interface has gone."""
    if not path.is_dir():  # the link alone: of an earlier version
        links.detach_pin(path)
        return
    for name in (LINK, ANSWER):
        if (path / name).exists():
            links.detach_pin(path / name)
    with contextlib.suppress(OSError):  # it may go meanwhile
        if ifindex:
            tc.detach_filter(ifindex, Direction.EGRESS, ANSWER_PROGRAM)
        if ifindex and (path / CLSACT).exists():
            tc.remove_clsact(ifindex)
    if (path / CLSACT).exists():
        (path / CLSACT).rmdir()
    for name in (*KEPT, SWEEP):
        (path / name).unlink(missing_ok=True)
    path.rmdir()


def detach(iface: str, bpffs: Path = BPFFS) -> None:
    """Take the program off again.

    Raises: ShuntError if none of ours is there; another program is left alone.
    """
    _sweep(bpffs)
    ifindex = _ifindex(iface)
    path = _find(iface, ifindex, bpffs)
    if path is None:
        holder = links.query(ifindex)
        raise ShuntError(
            f"decap is not attached to {iface}",
            f"its program is {holder.prog_name!r}, and not pinned in {bpffs}"
            if holder.prog_id
            else "it has no XDP program",
            "`ip link` shows which interface has which program",
        )
    _remove(path, ifindex)


def cleanup(bpffs: Path) -> list[str]:
    """Take it all off, wherever it is attached; says what was removed."""
    removed = []
    for path in sorted(bpffs.glob(f"{PREFIX}*")):
        _remove(path, _held_by(path)[0])
        removed.append(str(path))
    return removed


def status(bpffs: Path = BPFFS) -> list[Decap]:
    """Where decap is attached in this network namespace, by interface."""
    found = []
    for ifindex, iface in sorted(socket.if_nameindex(), key=lambda pair: pair[1]):
        if path := _find(iface, ifindex, bpffs):
            found.append(_describe(iface, ifindex, path))
    return found


def _file_name(iface: str) -> str:
    """bpffs takes no name with a dot, and no interface's name has a colon."""
    return PREFIX + iface.replace(".", ":")


def _free_path(iface: str, bpffs: Path) -> Path:
    """Where to pin: namespaces may share one bpffs, and have interfaces of one name."""
    path = bpffs / _file_name(iface)
    if (path / LINK).exists():
        namespace = Path("/proc/thread-self/ns/net").stat().st_ino
        path = bpffs / f"{path.name}@{namespace}"
    if path.exists():  # of a command that was killed
        _remove(path, 0)
    return path


def _find(iface: str, ifindex: int, bpffs: Path) -> Path | None:
    """Our pin for this interface. That of a namesake elsewhere holds another program."""
    attached = links.query(ifindex).prog_id
    for path, (_, prog_id) in _pins(bpffs):
        if prog_id == attached and path.name.partition("@")[0] == _file_name(iface):
            return path
    return None


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


def _swap(path: Path, iface: str, ifindex: int, mode: str, program: int, replies: int) -> None:
    """Put programs with other settings in the place of those that are attached."""
    if mode not in {"auto", current := links.query(ifindex).mode}:
        raise ShuntError(
            f"decap is attached to {iface} in mode {current}",
            "a link keeps its mode",
            f"shunt decap --iface {iface} --detach, and attach again",
        )
    if (path / ANSWER).exists():
        _update(path / ANSWER, replies)
    else:
        _attach_answers(path, iface, ifindex, replies)
    _update(path / LINK, program)


def _update(path: Path, program: int) -> None:
    link = open_pin(path)
    try:
        links.update(link, program)
    finally:
        os.close(link)


def _pins(bpffs: Path) -> Iterator[tuple[Path, tuple[int, int]]]:
    """Directories with their links' (ifindex, prog_id); ifindex 0: the interface has gone."""
    with contextlib.suppress(FileNotFoundError):
        for path in bpffs.iterdir():
            # Without a link: of a command that is about to pin it, or was killed.
            if path.name.startswith(PREFIX) and (path / LINK).exists():
                yield path, _held_by(path)


def _held_by(path: Path) -> tuple[int, int]:
    try:
        link = open_pin(path / LINK)
    except FileNotFoundError:
        return 0, 0
    try:
        return links.info(link)
    finally:
        os.close(link)


def _sweep(bpffs: Path) -> None:
    """Remove what interfaces have left that have gone, in whatever namespace."""
    for path, (ifindex, _) in list(_pins(bpffs)):
        if not ifindex:
            _remove(path, 0)


def _describe(iface: str, ifindex: int, path: Path) -> Decap:
    with Object(OBJECT) as obj:
        reasons = obj.btf.enum("decap_reason", "DECAP_")
    attached = links.query(ifindex)
    sweep(open_pin(path / SWEEP))
    with inside(attached.prog_id) as program:
        totals = program.maps[COUNTERS].totals()["packets"]
        ways = program.maps[FLOWS]
        config = program.constants["config"]
        return Decap(
            interface=iface,
            mode=attached.mode,
            sources=tuple(read_sources(config)),
            packets={reasons(i).name.lower(): int(n) for i, n in enumerate(totals)},
            addresses=tuple(read_addresses(config)),
            flows=len(ways.items()[0]),
            flows_max=ways.spec.entries,
            answers=_answers(ifindex, path),
        )


def opened_for(ifindex: int) -> tuple[IPAddress, ...]:
    """The addresses that the decap program of an interface was given, whoever has pinned it.

    Raises: OSError if the program has gone.
    """
    with inside(links.query(ifindex).prog_id) as program:
        return tuple(read_addresses(program.constants["config"]))


def sweep(program: int) -> None:
    """End the flows that are over, which nobody has looked up since. Closes the descriptor."""
    try:
        run_xdp(program, bytes(64))
    finally:
        os.close(program)


def _answers(ifindex: int, path: Path) -> str:
    if (path / ANSWER).exists():
        return "tcx"
    found = tc.our_filters(ifindex, Direction.EGRESS, ANSWER_PROGRAM)
    return "clsact" if found else ""
