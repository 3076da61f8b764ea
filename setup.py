# SPDX-License-Identifier: Apache-2.0
"""The C extensions; everything else about the package stands in pyproject.toml."""

from setuptools import Extension, setup


def extension(name: str, source: str, *depends: str) -> Extension:
    """One module in C."""
    return Extension(
        name,
        [source],
        depends=list(depends),
        include_dirs=["bpf"],
        # The stable interface of 3.11, the first with buffers in it: one build serves every
        # later Python.
        define_macros=[("Py_LIMITED_API", "0x030B0000")],
        py_limited_api=True,
        # Keys are compared as words, so no strict aliasing, as in the BPF programs.
        extra_compile_args=["-O2", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror"],
    )


setup(
    ext_modules=[
        extension("shunt.lb._maglev", "lb/_maglev.c", "lb/maglev.h"),
        extension("shunt.kern._flows", "kern/_flows.c", "bpf/abi.h", "bpf/flow_table.h"),
        extension("shunt.kern._routes", "kern/_routes.c"),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
