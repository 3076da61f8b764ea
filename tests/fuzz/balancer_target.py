# SPDX-License-Identifier: Apache-2.0
"""The balancer (xdp/lb.bpf.c) with a service of each mode, and one for any port."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from shunt.kern.libbpf import XDP_DROP, XDP_PASS, XDP_TX
from tests.fuzz import seeds
from tests.fuzz.balancing import Balancing, config, sizes
from tests.fuzz.headers import ICMPS, SCTP, TCP, UDP, Headers
from tests.fuzz.served import (
    ANY_PORT_NUMBER,
    ANY_PORT_VIP,
    NUMBERS,
    OWN_PACKED,
    Served,
    answers,
    services,
)
from tests.fuzz.target import CHANGED, DROPPED, PASSED, SENT, Step
from tests.packets.balancer import Balancer

XDP_REDIRECT = 4


class BalancerTarget(Balancing):
    """`small`: with little room for translated flows."""

    hooks = ("xdp",)
    kinds = ({XDP_PASS: PASSED, XDP_TX: SENT, XDP_REDIRECT: SENT, XDP_DROP: DROPPED},)

    def __init__(self, small: bool = False) -> None:
        any_port = Served(4, ANY_PORT_VIP, "dsr-ipip", UDP, "settled", ANY_PORT_NUMBER, port=0)
        served = [*services(tuple(NUMBERS), (TCP, UDP, SCTP)), any_port]
        super().__init__(Balancer(sizes(small), **config(small)), ["shunt_lb"], served)

    def seeds(self) -> Iterable[Step]:
        return ((0, frame) for frame in seeds.balancer())

    def back(self, hook: int, what: str) -> int:
        return 0

    def astray(self, hook: int, what: str, frame: bytes, was: Headers, now: Headers) -> str:
        if what == CHANGED:  # the stack makes fragments of it
            ours = any(s.wraps(was, frame, self.out, now) for s in self.directory.of(was))
            return "" if ours and (now.to, now.by) == (was.to, was.by) else "not wrapped for it"
        if answers(was, now):
            return ""
        if any(s.sends(was, frame, self.out, now) for s in self.directory.of(was)):
            return ""
        if was.dst in OWN_PACKED and self._replies(was, now):
            return ""
        return "neither to a backend of its service nor back"

    def _replies(self, was: Headers, now: Headers) -> bool:
        """To a client of the VIP that it has as its source now; or an error about what it got."""
        of = self.directory.at_vip(now.src)
        if was.proto in ICMPS:
            of = [s for s in self.directory.services if s.is_nat]
        else:
            of = [s for s in of if s.is_nat and was.src in s.known]
        return any((now.to, now.dst) in s.clients for s in of)

    def uneven(self, became: Counter[str], change: Any) -> str:
        expected = {
            "PASS_": became.pop(PASSED, 0) + became.pop(CHANGED, 0),
            "SENT_": became.pop(SENT, 0),
            "DROP_": became.pop(DROPPED, 0),
        }
        for prefix, packets in expected.items():
            if (counted := self.count_of(change, prefix)) != packets:
                return f"{counted} reasons {prefix} were counted for {packets} packets"
        return ", ".join(became)
