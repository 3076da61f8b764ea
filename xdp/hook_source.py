# SPDX-License-Identifier: Apache-2.0
"""A user's hook, from its file to a loaded program that may answer and do nothing else.

A hook is one function that gets a copy of the packet (struct hook_view) and no more: the program
around it is ours, linked to an object file or put around bcc's instructions. So the kernel's
verifier itself keeps the hook from the packet; what is left to check are the helpers it calls.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from shunt.kern import program_array
from shunt.kern.maps import Map
from shunt.kern.objects import Object, open_pin, pin
from shunt.kern.program_array import around, link, load_xdp, with_maps
from shunt.lb.errors import ShuntError

HERE = Path(__file__).resolve().parent  # shunt_hook.h and hook.bpf.o
COMPILER = Path(program_array.__file__).resolve().parent / "compile_hook.py"
SYSTEM_PYTHON = Path("/usr/bin/python3")
COMPILE_TIMEOUT_S = 120
SHARED = ("hooks", "hook_view")  # maps of the balancer's that a hook's program uses


class Position(StrEnum):
    """Where in a packet's way a hook stands."""

    PRE_LB = "pre-lb"
    POST_LB = "post-lb"

    @property
    def slot(self) -> str:
        """The member of enum hook_slot; what follows stands in the next slot."""
        return self.name

    @property
    def program(self) -> str:
        return "shunt_hook_pre" if self is Position.PRE_LB else "shunt_hook_post"


# Helpers that read and write the hook's own maps, tell the time or compute (linux/bpf.h, enum
# bpf_func_id). Any other would change or send packets, or look into the kernel.
ALLOWED = frozenset((
    1, 2, 3,             # map_lookup_elem, map_update_elem, map_delete_elem
    5, 118, 125, 160, 208,  # ktime_get_ns, jiffies64, ktime_get_boot_ns, _coarse_ns, _tai_ns
    6, 177,              # trace_printk, trace_vprintk
    7, 8,                # get_prandom_u32, get_smp_processor_id
    28,                  # csum_diff
    87, 88, 89,          # map_push_elem, map_pop_elem, map_peek_elem
    93, 94,              # spin_lock, spin_unlock
    105, 106, 165, 182,  # strtol, strtoul, snprintf, strncmp
    130, 131, 132, 133, 134,  # ringbuf_output, _reserve, _submit, _discard, _query
    164, 181, 195,       # for_each_map_elem, loop, map_lookup_percpu_elem
))  # fmt: skip
TAIL_CALL = 12
# Those that somebody may try.
NAMES = {
    4: "bpf_probe_read", 12: "bpf_tail_call", 23: "bpf_redirect", 25: "bpf_perf_event_output",
    44: "bpf_xdp_adjust_head", 51: "bpf_redirect_map", 54: "bpf_xdp_adjust_meta",
    65: "bpf_xdp_adjust_tail", 69: "bpf_fib_lookup", 112: "bpf_probe_read_user",
    113: "bpf_probe_read_kernel", 189: "bpf_xdp_load_bytes", 190: "bpf_xdp_store_bytes",
}  # fmt: skip
_JUMP_CLASSES, _CALL = (0x05, 0x06), 0x80
_FROM_HELPER, _FROM_FUNCTION = 0, 1


def forbidden(instructions: bytes, tail_calls: int = 0) -> list[str]:
    """What these instructions call and may not; `tail_calls` are of the program around."""
    found = []
    for code, registers, _offset, value in struct.iter_unpack("<BBhi", instructions):
        if code & 0x07 not in _JUMP_CLASSES or code & 0xF0 != _CALL:
            continue
        source = registers >> 4
        if source == _FROM_FUNCTION or (source == _FROM_HELPER and value in ALLOWED):
            continue
        if source == _FROM_HELPER and value == TAIL_CALL and tail_calls:
            tail_calls -= 1
            continue
        name = (
            NAMES.get(value, f"helper {value}") if source == _FROM_HELPER else "a kernel function"
        )
        found.append(name)
    return sorted(set(found))


def check_calls(path: Path, instructions: bytes, tail_calls: int = 0) -> None:
    """Raises: ShuntError if the hook calls what it may not."""
    if wrong := forbidden(instructions, tail_calls):
        raise ShuntError(
            f"{path.name} calls {', '.join(wrong)}",
            "a hook may pass, drop or mark a packet, and use its own maps and the clock",
            "take the call out; docs/hooks.md lists the helpers that are allowed",
        )


@dataclass
class Loaded:
    """A program in the kernel, and the pins of its own maps. The descriptor is its holder's."""

    fd: int
    maps: list[str] = field(default_factory=list)


@contextlib.contextmanager
def load(
    path: Path, position: Position, shared: Mapping[str, Map], flags: int, pins: Path
) -> Iterator[Loaded]:
    """The hook in `path`, loaded until the context ends; its own maps are pinned in `pins`.

    Shape:  `shared` are the balancer's maps of SHARED; `flags` how its programs were loaded.
    Raises: ShuntError if the file is no hook, calls what it may not, or cannot be compiled.
    """
    if not path.is_file():
        raise ShuntError(f"there is no file {path}", "a hook is a .c or a .o file", "name another")
    if path.suffix == ".o":
        with _linked(path, position, shared, flags, pins) as loaded:
            yield loaded
    elif path.suffix == ".c":
        with _compiled(path, position, shared, flags, pins) as loaded:
            yield loaded
    else:
        raise ShuntError(
            f"{path.name} is no hook",
            "its name ends neither in .c (compiled by bcc) nor in .o (compiled by clang)",
            "rename it, or compile it: " + clang_command(path),
        )


def clang_command(path: Path) -> str:
    """How to make an object of a hook's source."""
    system = f"/usr/include/{platform.machine()}-linux-gnu"
    return f"clang -O2 -g -target bpf -I {HERE} -I {system} -c {path}"


@contextlib.contextmanager
def _linked(
    path: Path, position: Position, shared: Mapping[str, Map], flags: int, pins: Path
) -> Iterator[Loaded]:
    with tempfile.TemporaryDirectory(prefix="shunt-hook-") as directory:
        whole = Path(directory) / f"{path.stem}.linked.o"
        try:
            link(whole, (HERE / "hook.bpf.o", path))
            obj = Object(whole)
        except ShuntError as e:
            raise ShuntError(
                f"{path.name} is no hook",
                e.why,
                f"write a function `int hook(struct hook_view *view)` and build it: "
                f"{clang_command(path.with_suffix('.c'))}",
            ) from e
        with obj:
            obj.keep_programs(position.program)
            obj.set_flags(position.program, flags)
            for name in SHARED:
                obj.reuse(name, shared[name].fd, name)
            try:
                obj.load()
            except ShuntError as e:
                raise ShuntError(
                    f"the kernel refused {path.name}", e.why, "correct the hook; see docs/hooks.md"
                ) from e
            check_calls(path, obj.instructions(position.program), tail_calls=1)
            own = [name for name in obj.map_names() if name not in SHARED]
            for name in own:
                pin(obj.maps[name].fd, pins / name)
            yield Loaded(obj.programs[position.program].fd, own)


@contextlib.contextmanager
def _compiled(
    path: Path, position: Position, shared: Mapping[str, Map], flags: int, pins: Path
) -> Iterator[Loaded]:
    function, maps = compile_with_bcc(path, pins)
    check_calls(path, function)
    array, view = shared["hooks"], shared["hook_view"]
    with contextlib.ExitStack() as stack:
        own = {}
        for there, name in maps.items():
            own[there] = open_pin(pins / name)
            stack.callback(os.close, own[there])
        with Object(HERE / "lb.bpf.o") as balancer:
            slot = int(balancer.btf.enum("hook_slot", "HOOK_")[position.slot]) + 1
        fields = view.spec.value.fields
        assert fields is not None
        body = with_maps(function, own)
        program = around(body, view.fd, array.fd, fields["result"][1], slot)
        fd = load_xdp(position.program, program, flags)
        stack.callback(os.close, fd)
        yield Loaded(fd, sorted(maps.values()))


def compile_with_bcc(
    path: Path, pins: Path, python: Path = SYSTEM_PYTHON
) -> tuple[bytes, dict[int, str]]:
    """The function `hook` as instructions, and its maps, pinned in `pins`, by descriptor there.

    Raises: ShuntError if bcc or the kernel's headers are missing, or the source is wrong.
    """
    with tempfile.TemporaryDirectory(prefix="shunt-hook-") as directory:
        answer = Path(directory) / "answer.json"
        argv = [str(python), "-I", str(COMPILER), str(path), str(HERE)]
        try:
            done = subprocess.run(
                [*argv, str(pins), str(answer)],
                capture_output=True, text=True, errors="replace", check=False,
                timeout=COMPILE_TIMEOUT_S,
            )  # fmt: skip
        except FileNotFoundError as e:
            raise _without_bcc(path, f"there is no {python}") from e
        except subprocess.TimeoutExpired as e:
            raise ShuntError(
                f"bcc does not come to an end with {path.name}",
                f"it has taken {COMPILE_TIMEOUT_S} s",
                "compile it with clang: " + clang_command(path),
            ) from e
        found = json.loads(answer.read_text()) if answer.exists() else None
    if found is None:
        raise compile_error(path, done.stdout + done.stderr)
    if "missing" in found:
        raise _without_bcc(path, f"{python}: {found['missing']}")
    return bytes.fromhex(found["instructions"]), {int(k): v for k, v in found["maps"].items()}


def _without_bcc(path: Path, why: str) -> ShuntError:
    return ShuntError(
        f"{path.name} cannot be compiled: bcc is not installed",
        why,
        f"apt-get install python3-bpfcc linux-headers-{platform.release()}; or compile it where"
        f" there is clang, and load the .o: {clang_command(path)}",
    )


_HEADERS = re.compile(r"Unable to find kernel headers|kconfig\.h' file not found")


def compile_error(path: Path, said: str) -> ShuntError:
    """What bcc's output comes down to."""
    release = platform.release()
    if _HEADERS.search(said):
        return ShuntError(
            f"{path.name} cannot be compiled: the kernel's headers are not installed",
            f"bcc needs those of the kernel that runs, {release}",
            f"apt-get install linux-headers-{release}; or compile it where there is clang, and"
            f" load the .o: {clang_command(path)}",
        )
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    return ShuntError(
        f"bcc cannot compile {path.name}",
        "; ".join((errors or lines[-1:])[:3]).replace("/virtual/main.c", path.name)
        or "it says nothing",
        "correct the source; docs/hooks.md has an example",
    )
