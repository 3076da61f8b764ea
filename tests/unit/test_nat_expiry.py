# SPDX-License-Identifier: Apache-2.0
"""How long a silent translation lasts, by what TC has seen of it."""

from __future__ import annotations

import numpy as np
import pytest

from shunt.agent.nat_expiry import (
    ANSWERED,
    ASSURED,
    BROKEN,
    BROKEN_BACKEND,
    BROKEN_CLIENT,
    ENDED_BACKEND,
    ENDED_CLIENT,
    NS_PER_S,
    TRACKED,
    tracked_limit,
)

TCP, UDP, SCTP, ICMP, ICMPV6 = 6, 17, 132, 1, 58
ECHOED = 128
OPEN = TRACKED | ANSWERED | ASSURED
FOREVER = np.iinfo(np.int64).max / NS_PER_S


@pytest.mark.parametrize(
    ("track", "proto", "seconds"),
    [
        (TRACKED, TCP, 60),
        (TRACKED | ANSWERED, TCP, 60),
        (OPEN, TCP, FOREVER),
        (OPEN | ENDED_CLIENT, TCP, 3600),
        (OPEN | ENDED_BACKEND, TCP, 3600),
        (OPEN | ENDED_CLIENT | ENDED_BACKEND, TCP, 60),
        (OPEN | BROKEN, TCP, 10),
        (OPEN | BROKEN_CLIENT, TCP, 10),
        (OPEN | BROKEN_BACKEND, TCP, 10),
        (TRACKED | BROKEN, TCP, 10),
        (TRACKED, UDP, 30),
        (TRACKED | ANSWERED, UDP, 30),
        (OPEN, UDP, FOREVER),
        (TRACKED | ANSWERED, SCTP, 60),
        (TRACKED | ANSWERED | ECHOED, SCTP, 60),
        (OPEN | ECHOED, SCTP, FOREVER),
        (OPEN | ECHOED | ENDED_CLIENT, SCTP, 300),
        (OPEN | ECHOED | ENDED_BACKEND, SCTP, 300),
        (OPEN | ECHOED | ENDED_CLIENT | ENDED_BACKEND, SCTP, 60),
        (OPEN | ECHOED | BROKEN, SCTP, 10),
        (TRACKED, ICMP, 30),
        (OPEN, ICMP, 30),
        (OPEN, ICMPV6, 30),
    ],
)
def test_limits(track: int, proto: int, seconds: float) -> None:
    got = tracked_limit(np.array([track], np.uint32), np.array([proto]))
    assert got / NS_PER_S == pytest.approx(seconds)
