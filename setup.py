# SPDX-License-Identifier: Apache-2.0
"""The C extension; everything else about the package stands in pyproject.toml."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "shunt.lb._maglev",
            ["lb/_maglev.c"],
            depends=["lb/maglev.h"],
            # The stable interface of 3.11, the first with buffers in it: one build serves every
            # later Python.
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
            extra_compile_args=["-O2", "-Wall", "-Wextra", "-Werror"],
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
