# SPDX-License-Identifier: Apache-2.0
"""Maps of another size: what is in one carried into another, while programs go on.

The agent alone writes most maps, so copying them is enough. What programs learn (LEARNING) is
copied twice: before the new program takes over, and what came meanwhile after it has.
"""

from __future__ import annotations

import contextlib

import numpy as np
from numpy.typing import NDArray

from shunt.kern import libbpf
from shunt.kern.flows import FlowTable
from shunt.kern.maps import Map
from shunt.lb.errors import ShuntError
from shunt.lb.frontends import LINE_ENTRIES, WORDS, FrontendTable

COUNTERS = ("svc_stats", "backend_stats", "nat_refused")
LEARNING = ("flows", "nat_rev", "nat_fwd")  # a translation's claim before the translation


def carry(old: Map, new: Map) -> None:
    """Copy everything. Counters begin at zero again.

    Raises: ShuntError if it does not fit. `old` is untouched.
    """
    if old.spec.name == "services":  # where an entry stands depends on the size
        table = FrontendTable(service_words(new))
        for frontend, svc in FrontendTable(service_words(old)).items():
            table.put(frontend, svc)
    elif old.spec.name == "flows":
        count = len(FlowTable(old.mapped()).flows())
        if count > FlowTable(new.mapped()).capacity:
            raise _does_not_fit(old, new, count)
        for _, found in FlowTable(old.mapped()).batches():
            FlowTable(new.mapped()).insert(found)
    elif old.spec.type == libbpf.MAP_ARRAY and old.spec.name not in COUNTERS:
        shared = min(old.spec.entries, new.spec.entries)
        rest = old.mapped()[shared:]
        size = old.spec.value.itemsize
        used = np.flatnonzero(rest.view(np.uint8).reshape(len(rest), size).any(axis=1))
        if len(used):
            raise _does_not_fit(old, new, shared + int(used[-1]) + 1)
        new.mapped()[:shared] = old.mapped()[:shared]
    elif old.spec.type in (libbpf.MAP_HASH, libbpf.MAP_LPM_TRIE):
        count = sum(len(keys) for keys, _ in old.batches())
        if count > new.spec.entries:
            raise _does_not_fit(old, new, count)
        for keys, values in old.batches():
            new.update_many(keys, values)


def service_words(services: Map) -> NDArray[np.uint64]:
    """Map services as `FrontendTable` takes it."""
    return services.mapped().view(np.uint64).reshape(-1, LINE_ENTRIES, WORDS)


def carry_rest(old: Map, new: Map) -> None:
    """Copy what is only in `old`; what the new program has learnt since stays.

    What the table has no room for is left behind, as it would have been without a change.
    """
    if old.spec.name == "flows":
        for _, found in FlowTable(old.mapped()).batches():
            with contextlib.suppress(ShuntError):
                FlowTable(new.mapped()).insert(found)
        return
    for keys, values in old.batches():
        for key, value in zip(keys, values, strict=True):
            if new.lookup(key) is None:
                with contextlib.suppress(FileExistsError, ShuntError):
                    new.update(key, value, libbpf.BPF_NOEXIST)


def _does_not_fit(old: Map, new: Map, need: int) -> ShuntError:
    return ShuntError(
        f"map {old.spec.name} can't shrink to {new.spec.entries} elements",
        f"{need} are in use",
        f"set its size under limits in shunt.yaml to {need} or more",
    )
