# SPDX-License-Identifier: Apache-2.0
"""This process's own memory: large tables that stay mostly empty, and giving back what was used."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


def sparse(elements: int, dtype: DTypeLike) -> NDArray[Any]:
    """Zeros that take memory by the page, and only where something was written.

    NumPy's own zeros ask for huge pages: then one element written here and there takes 2 MB each.
    """
    size = elements * np.dtype(dtype).itemsize
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype, elements)


@functools.cache
def physical_bytes() -> int:
    """This machine's memory, as it was when it was asked for first."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def trim() -> None:
    """Give what was freed back to the kernel; the C library keeps it otherwise."""
    ctypes.CDLL(None).malloc_trim(0)
