# SPDX-License-Identifier: Apache-2.0
"""Pinned maps, opened with what shuntd has under systemd: without CAP_SYS_ADMIN."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shunt.kern.objects import Object, pin
from shunt.lab.topology import remove_tree
from shunt.xdp.attach import OBJECT, fit

# `like` is the layout of the map itself, or that of one whose values have another size.
CODE = """
import sys
from shunt.kern.maps import Map
from shunt.kern.objects import Object, unlike
from shunt.xdp.attach import OBJECT
with Object(OBJECT) as obj:
    want = obj.spec(sys.argv[2])
    print(unlike(want, Map.pinned(sys.argv[1], want).spec))
"""

# The dry program on the maps of a live one, as `shunt explain` has shuntd do it.
DRY = """
from shunt.kern.objects import Object
from shunt.xdp.attach import OBJECT, PROGRAM, fit
from shunt.xdp.dry import DryRun
with Object(OBJECT) as obj:
    obj.keep_programs(PROGRAM)
    fit(obj)
    config = obj.variable(".rodata", "config").copy()
    obj.load()
    with DryRun(config, obj.maps) as dry:
        print(dry.run(bytes(60), 1).steps[-1].kind.name)
"""


@pytest.fixture
def pinned() -> Iterator[Path]:
    directory = Path(f"/sys/fs/bpf/shunt-privileges-{os.getpid()}")
    directory.mkdir()
    try:
        with Object(OBJECT) as obj:
            small = {"services": 64, "slots": 1024, "flows": 64, "nat_fwd": 16, "nat_rev": 16}
            obj.set_entries({name: n for name, n in small.items() if name in obj.map_names()})
            fit(obj)
            obj.load()
            pin(obj.maps["meta"].fd, directory / "meta")
        yield directory / "meta"
    finally:
        remove_tree(directory)


def look(path: Path, name: str, without: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["setpriv", f"--bounding-set=-{without}", sys.executable, "-c", CODE, str(path), name],
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_map_of_the_same_sizes_is_taken_as_the_one_it_should_be(pinned: Path) -> None:
    done = look(pinned, "meta", "sys_admin")
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("without", ["sys_admin", "sys_chroot"])
def test_another_size_is_seen_with_and_without(pinned: Path, without: str) -> None:
    """What differs beyond the size is told only to who may read it."""
    done = look(pinned, "backends", without)
    assert "value size: " in done.stdout
    assert ("field" in done.stdout) == (without == "sys_chroot")


def test_a_packet_is_tried_with_what_shuntd_has_under_systemd() -> None:
    held = "-all,+bpf,+net_admin,+perfmon"
    done = subprocess.run(
        ["setpriv", f"--bounding-set={held}", sys.executable, "-c", DRY],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("VERDICT\n", "")
