# SPDX-License-Identifier: Apache-2.0
"""Maglev tables: which backend owns which slot, decided by the backends alone.

Equal sets of (identity, weight) give equal tables on every node, whatever the order of arrival
and the history. Each backend prefers the slots in an order of its own, drawn from the hash of
its identity; backends take turns, in proportion to their weights, until no slot is free.

Source: Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016,
section 3.4; weights as in its last paragraph. Three things differ from the paper:

- A turn is one *try*: who finds its next preferred slot taken waits for its next turn, while
  in the paper it goes on until it finds a free one (`rule="claim"` here). So a slot goes to the
  backend that prefers it most, not to one that was pushed there early, and fewer slots change
  hands when a backend goes: with 10 backends and 1,024 slots 1.6 % of the slots change beyond
  those that must, against 2.5 % (the mean of 300 sets; perf/maglev_paper.py measures this).
- A backend stops at its quota: slots in proportion to weight, rounded by largest remainder. Turns
  that are tries would not balance by themselves, and the paper's balance only equal weights.
- Tables of 2^k slots, which a hash's top bits index without a division. The step between
  preferences is odd, and grows by a multiple of four of the backend's own after each turn:
  with a constant step, two backends whose steps happen to be alike chase each other through the
  table, and of 300 sets of 3 the worst had 31 % of the slots change beyond those that must,
  against 4 %. A table of a prime number of slots has the paper's constant step.
"""

from collections.abc import Sequence
from hashlib import blake2b
from operator import index
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from shunt.lb import _maglev
from shunt.lb.errors import ShuntError

WEIGHT_MAX = 2**32 - 1
SLOTS_MAX = 2**30
HASH_BYTES = 16
_HASH_KEY = b"shunt maglev 1"  # changing it, like anything in this file, changes every table


class TableError(ShuntError, ValueError):
    """A table that can't be filled; nothing was written."""


def log2_slots(backends: int, per_backend: int = 100) -> int:
    """Size a table: the smallest power of two with `per_backend` slots for each backend.

    Give it the *configured* backends, not the healthy ones: a table that changes its size
    changes most of its owners.

    Units:  the result is an exponent; the table has `1 << result` slots.
    Raises: TableError if backends is negative or per_backend not positive.
    """
    if backends < 0 or per_backend < 1:
        raise TableError(
            f"no table for {backends} backends at {per_backend} slots each",
            "a backend needs at least one slot",
            "give 0 or more backends, and 1 or more slots a backend",
        )
    return max(0, backends * per_backend - 1).bit_length()


def hash_identity(identity: str | bytes) -> bytes:
    """Hash what names a backend, for `fill_hashed`; worth keeping beside the backend.

    Keyed BLAKE2b of the bytes (a str in UTF-8), the same on every machine and in every version.
    The first 8 bytes, little-endian, give the first preference; the others the steps.

    Units:  16 bytes.
    """
    data = identity.encode() if isinstance(identity, str) else identity
    return blake2b(data, digest_size=HASH_BYTES, key=_HASH_KEY).digest()


def hash_array(hashes: Sequence[bytes]) -> NDArray[np.uint64]:
    """Turn results of `hash_identity` into what `fill_hashed` takes.

    Shape:  (len(hashes), 2).
    """
    words = np.frombuffer(b"".join(hashes), dtype="<u8").reshape(len(hashes), 2)
    return words.astype(np.uint64, copy=False)


def fill(
    identities: Sequence[str | bytes],
    weights: Sequence[int],
    slots: int,
    *,
    rule: Literal["try", "claim"] = "try",
) -> NDArray[np.uint32]:
    """Fill a table: the owner of each slot, as an index into `identities`.

    A backend gets `slots * weight / sum(weights)` slots, rounded up or down by largest
    remainder (ties by hash). One whose share is below one slot gets one, and the others share what
    remains. With equal weights and 100 slots a backend that is a balance within 1 %.

    Shape:  `slots` indexes; `identities` and `weights` are equally long.
    Units:  slots are entries: a power of two up to 2**30, or a prime below. Weights are shares,
            1 to 2**32 - 1; only their ratios matter.
    Raises: TableError (a ValueError) for another number of slots, more backends than slots, none
            at all, a weight out of range, or an identity given twice. TypeError for a weight
            that is no integer.
    Source: Maglev, section 3.4. rule="claim" is the paper's turn; see the top of this module.
    """
    if len(identities) != len(weights):
        raise TableError(
            f"{len(identities)} backends with {len(weights)} weights",
            "every backend has a weight, 1 if nothing else is wanted",
            "give one weight for each identity, in the same order",
        )
    for identity, weight in zip(identities, weights, strict=True):
        if not 1 <= index(weight) <= WEIGHT_MAX:
            raise TableError(
                f"backend {_show(identity)} has weight {weight}",
                f"a weight is a share of the slots, from 1 to {WEIGHT_MAX}",
                "give a weight in that range, or leave the backend out",
            )
    seen: dict[bytes, str | bytes] = {}
    for identity in identities:
        if (key := hash_identity(identity)) in seen:
            raise TableError(
                f"backend {_show(identity)} is there twice",
                "an identity may stand once in a table",
                "leave one out, and give the other the sum of the weights",
            )
        seen[key] = identity
    if not 1 <= slots <= SLOTS_MAX:  # of other numbers the C side says so
        raise TableError(
            f"a table can't have {slots} slots",
            f"a table has from 1 to {SLOTS_MAX} slots",
            "take 1 << log2_slots(len(backends))",
        )
    out = np.empty(slots, dtype=np.uint32)
    _fill(hash_array(list(seen)), np.asarray(weights, dtype=np.uint32), out, rule == "claim")
    return out


def fill_hashed(
    hashes: NDArray[np.uint64], weights: NDArray[np.uint32], out: NDArray[np.uint32]
) -> None:
    """Fill a table as `fill` does, for callers with many: hashes kept, arrays in place.

    The slots are `out`'s, which may be a part of a larger array. Other threads run meanwhile.

    Shape:  hashes (n, 2), from `hash_array`; weights (n,); out (slots,). All contiguous.
    Raises: TableError as `fill` does, naming a backend by its index; TypeError for
            arrays of another type or shape. Nothing is written.
    """
    _fill(hashes, weights, out, claim=False)


def _fill(
    hashes: NDArray[np.uint64], weights: NDArray[np.uint32], out: NDArray[np.uint32], claim: bool
) -> None:
    try:
        _maglev.fill(hashes, weights, out, claim)
    except ValueError as error:
        if len(error.args) != 3:  # NumPy's own: an array that is not contiguous, or read-only
            raise
        raise TableError(*error.args) from None


def _show(identity: str | bytes) -> str:
    return identity if isinstance(identity, str) else repr(identity)
