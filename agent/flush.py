# SPDX-License-Identifier: Apache-2.0
"""Forgetting remembered flows at the operator's word."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np

from shunt.agent.tables import Tables
from shunt.kern.flows import backends


async def flush(t: Tables, svcs: Sequence[int] | None) -> int:
    """Delete the flows of these services, or all; how many there were.

    Others on the event loop get a turn after each batch.
    """
    deleted = 0
    for index, flows in t.flows.batches():
        words = flows["word"]
        ended = np.ones(len(words), np.bool_)
        if svcs is not None:
            ended = np.isin(t.backends["svc"][backends(words)], svcs)
        deleted += int(t.flows.delete(index[ended], words[ended]).sum())
        await asyncio.sleep(0)
    for name in ("nat_fwd", "nat_rev"):
        for keys, values in t.maps[name].batches():
            ended = keys if svcs is None else keys[np.isin(values["svc"], svcs)]
            gone = t.maps[name].delete_many(ended)
            deleted += gone if name != "nat_rev" else 0
            await asyncio.sleep(0)
    return deleted
