#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Fills the maps of the hook country.bpf.c from a CSV file of PREFIX,COUNTRY, and reads them.

examples/country.py fill examples/countries.csv
examples/country.py show
"""

from __future__ import annotations

import argparse
import csv
import struct
from ipaddress import IPv6Address, ip_network
from pathlib import Path

from shunt.kern.raw_map import RawMap

PINS = Path("/sys/fs/bpf/shunt/hooks/pre-lb/country/maps")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def prefix_key(text: str) -> bytes:
    """struct prefix_key: the prefix's length, and its address as IPv6 or IPv4-mapped."""
    net = ip_network(text)
    address, length = net.network_address, net.prefixlen
    if net.version == 4:
        address, length = IPv6Address(f"::ffff:{address}"), length + 96
    return struct.pack("=I", length) + address.packed


def country_index(code: str) -> int:
    """Of a country's two letters."""
    first, second = code
    return 26 * LETTERS.index(first) + LETTERS.index(second)


def fill(pins: Path, table: Path) -> int:
    """Write the table's prefixes; how many there were."""
    with table.open(newline="") as lines, RawMap(pins / "prefixes") as prefixes:
        rows = [row for row in csv.reader(lines) if row and not row[0].startswith("#")]
        for prefix, code in rows:
            prefixes.update(prefix_key(prefix), struct.pack("=I", country_index(code)))
    return len(rows)


def counts(pins: Path) -> dict[str, tuple[int, int]]:
    """Packets and bytes by country, of those that sent any."""
    found = {}
    with RawMap(pins / "countries") as countries:
        for key, (value,) in countries.items():
            (index,), (packets, size) = struct.unpack("=I", key), struct.unpack("=QQ", value)
            if packets:
                found[LETTERS[index // 26] + LETTERS[index % 26]] = packets, size
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pins", type=Path, default=PINS, help="the directory of the hook's maps")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("fill").add_argument("table", type=Path)
    commands.add_parser("show")
    asked = parser.parse_args()
    if asked.command == "fill":
        print(f"{fill(asked.pins, asked.table)} prefixes")
        return
    for country, (packets, size) in sorted(counts(asked.pins).items()):
        print(f"{country}  {packets} packets, {size} bytes")


if __name__ == "__main__":
    main()
