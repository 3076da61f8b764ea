# SPDX-License-Identifier: Apache-2.0
"""Objects that cannot be loaded say why in one line that matters."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shunt.kern.btf import differences
from shunt.kern.objects import Object, decisive_line
from shunt.lb.errors import ShuntError

HERE = Path(__file__).resolve().parent


def test_the_verifiers_decisive_line() -> None:
    with Object(HERE / "refused.bpf.o") as obj, pytest.raises(ShuntError) as caught:
        obj.load()
    assert "refused program refused of refused.bpf.o" in caught.value.what
    assert "mem access 'map_value_or_null'" in caught.value.why
    assert "\n" not in caught.value.why
    assert caught.value.fix


LOGS = {
    "R4 unbounded memory access, use 'var &= const'": """\
0: R1=ctx() R10=fp0
; x @ a.c:1
3: (15) if r0 == 0x0 goto pc+1
R4 unbounded memory access, use 'var &= const'
processed 9 insns (limit 1000000)
""",
    "infinite loop detected at insn 7": """\
infinite loop detected at insn 7
cur state: frame1: R0=1
old state: R0=1
processed 5 insns
""",
    "combined stack size of 3 calls is 592. Too large": """\
combined stack size of 3 calls is 592. Too large
stack depth 8+16
""",
    "": "",
}


@pytest.mark.parametrize(("line", "log"), LOGS.items())
def test_what_a_verifier_log_comes_down_to(line: str, log: str) -> None:
    assert decisive_line(log) == line


def test_an_absent_object_says_how_to_build_it(tmp_path: Path) -> None:
    with pytest.raises(ShuntError, match="cannot open") as caught:
        Object(tmp_path / "none.bpf.o")
    assert "make build" in caught.value.fix


def test_a_file_that_is_no_object(tmp_path: Path) -> None:
    (tmp_path / "text.bpf.o").write_text("not ELF")
    with pytest.raises(ShuntError, match="cannot open"):
        Object(tmp_path / "text.bpf.o")


def test_each_difference_of_a_layout_is_named() -> None:
    ours = np.dtype([("a", "<u4"), ("b", ">u2"), ("pad", "<u2")])
    theirs = np.dtype([("a", "<u8"), ("b", "<u2"), ("c", "<u2")])
    assert differences(ours, ours) == []
    assert differences(ours, theirs) == [
        "size: 12 there, 8 here",
        "field a: uint64 at byte 0 there, uint32 at byte 0 here",
        "field b: uint16 at byte 8 there, >u2 at byte 4 here",
        "field pad: absent there",
        "field c: absent here",
    ]
