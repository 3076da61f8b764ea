# SPDX-License-Identifier: Apache-2.0
"""From the shape of shunt.yaml to Settings."""

from collections.abc import Callable
from typing import TypeVar

import msgspec
from msgspec import UNSET

from shunt.kern.memory import physical_bytes
from shunt.lb.model import Limits, Settings
from shunt.lb.sizes import by_memory

from . import values
from .masquerade import build_masquerade
from .shape import SettingsFile, Sizes
from .sockets import build_sockets
from .typed import Path, Reader, each

_DEFAULT = Settings(interfaces=())
_MOST_SEED = 2**64 - 1
# A region of the default size for ten backends; whole pages, and whole words of map restarts.
SLOTS_UNIT = 1024
_KERNELS_TABLES = range(253, 256)  # default, main, local

T = TypeVar("T")


def build_settings(reader: Reader, written: SettingsFile) -> Settings:
    """Settings; where a value is refused, an error is noted and its default stands."""
    source4 = _parsed(
        reader, ("ipip", "source4"), values.network4, written.ipip.source4, _DEFAULT.ipip_source4
    )
    source6 = _parsed(
        reader, ("ipip", "source6"), values.network6, written.ipip.source6, _DEFAULT.ipip_source6
    )
    default_ports = (_DEFAULT.nat_port_min, _DEFAULT.nat_port_max)
    first, last = _parsed(
        reader, ("nat", "ports"), values.port_range, written.nat.ports, default_ports
    )
    if written.hash_seed > _MOST_SEED:
        what = f"hash_seed {written.hash_seed} is out of range"
        wants = f"an integer from 0 to {_MOST_SEED}"
        reader.refuse(("hash_seed",), what, wants, "choose a smaller one, equal on all nodes")
    slots = written.limits.slots
    if slots % SLOTS_UNIT:
        wants = f"a multiple of {SLOTS_UNIT}"
        what = f"slots {slots} is not {wants}"
        fix = f"write {-(-slots // SLOTS_UNIT) * SLOTS_UNIT}"
        reader.refuse(("limits", "slots"), what, wants, fix)
    listen = _parsed(reader, ("metrics", "listen"), values.listening, written.metrics.listen, None)
    interfaces = _interfaces(reader, written)
    covered, excluded, node_ports, close = build_sockets(reader, written)
    return Settings(
        interfaces=interfaces,
        xdp_mode=written.xdp,
        hash_seed=written.hash_seed,
        ipip_source4=source4,
        ipip_source6=source6,
        nat_port_min=first,
        nat_port_max=last,
        masquerade=build_masquerade(reader, written, interfaces),
        handover=written.handover,
        echo=written.echo == "on",
        sockets=covered,
        sockets_close=close,
        sockets_exclude=excluded,
        node_ports=node_ports,
        limits=_limits(written.limits),
        inserts_per_s=written.budgets.inserts,
        answers_per_s=written.budgets.answers,
        samples_per_s=written.budgets.samples,
        metrics_listen=listen,
        metrics_detail=written.metrics.detail,
        program_times=written.metrics.program_times == "on",
        check_mark=written.checks.mark,
        check_table=_table(reader, written.checks.table),
    )


def _limits(written: Sizes) -> Limits:
    sizes = by_memory(physical_bytes())._asdict()
    said = msgspec.structs.asdict(written).items()
    return Limits(**sizes | {name: size for name, size in said if size is not UNSET})


def _table(reader: Reader, table: int) -> int:
    if table in _KERNELS_TABLES:
        what, wants = f"table {table} is the kernel's own", "a routing table that nobody else uses"
        reader.refuse(("checks", "table"), what, wants, f"write table: {_DEFAULT.check_table}")
    return table


def _parsed(reader: Reader, path: Path, parse: Callable[[str], T], text: str, default: T) -> T:
    try:
        return parse(text)
    except values.Refused as error:
        reader.refuse(path, error.what, error.wants, error.fix)
        return default


def _interfaces(reader: Reader, written: SettingsFile) -> tuple[str, ...]:
    first: dict[str, Path] = {}
    for path, name in each(("interfaces",), written.interfaces):
        if name in first:
            why = f"it is listed already at {reader.place(first[name])}"
            reader.error(path, f"interface {name} stands twice", why, "remove one of the two")
        first.setdefault(name, path)
    return tuple(first)
