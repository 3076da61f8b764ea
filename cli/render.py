# SPDX-License-Identifier: Apache-2.0
"""Values for people: tables, sizes, times. Colours and fitting to a width only on a terminal.

In a pipe every row is one line, and nothing is cut, so that grep and awk find what is there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shunt.lb.errors import ShuntError

STYLES = {
    "up": "green", "ok": "green", "failing": "bold red", "error": "bold red",
    "draining": "yellow", "warn": "yellow", "removed": "dim",
}  # fmt: skip
_SIZES = ("B", "kB", "MB", "GB", "TB", "PB")


def print_json(value: object) -> None:
    """As one document."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_error(error: ShuntError) -> None:
    """In its three lines, to standard error."""
    print(f"shunt: {error}", file=sys.stderr)


def print_errors(errors: Iterable[Mapping[str, Any]]) -> None:
    """Each in its three lines, to standard error."""
    for error in errors:
        print(str(ShuntError(error["what"], error["why"], error["fix"])), file=sys.stderr)


def table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[str] = ()
) -> str:
    """Aligned columns, for a pipe: a header and one line a row."""
    cells = [[str(cell) if cell != "" else "-" for cell in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    lines = []
    for line in [list(columns), *cells]:
        parts = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, cell, width in zip(columns, line, widths, strict=True)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def print_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[str] = ()
) -> None:
    """A table, with colours and folded to the width if this is a terminal."""
    if not sys.stdout.isatty():
        print(table(columns, rows, right))
        return
    from rich.console import Console

    Console().print(rich_table(columns, rows, right))


def rich_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], right: Sequence[str] = ()
) -> Any:
    """The same with colours, as rich has it."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        justify: Any = "right" if column in right else "left"
        shown.add_column(column, justify=justify, overflow="fold")
    for row in rows:
        words = [str(cell) if cell != "" else "-" for cell in row]
        shown.add_row(*(Text(word, STYLES.get(word, "")) for word in words))
    return shown


def print_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """A name and what it is, a line each."""
    known = list(pairs)
    width = max((len(name) for name, _ in known), default=0)
    for name, value in known:
        print(f"{name.ljust(width)}  {value}")


def label(name: str) -> str:
    """DROP_NO_BACKEND as people see it."""
    return name.lower().replace("_", "-")


def number(value: int | None) -> str:
    """Thousands apart; a dash for what is not known."""
    return "-" if value is None else f"{value:,}"


def count(value: int, nouns: str) -> str:
    """So many of what `nouns` is the plural of."""
    return f"{number(value)} {nouns if value != 1 else nouns.removesuffix('s')}"


def size(octets: float) -> str:
    """Bytes, in three digits."""
    value = float(octets)
    for unit in _SIZES:
        if value < 999.5 or unit == _SIZES[-1]:
            break
        value /= 1000
    digits = 1 if unit != "B" and value < 99.95 else 0
    return f"{value:,.{digits}f} {unit}"


def percent(share: float) -> str:
    """A share; never 0 % or 100 % for what only nearly is."""
    if 0 < share < 0.001:
        return "< 0.1 %"
    if 0.999 < share < 1:
        return "> 99.9 %"
    return f"{share * 100:.1f} %"


def duration(seconds: float) -> str:
    """Its two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = int(seconds) // 60
    if minutes < 60:
        return f"{minutes} min {int(seconds) % 60} s"
    hours = minutes // 60
    if hours < 48:
        return f"{hours} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def endpoint(address: str, port: int | None) -> str:
    """An address with its port."""
    if port is None:
        return address
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def frontends(service: Mapping[str, Any]) -> str:
    """A service's VIPs and ports: 203.0.113.10,2001:db8::10 80/tcp,443/tcp"""
    return f"{','.join(service['vips'])} {','.join(service['ports'])}"
