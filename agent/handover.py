# SPDX-License-Identifier: Apache-2.0
"""Map veths: the devices behind which TC may hand packets straight to the other end."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from shunt.agent.troubles import Troubles
from shunt.kern.maps import Map
from shunt.lb.errors import ShuntError


class Handover:
    """The map, brought to what is wanted. `troubles` belongs to whoever shows it."""

    def __init__(self, maps: Mapping[str, Map], troubles: Troubles) -> None:
        self._map, self._troubles = maps["veths"], troubles

    def sync(self, veths: Mapping[int, int]) -> None:
        """By ifindex the other end's. Those that have no room are sent through as any device is."""
        room = self._map.spec.entries
        kept = dict(sorted(veths.items())[:room])
        keys, values = self._map.items()
        known = dict(zip(keys["ifindex"].tolist(), values["peer"].tolist(), strict=True))
        self._map.delete_many(keys[~np.isin(keys["ifindex"], list(kept))])
        new = {index: peer for index, peer in kept.items() if known.get(index) != peer}
        keys, values = self._map.new_keys(len(new)), self._map.new_values(len(new))
        keys["ifindex"], values["peer"] = list(new), list(new.values())
        for key, value in zip(keys, values, strict=True):
            self._map.update(key, value)
        over = len(veths) - len(kept)
        self._troubles.tell("handover", ShuntError(
            f"{over} veth devices of {len(veths)} have no place in map veths",
            f"it holds {room}; packets to the others go through their devices",
            "nothing has to be done: handover: peer is faster, no more",
        ) if over else None)  # fmt: skip
