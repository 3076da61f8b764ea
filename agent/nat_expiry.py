# SPDX-License-Identifier: Apache-2.0
"""When a translated flow has ended: from the two entries of its pair."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from shunt.kern import flows as flowtable
from shunt.lb.model import Protocol, Service

NS_PER_S = 1_000_000_000
SHORT_IDLE_NS = 60 * NS_PER_S  # bpf/flow.h; a test compares
# A flow is deleted this much later than the programs stop following it: their clocks, and the
# agent's, are read at different moments.
MARGIN_NS = 5 * NS_PER_S
NAT_FIN_BOTH, NAT_RST = 3, 4

# Of flows that TC tracks (bpf/track.h); each is the service's idle time at most.
HALF_OPEN_NS = 60 * NS_PER_S
CLOSING_NS = 3600 * NS_PER_S  # one side has closed: it may be a long answer
SHUTTING_DOWN_NS = 300 * NS_PER_S  # SCTP's closing: neither side sends anything new any more
CLOSED_NS = 60 * NS_PER_S
BROKEN_NS = 10 * NS_PER_S
NEW_UDP_NS = 30 * NS_PER_S
ECHO_NS = 30 * NS_PER_S
# enum nat_track of bpf/abi.h; a test compares
TRACKED, ANSWERED, ASSURED, ENDED_CLIENT, ENDED_BACKEND = (1 << n for n in range(5))
BROKEN_CLIENT, BROKEN_BACKEND = 32, 256
BROKEN = BROKEN_CLIENT | BROKEN_BACKEND
ENDED = ENDED_CLIENT | ENDED_BACKEND
MASQUERADED = 64

ECHOES = (1, 58)  # ICMP, ICMPv6
NOBODYS = 0  # the service of flows that are masqueraded, and of no service
_DEFAULT = Service(name="", vips=(), ports=())


def judge_nat(
    reverse: Any,
    forward: Any,
    lone: NDArray[np.bool_],
    gone: NDArray[np.bool_],
    idle_ns: NDArray[np.int64],
    now_ns: int,
    proto: Any = 0,
) -> NDArray[np.bool_]:
    """Which pairs have ended. A reverse entry without its forward one is given a moment."""
    seen = np.maximum(reverse["seen_ns"], np.where(lone, 0, forward["seen_ns"]))
    closed = reverse["closed"] | np.where(lone, 0, forward["closed"])
    closing = ((closed & NAT_RST) != 0) | ((closed & NAT_FIN_BOTH) == NAT_FIN_BOTH)
    short = closing | (forward["state"] == flowtable.State.OPENING) | lone
    limit = np.where(short, np.minimum(idle_ns, SHORT_IDLE_NS), idle_ns)
    track = reverse["track"] | np.where(lone, 0, forward["track"])
    tracked = np.minimum(tracked_limit(track, proto), idle_ns)
    limit = np.where(track & TRACKED != 0, tracked, limit)
    limit = np.where(lone, MARGIN_NS, limit)
    ended: NDArray[np.bool_] = (now_ns - seen.astype(np.int64) > limit) | gone
    return ended


def idle_of_nobodys(proto: Any) -> NDArray[np.int64]:
    """As long as services have by default, by protocol. Units: ns."""
    idle_s = np.where(np.asarray(proto) == Protocol.UDP, _DEFAULT.udp_idle_s, _DEFAULT.tcp_idle_s)
    return (idle_s * NS_PER_S).astype(np.int64)


def tracked_limit(track: NDArray[np.uint32], proto: Any) -> NDArray[np.int64]:
    """How long a flow that TC tracks may be silent, its service's idle time aside. Units: ns."""
    no_limit, number = np.iinfo(np.int64).max, np.asarray(proto)
    cases = (
        (track & BROKEN != 0, BROKEN_NS),
        (track & ENDED == ENDED, CLOSED_NS),
        ((track & ENDED != 0) & (number == Protocol.SCTP), SHUTTING_DOWN_NS),
        (track & ENDED != 0, CLOSING_NS),
        (np.isin(number, ECHOES), ECHO_NS),
        (track & ASSURED != 0, no_limit),
        (number == Protocol.UDP, NEW_UDP_NS),
    )
    shape = np.shape(track)
    conditions = [np.broadcast_to(condition, shape) for condition, _ in cases]
    limit: NDArray[np.int64] = np.select(conditions, [ns for _, ns in cases], HALF_OPEN_NS)
    return limit
