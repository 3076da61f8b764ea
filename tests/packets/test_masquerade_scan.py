# SPDX-License-Identifier: Apache-2.0
"""When masqueraded flows are forgotten: entries as tc/masquerade.h makes them, on the real maps."""

from __future__ import annotations

from ipaddress import ip_address

import numpy as np
import pytest

from shunt.agent.nat_expiry import ANSWERED, ASSURED, NS_PER_S, TRACKED
from shunt.lb.compile import mapped
from tests.packets.balancer import TCP, UDP
from tests.packets.histories import Lab
from tests.packets.test_scan import B, nat, pairs
from tests.packets.translator import Track

OPEN = TRACKED | ANSWERED | ASSURED | int(Track.MASQUERADED)
POD, OWN, WORLD = (mapped(ip_address(a)) for a in ("10.244.0.7", "10.0.0.250", "192.0.2.80"))


def put(lab: Lab, port: int, proto: int, track: int = OPEN, svc: int = 0, backend: int = 0) -> None:
    """POD:port -> WORLD:443, as OWN:(10000 + port)."""
    forward, reverse = lab.obj.maps["nat_fwd"], lab.obj.maps["nat_rev"]
    key, value = forward.new_keys(1), forward.new_values(1)
    back_key, back = reverse.new_keys(1), reverse.new_values(1)
    for record, address, sport, dport in (
        (key, (POD, WORLD), port, 443),
        (back_key, (WORLD, OWN), 443, 10000 + port),
    ):
        for name, raw in zip(("saddr", "daddr"), address, strict=True):
            record[name] = np.frombuffer(raw, np.uint8)
        record["sport"], record["dport"], record["proto"] = sport, dport, proto
    for record in (value, back):
        record["word"], record["seen_ns"] = backend, lab.now_s * NS_PER_S
        record["svc"], record["track"] = svc, track
    value["saddr"], value["state"] = np.frombuffer(OWN, np.uint8), 4
    back["client"], back["vip"] = (np.frombuffer(raw, np.uint8) for raw in (POD, WORLD))
    back["client_port"], back["vip_port"] = port, 443
    reverse.update(back_key[0], back[0])
    forward.update(key[0], value[0])


def after(lab: Lab, seconds: int) -> tuple[int, int]:
    lab.now_s += seconds
    lab.scan()
    return pairs(lab)


@pytest.mark.parametrize(
    ("proto", "track", "lasts_s"),
    [
        (TCP, OPEN, 8000),
        (UDP, OPEN, 60),
        (TCP, TRACKED | int(Track.MASQUERADED), 60),
        (UDP, TRACKED | int(Track.MASQUERADED), 30),
        (TCP, OPEN | int(Track.BROKEN), 10),
    ],
)
def test_of_no_service(proto: int, track: int, lasts_s: int) -> None:
    with nat() as lab:
        put(lab, 1, proto, track)
        assert after(lab, lasts_s - 2) == (1, 1)
        assert after(lab, 20) == (0, 0)


def test_of_a_service_they_end_with_its_backend() -> None:
    with nat() as lab:
        ((_, place),) = lab.tables.placed.items()
        for port, (endpoint, i) in enumerate(place.backends.items(), 1):
            put(lab, port, TCP, svc=place.svc, backend=i)
            assert endpoint.port == 0
        put(lab, 9, TCP)
        assert after(lab, 1) == (3, 3)
        lab.configured.discard(B)
        lab.gone.add(B)
        lab.reconcile()
        assert after(lab, 1) == (2, 2)
        assert after(lab, 60) == (1, 1)  # the service's idle time is 50 s
