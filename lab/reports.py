# SPDX-License-Identifier: Apache-2.0
"""What the client's traffic generator is told, and what it reports: one JSON object a line."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Kind(StrEnum):
    """What a target is asked for. The first two are over with one answer, the others stay."""

    HTTP = "http request"  # a new connection each
    UDP = "udp request"  # a new socket each
    TCP_FLOW = "tcp connection"
    UDP_FLOW = "udp flow"


FLOWS = frozenset({Kind.TCP_FLOW, Kind.UDP_FLOW})


class Reason(StrEnum):
    """Why something counts as lost."""

    REFUSED = "refused"
    RESET = "reset"
    CLOSED = "closed by the other side"
    STALLED = "no answer in time"
    MOVED = "answered by another backend"
    GARBLED = "not the answer to what was sent"
    ERROR = "error"


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """A VIP, and how much of what it gets. Rates are a second, intervals in seconds."""

    name: str
    address: str
    http_port: int = 80
    echo_port: int = 7
    http_rate: float = 10.0
    udp_rate: float = 10.0
    tcp_flows: int = 25
    udp_flows: int = 4
    message_interval_s: float = 0.2  # of each flow, in the mean


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """All targets. Times are the longest wait for an answer before it counts as lost."""

    targets: tuple[Target, ...]
    request_timeout_s: float = 3.0
    stall_timeout_s: float = 3.0
    udp_retry_s: float = 0.5  # a datagram may be lost on any network: it is sent again after this


class Answers(msgspec.Struct, frozen=True, tag=True):
    """Answers since the last report."""

    target: str
    kind: Kind
    backend: str
    count: int


class Opened(msgspec.Struct, frozen=True, tag=True):
    """A flow got its first answer. `peer` is whom the backend saw: with nat a load balancer."""

    flow: int
    target: str
    kind: Kind
    backend: str
    peer: str
    source: str
    source_port: int


class Failure(msgspec.Struct, frozen=True, tag=True):
    """Something was lost. Times are CLOCK_MONOTONIC; a flow has a number once it was opened."""

    target: str
    kind: Kind
    reason: Reason
    started_s: float  # the request, or the flow's message that got no answer
    ended_s: float
    flow: int = 0
    detail: str = ""


class Answered(msgspec.Struct, frozen=True, tag=True):
    """Each open flow had an answer to what it sent at this time (CLOCK_MONOTONIC), or later."""

    since_s: float


class Resent(msgspec.Struct, frozen=True, tag=True):
    """A datagram was sent again."""

    target: str
    kind: Kind


Report = Answers | Opened | Failure | Answered | Resent
