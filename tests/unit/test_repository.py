# SPDX-License-Identifier: Apache-2.0
"""The repository's habits, read from the files: which way imports point, licences, sizes."""

import ast
import os
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Imports point down, or stay on a level. tests/ and perf/ stand above all of these.
LEVELS = (
    {"lab"},
    {"cli"},
    {"agent"},
    {"lb", "policy", "ipam", "xdp", "tc", "sockops"},
    {"bpf", "kern"},
)
LEVEL = {folder: level for level, folders in enumerate(LEVELS) for folder in folders}
# The form of an error belongs to no level.
EVERYONES = {"shunt.lb.errors"}

# Modules that make system calls of the kinds only kern/ (and the lab) may make.
KERNEL_FACES = {"bcc", "ctypes", "mmap", "pyroute2"}
# What lb/ may import: nothing here reads a clock, a file, a socket or a random number.
PURE = {
    *("__future__", "abc", "array", "bisect", "collections", "contextlib", "copy", "dataclasses"),
    *("enum", "fractions", "functools", "hashlib", "heapq", "ipaddress", "itertools", "math"),
    *("operator", "re", "statistics", "struct", "types", "typing", "netaddr", "numpy", "shunt"),
    "msgspec",
}

APACHE = "# SPDX-License-Identifier: Apache-2.0"
APACHE_C = "/* SPDX-License-Identifier: Apache-2.0 */"
BPF_C = "/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */"
BPF_FOLDERS = {"bpf", "xdp", "tc", "sockops"}
# Prose, data, and formats without comments.
NO_HEADER = {".md", ".json", ".svg", ".png", ".pcap", ".csv"}

LIMITS = {".py": 400, ".c": 300, ".h": 300}
FUNCTION_LIMIT = 60
# A longer file or function is a question to answer, not a crime. The answers:
LONGER: Mapping[str, str] = {
    "bpf/abi.h": "one fact, one place: every key, value and reason of the data path",
}


def files() -> list[str]:
    """Paths of the repository's own files, relative to its root."""
    found = []
    for folder, folders, names in os.walk(ROOT):
        inside = Path(folder).relative_to(ROOT)
        folders[:] = [
            name
            for name in folders
            if name not in {"build", "__pycache__", "LICENSES"}
            and (name == ".ci" or not name.startswith("."))
            and not name.endswith(".egg-info")
        ]
        found += [
            str(inside / name)
            for name in names
            if name not in {"LICENSE", ".git"} and not name.endswith((".o", ".so", ".pyc"))
        ]
    return sorted(found)


FILES = files()
MODULES = [name for name in FILES if name.endswith(".py") and Path(name).parts[0] in LEVEL]
PYTHON = [name for name in FILES if name.endswith(".py")]


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything `source`, a module of `package`, imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            # `from shunt import kern` names a folder by what it imports.
            names = [alias.name for alias in node.names]
            yield from ((node.lineno, f"{base}.{name}") for name in names)


def package_of(name: str) -> str:
    return ".".join(("shunt", *Path(name).parts[:-1]))


def broken_imports(name: str, source: str) -> list[str]:
    """What the module at `name` imports and may not."""
    folder = Path(name).parts[0]
    wrong = []
    for line, target in imports(source, package_of(name)):
        parts = target.split(".")
        where = f"{name}:{line}: {target}"
        if parts[0] in LEVEL:
            wrong.append(f"{where}: folders are imported as shunt.{parts[0]}")
        elif parts[0] == "shunt" and parts[1] not in LEVEL:
            wrong.append(f"{where}: not a folder this test knows; give it a level")
        elif parts[0] == "shunt":
            if folder == "lb" and parts[1] != "lb":
                wrong.append(f"{where}: lb/ is pure, and {parts[1]} is not")
            elif LEVEL[parts[1]] < LEVEL[folder] and ".".join(parts[:3]) not in EVERYONES:
                wrong.append(f"{where}: an arrow pointing back, {folder} to {parts[1]}")
        elif parts[0] in KERNEL_FACES and folder not in {"kern", "lab"}:
            wrong.append(f"{where}: only kern/ talks to the kernel")
        elif folder == "lb" and (parts[0] not in PURE or parts[1:2] == ["random"]):
            wrong.append(f"{where}: lb/ is pure")
    return wrong


def test_imports_point_one_way() -> None:
    assert MODULES
    assert [line for name in MODULES for line in broken_imports(name, text_of(name))] == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("agent/plan.py", "import shunt.cli.main"),
        ("agent/sources/file.py", "def f():\n    from shunt.cli import main"),
        ("lb/compile.py", "from shunt.agent.plan import plan"),
        ("lb/compile.py", "from ..agent import plan"),
        ("lb/compile.py", "from shunt import agent"),
        ("lb/compile.py", "from shunt.kern import maps"),
        ("lb/compile.py", "import time"),
        ("lb/compile.py", "from random import Random"),
        ("lb/compile.py", "import numpy.random"),
        ("kern/maps.py", "from shunt.lb.model import Service"),
        ("kern/maps.py", "from shunt.xdp import attach"),
        ("cli/main.py", "from shunt.lab import netns"),
        ("cli/main.py", "import kern.maps"),
        ("agent/apply.py", "from pyroute2 import IPRoute"),
        ("xdp/attach.py", "import ctypes"),
        ("agent/apply.py", "from shunt.surprise import box"),
    ],
)
def test_that_a_broken_import_is_seen(name: str, source: str) -> None:
    assert len(broken_imports(name, source)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("cli/main.py", "from shunt.agent import plan"),
        ("agent/apply.py", "import json, shunt.kern.maps"),
        ("lb/compile.py", "from .maglev import fill\nimport numpy as np"),
        ("kern/maps.py", "import ctypes\nfrom shunt.lb.errors import ShuntError"),
        ("lab/demo.py", "from shunt.cli import main\nimport pyroute2"),
    ],
)
def test_that_a_good_import_passes(name: str, source: str) -> None:
    assert broken_imports(name, source) == []


def test_tests_and_benchmarks_import_folders_below_shunt() -> None:
    """`import lb` would load a second copy of a module that `shunt.lb` has loaded."""
    above = [name for name in PYTHON if name.startswith(("tests/", "perf/"))]
    wrong = [
        f"{name}:{line}: {target}"
        for name in above
        for line, target in imports(text_of(name), "")
        if target.split(".")[0] in LEVEL
    ]
    assert wrong == []


def test_run_time_imports_are_run_time_dependencies() -> None:
    modules = {"pyyaml": "yaml", "prometheus-client": "prometheus_client", "dnspython": "dns"}
    run = [line.split("==")[0].lower() for line in pins("run.txt")]
    known = {modules.get(name, name) for name in run} | set(sys.stdlib_module_names) | {"shunt"}
    used = {
        target.split(".")[0]: name
        for name in MODULES
        for _, target in imports(text_of(name), package_of(name))
    }
    assert {module: name for module, name in used.items() if module not in known} == {}


def pins(name: str) -> list[str]:
    lines = text_of(f"requirements/{name}").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_every_requirement_is_pinned_and_locked() -> None:
    wanted = pins("run.txt") + pins("dev.txt")
    assert [line for line in wanted if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    locked = {line.lower().replace("_", "-") for line in pins("lock.txt")}
    assert [line for line in wanted if line.lower().replace("_", "-") not in locked] == []


def test_every_folder_with_python_is_a_package() -> None:
    setuptools = PROJECT["tool"]["setuptools"]
    folders = {name: f"shunt.{name.replace('/', '.')}" for name in packages()}
    assert setuptools["package-dir"] == {dotted: name for name, dotted in folders.items()}
    assert setuptools["packages"] == sorted(folders.values())


def packages() -> list[str]:
    inits = (Path(name) for name in FILES if name.endswith("/__init__.py"))
    return [str(path.parent) for path in inits if path.parts[0] in LEVEL]


def header(name: str) -> str | None:
    """The licence line a file begins with, after a `#!`; None where the format has no place."""
    path = Path(name)
    if path.suffix in NO_HEADER:
        return None
    if path.suffix in {".go", ".java"}:
        return f"//{APACHE[1:]}"
    if path.suffix in {".c", ".h"}:
        bpf = path.parts[0] in BPF_FOLDERS or path.name.endswith((".bpf.c", ".bpf.h"))
        return BPF_C if bpf else APACHE_C
    if path.suffix in {".go", ".java"}:
        return APACHE.replace("#", "//")
    return APACHE


def without_licence(name: str, text: str) -> bool:
    lines = text.splitlines()
    first = lines[1:2] if text.startswith("#!") else lines[:1]
    return first != [header(name)]


def test_every_file_says_its_licence() -> None:
    headed = [name for name in FILES if header(name) is not None]
    assert [name for name in headed if without_licence(name, text_of(name))] == []


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lb/new.py", '"""No licence."""\n'),
        ("lb/empty.py", ""),
        ("lb/late.py", f"import math\n{APACHE}\n"),
        ("xdp/new.bpf.c", f"{APACHE_C}\n"),
        ("lb/new.c", f"{BPF_C}\n"),
        ("tools/new", "#!/bin/bash\nset -e\n"),
    ],
)
def test_that_a_missing_licence_is_seen(name: str, text: str) -> None:
    assert without_licence(name, text)


def too_long(name: str, text: str) -> list[str]:
    lines = len(text.splitlines())
    limit = LIMITS.get(Path(name).suffix, sys.maxsize)
    long = [name] if lines > limit else []
    if name.endswith(".py"):
        long += [
            f"{name}:{node.name}"
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            and (node.end_lineno or 0) - node.lineno >= FUNCTION_LIMIT
        ]
    return long


def test_files_and_functions_stay_short_or_say_why() -> None:
    long = {found for name in FILES for found in too_long(name, text_of_any(name))}
    assert long == set(LONGER)


def text_of_any(name: str) -> str:
    return text_of(name) if Path(name).suffix in LIMITS else ""


def test_that_length_is_seen() -> None:
    body = "\n".join(f"    x = {n}" for n in range(FUNCTION_LIMIT))
    assert too_long("lb/new.py", f"def f():\n{body}\n") == ["lb/new.py:f"]
    assert too_long("lb/new.py", "x = 1\n" * 401) == ["lb/new.py"]
    assert too_long("xdp/new.bpf.c", "int x;\n" * 301) == ["xdp/new.bpf.c"]
    assert too_long("docs/MAP.md", "x\n" * 1000) == []
