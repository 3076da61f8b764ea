# SPDX-License-Identifier: Apache-2.0
"""What a hook's instructions may call, how bcc's are put together, and what its errors say."""

from __future__ import annotations

import runpy
import struct
from pathlib import Path

import pytest

from shunt.kern.program_array import around, with_maps
from shunt.kern.raw_map import plain
from shunt.xdp.hook_source import HERE, Position, clang_command, compile_error, forbidden

COUNTRY = Path(__file__).resolve().parents[2] / "examples/country.py"
CALL, CALL_FUNCTION, CALL_KERNEL = 0, 1, 2  # source registers of a call


def call(number: int, kind: int = CALL) -> bytes:
    return struct.pack("<BBhi", 0x85, kind << 4, 0, number)


def test_helpers_that_only_compute_are_allowed() -> None:
    assert forbidden(b"".join(map(call, (1, 2, 3, 5, 7, 8, 130)))) == []
    assert forbidden(call(-5, CALL_FUNCTION)) == []
    jump = struct.pack("<BBhi", 0x05, 0, 23, 23)  # no call, whatever its numbers
    assert forbidden(jump) == []


@pytest.mark.parametrize(
    ("instructions", "names"),
    [
        (call(23), ["bpf_redirect"]),
        (call(51) + call(44), ["bpf_redirect_map", "bpf_xdp_adjust_head"]),
        (call(9999), ["helper 9999"]),
        (call(1, CALL_KERNEL), ["a kernel function"]),
        (call(12), ["bpf_tail_call"]),
    ],
)
def test_any_other_call_is_named(instructions: bytes, names: list[str]) -> None:
    assert forbidden(instructions) == names


def test_one_tail_call_is_that_of_the_program_around() -> None:
    assert forbidden(call(12), tail_calls=1) == []
    assert forbidden(call(12) * 2, tail_calls=1) == ["bpf_tail_call"]
    # A 64-bit constant's second half can look like anything.
    assert forbidden(around(call(1), 3, 4, 72, 2), tail_calls=1) == []


def test_descriptors_are_replaced_and_nothing_else() -> None:
    load = struct.pack("<BBhi", 0x18, 1 | 1 << 4, 0, 5) + bytes(8)
    constant = struct.pack("<BBhi", 0x18, 1, 0, 5) + bytes(8)
    expected = struct.pack("<BBhi", 0x18, 1 | 1 << 4, 0, 9) + bytes(8)
    assert with_maps(load + constant, {5: 9}) == expected + constant


def test_the_call_around_reaches_the_function() -> None:
    marker = call(7)
    program = around(marker, 3, 4, 72, 2)
    instructions = list(struct.iter_unpack("<BBhi", program))
    (at,) = [i for i, (code, regs, _, _) in enumerate(instructions) if (code, regs) == (0x85, 0x10)]
    target = at + 1 + instructions[at][3]
    assert program[8 * target :] == marker
    (jump,) = [i for i, (code, *_) in enumerate(instructions) if code == 0x15]
    after = instructions[jump + 1 + instructions[jump][2]]
    assert after[:2] == (0xBF, 1 | 6 << 4)  # r1 = ctx, as for the tail call


@pytest.mark.parametrize(
    "said",
    [
        "modprobe: FATAL: Module kheaders not found\nUnable to find kernel headers. Try rebuilding",
        "<built-in>:1:10: fatal error: './include/linux/kconfig.h' file not found\n",
    ],
)
def test_without_headers_the_error_says_what_to_install(said: str) -> None:
    error = compile_error(Path("a.c"), said)
    assert error.what == "a.c cannot be compiled: the kernel's headers are not installed"
    assert "apt-get install linux-headers-" in error.fix
    assert clang_command(Path("a.c")) in error.fix


def test_what_bccs_output_comes_down_to() -> None:
    said = "/virtual/main.c:9:2: error: unknown type name 'it'\n  it x;\n  ^\n1 error generated.\n"
    error = compile_error(Path("a.c"), said + "Traceback ...\nException: Failed to compile")
    assert (error.what, error.why) == (
        "bcc cannot compile a.c",
        "a.c:9:2: error: unknown type name 'it'",
    )
    assert compile_error(Path("a.c"), "").why == "it says nothing"
    assert compile_error(Path("a.c"), "x\nException: Unknown program hook\n").why.endswith("hook")


def test_the_programs_around_are_of_the_positions() -> None:
    text = (HERE / "hook.bpf.c").read_text()
    for position in Position:
        assert f"int {position.program}(" in text
        assert f"HOOK_{position.slot} + 1" in text


def test_bytes_without_a_type_are_shown_in_hexadecimal() -> None:
    assert plain(b"\x01\xff", None) == "01ff"


def test_the_examples_keys() -> None:
    example = runpy.run_path(str(COUNTRY))
    key = example["prefix_key"]
    assert key("192.0.2.0/24") == struct.pack("=I", 120) + bytes(10) + b"\xff\xff\xc0\0\2\0"
    assert key("2001:db8::/32")[:8] == struct.pack("=I", 32) + b"\x20\x01\x0d\xb8"
    assert [example["country_index"](code) for code in ("AA", "AB", "ZZ")] == [0, 1, 675]
