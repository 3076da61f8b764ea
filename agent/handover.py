# SPDX-License-Identifier: Apache-2.0
"""Map veth_sets: the devices behind which TC may hand packets straight to the other end."""

from __future__ import annotations

from collections.abc import Mapping, Set

import numpy as np

from shunt.agent.troubles import Troubles
from shunt.kern.maps import Map
from shunt.lb.errors import ShuntError


class Handover:
    """The map, brought to what is wanted. `troubles` belongs to whoever shows it."""

    def __init__(self, maps: Mapping[str, Map], troubles: Troubles) -> None:
        self._map, self._troubles = maps["veth_sets"], troubles

    def sync(self, veths: Set[int]) -> None:
        """To these devices, by ifindex. Those without room are sent through, as other devices."""
        sets = self._map.mapped()["ifindex"]
        count, ways = sets.shape
        # One that stays keeps its place: programs look for it meanwhile.
        sets[~np.isin(sets, list(veths))] = 0
        left = 0
        for index in sorted(veths - set(sets.flat)):
            free = np.flatnonzero(sets[index % count] == 0)
            if free.size:
                sets[index % count, free[0]] = index
            else:
                left += 1
        self._troubles.tell("handover", ShuntError(
            f"{left} veth devices of {len(veths)} have no place in map veth_sets",
            f"it holds {ways} whose ifindexes are equal modulo {count}; packets to the others go"
            " through their devices",
            "nothing has to be done: handover: peer is faster, no more",
        ) if left else None)  # fmt: skip
