# SPDX-License-Identifier: Apache-2.0
"""The life of a slot: settled, moving, lingering, and settled again. Pure, over NumPy words.

A slot is one 64-bit word: cur in bits 0..23, prev in bits 24..47, state in bits 48..49
(bpf/abi.h; a test compares these numbers with the program's). `words` below are such
words of one service's region; `changed` holds, slot by slot, when the slot last changed owner
(moving) or stopped waiting for unremembered flows (lingering), in ns of the monotonic clock.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Times = NDArray[np.uint64]
Mask = NDArray[np.bool_]

BACKEND_BITS = 24
STATE_SHIFT = 48
_BACKEND = np.uint64((1 << BACKEND_BITS) - 1)


class State(IntEnum):
    """enum slot_state of bpf/abi.h."""

    SETTLED = 0
    MOVING = 1
    LINGERING = 2


def cur(words: Words) -> NDArray[np.uint64]:
    """The present owners; 0 is none."""
    return words & _BACKEND


def prev(words: Words) -> NDArray[np.uint64]:
    """The owners from before the first change."""
    return words >> np.uint64(BACKEND_BITS) & _BACKEND


def state(words: Words) -> NDArray[np.uint64]:
    """States, as numbers of `State`."""
    return words >> np.uint64(STATE_SHIFT)


def pack(
    owners: NDArray[np.integer], before: NDArray[np.integer], states: NDArray[np.integer] | int
) -> Words:
    """Words from their parts."""
    words: Words = (
        owners.astype(np.uint64)
        | before.astype(np.uint64) << np.uint64(BACKEND_BITS)
        | np.asarray(states, np.uint64) << np.uint64(STATE_SHIFT)
    )
    return words


def settled(owners: NDArray[np.integer]) -> Words:
    """Words of a region whose slots have never moved."""
    return pack(owners, owners, State.SETTLED)


def retable(words: Words, owners: NDArray[np.integer]) -> tuple[Words, Mask]:
    """New owners: what differs moves, and keeps as `prev` the owner from before its first change.

    Shape: (new words, which of them changed). The changed ones' window begins now.
    """
    moved = cur(words) != owners
    before = np.where(state(words) == State.MOVING, prev(words), cur(words))
    return np.where(moved, pack(owners, before, State.MOVING), words), moved


def resize(values: NDArray[np.uint64], log2: int) -> NDArray[np.uint64]:
    """Words, or times, of a region of 2**log2 from one of another size.

    Growing copies each slot, state included, into its children; shrinking takes one of each
    group, so ask `may_shrink` first.
    """
    have = len(values).bit_length() - 1
    if log2 >= have:
        return np.repeat(values, 1 << (log2 - have))
    return values[:: 1 << (have - log2)].copy()


def may_shrink(words: Words, log2: int) -> bool:
    """Whether nothing moves or lingers here, and each group of 2**log2 slots is alike."""
    groups = words.reshape(-1, 1 << log2)
    return not state(words).any() and bool((groups == groups[:, :1]).all())


def quiet(words: Words, changed: Times, now_ns: int, window_ns: int, known: Mask) -> Mask:
    """Which moving slots stop waiting: a whole window without a change, or `prev` is gone.

    Shape: `known` is indexed by backend id.
    """
    waited = now_ns - changed.astype(np.int64) > window_ns
    orphaned = ~known[prev(words).astype(np.intp)]
    mask: Mask = (state(words) == State.MOVING) & (waited | orphaned)
    return mask


def linger(words: Words) -> Words:
    """Those words, lingering."""
    return pack(cur(words), cur(words), State.LINGERING)


def free_of_exceptions(words: Words, since: Times, busy: Mask, scan_began_ns: int) -> Mask:
    """Which lingering slots settle: they lingered before the scan began, and it found nothing."""
    mask: Mask = (state(words) == State.LINGERING) & ~busy & (since < np.uint64(scan_began_ns))
    return mask
