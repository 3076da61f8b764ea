# SPDX-License-Identifier: Apache-2.0
"""Map veths follows the devices; what has no room in it is told, and goes through its device."""

from __future__ import annotations

from shunt.agent.handover import Handover
from shunt.agent.troubles import Troubles
from shunt.kern.maps import Map
from tests.packets.translator import Translator


def held(veths: Map) -> dict[int, int]:
    keys, values = veths.items()
    return dict(zip(keys["ifindex"].tolist(), values["peer"].tolist(), strict=True))


def test_the_map_follows(tc: Translator) -> None:
    veths, troubles = tc.map("veths"), Troubles()
    handover = Handover({"veths": veths}, troubles)
    for wanted in ({2: 3, 4: 5}, {4: 6}, {}, {n: n + 1 for n in range(2, 900)}, {7: 1}):
        handover.sync(wanted)
        assert held(veths) == wanted
        assert troubles == {}
    room = veths.spec.entries
    handover.sync(dict.fromkeys(range(1, room + 4), 1))
    assert held(veths) == dict.fromkeys(range(1, room + 1), 1)
    assert f"3 veth devices of {room + 3}" in troubles["handover"].what
    handover.sync({2: 1})
    assert held(veths) == {2: 1}
    assert troubles == {}
