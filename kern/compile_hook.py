# SPDX-License-Identifier: Apache-2.0
"""Compiles one C file with bcc, run once in a process of its own by the system's Python.

    /usr/bin/python3 compile_hook.py SOURCE INCLUDE PINS ANSWER

bcc is Debian's, for the system's Python; it holds LLVM and hundreds of megabytes, and ends with
this process. The hook's maps are pinned in the directory PINS. ANSWER gets JSON: the function's
instructions in hexadecimal, and the maps' names by the descriptors that stand in them.
Standard library and bcc only: nothing of Shunt is importable here.
"""

import ctypes
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any


def compile_hook(source: str, include: str, pins: Path) -> dict[str, Any]:
    """Raises: Exception with what bcc says; it has printed the compiler's messages."""
    try:
        bcc = importlib.import_module("bcc")
    except ImportError as e:
        return {"missing": str(e)}
    lib = bcc.lib
    module = bcc.BPF(
        text=Path(source).read_bytes(), cflags=[f"-I{include}", "-Wno-unused-function"]
    )
    instructions = module.dump_func(b"hook")
    lib.bpf_table_name.restype = ctypes.c_char_p
    maps = {}
    for number in range(lib.bpf_num_tables(module.module)):
        name = lib.bpf_table_name(module.module, number).decode()
        fd = lib.bpf_table_fd_id(module.module, number)
        if lib.bpf_obj_pin(fd, os.fsencode(pins / name)):
            raise OSError(f"cannot pin map {name}")
        maps[fd] = name
    return {"instructions": instructions.hex(), "maps": maps}


if __name__ == "__main__":
    Path(sys.argv[4]).write_text(
        json.dumps(compile_hook(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
    )
