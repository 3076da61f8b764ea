# SPDX-License-Identifier: Apache-2.0
"""What is counted for a packet that is sent on."""

from __future__ import annotations

import pytest

from tests.packets.balancer import TCP, UDP, Balancer, Reason
from tests.packets.frames import either

CLIENT, VIP, BACKEND = "192.0.2.1", "203.0.113.1", "10.0.0.1"


@pytest.mark.parametrize("proto", [TCP, UDP])
def test_packets_and_bytes_are_counted_for_service_and_backend(lb: Balancer, proto: int) -> None:
    service = lb.add_service(VIP, proto=proto, backends=[BACKEND, "10.0.0.2"])
    service.set_slots(service.backends[1])
    packet = either(proto, CLIENT, VIP, payload=bytes(60))
    for _ in range(3):
        lb.run(packet)
    counted = (3, 3 * len(packet))
    assert tuple(lb.map("reasons").totals()[Reason.SENT_TO_BACKEND]) == counted
    assert tuple(lb.counts("svc_stats")[service.id]) == (0, 0)  # the rest, below
    assert tuple(lb.counts("backend_stats")[service.backends[1]]) == counted
    assert tuple(lb.counts("backend_stats")[service.backends[0]]) == (0, 0)
