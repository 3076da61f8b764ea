# SPDX-License-Identifier: Apache-2.0
"""Every program of the repository is accepted by the kernel this runs on."""

from pathlib import Path

import pytest

from shunt.kern.objects import Object
from shunt.lb.errors import ShuntError

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path.relative_to(ROOT)
    for folder in ("xdp", "tc", "sockops", "perf", "tests")
    for path in (ROOT / folder).rglob("*.bpf.c")
    # See test_objects.py and test_hooks.py: one is refused, a hook is half a program.
    if path.name != "refused.bpf.c" and not path.name.startswith("hook")
)


def test_there_are_programs() -> None:
    assert Path("xdp/lb.bpf.c") in SOURCES
    assert Path("xdp/decap.bpf.c") in SOURCES


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_the_kernel_takes_it(source: Path) -> None:
    with Object(ROOT / source.with_suffix(".o")) as program:
        program.load()


def test_that_a_broken_object_is_refused(tmp_path: Path) -> None:
    whole = (ROOT / "xdp/decap.bpf.o").read_bytes()
    broken = tmp_path / "decap.bpf.o"
    # 0xff in place of the first instruction of the first program.
    start = whole.index(b"\x7fELF") + 64
    broken.write_bytes(whole[:start] + b"\xff" * 8 + whole[start + 8 :])
    with pytest.raises(ShuntError), Object(broken) as program:
        program.load()
