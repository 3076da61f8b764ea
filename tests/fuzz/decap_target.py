# SPDX-License-Identifier: Apache-2.0
"""A backend's node: what it unwraps (xdp/decap.bpf.c), and its answers (xdp/answer.bpf.c)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from ipaddress import ip_address, ip_network
from typing import Any

from shunt.kern.libbpf import TC_ACT_SHOT, TC_ACT_UNSPEC, XDP_DROP, XDP_PASS
from shunt.xdp import decap
from shunt.xdp.decap_config import default_sources
from tests.fuzz import seeds_decap
from tests.fuzz.headers import (
    GENEVE_BYTES,
    ICMPS,
    IPIPS,
    IPV4,
    IPV6,
    TAGS,
    UDP,
    Headers,
    packed,
    read,
)
from tests.fuzz.target import CHANGED, DROPPED, PASSED, Broken, Step, Target
from tests.packets.backend_node import OWN, BackendNode, Reason

RECEIVE, ANSWER = 0, 1
FLOWS = {False: 1 << 12, True: 16}
ACCEPTED = [ip_network(source) for source in default_sources()]
OWN_PACKED = {packed(address) for address in OWN.values()}


class DecapTarget(Target):
    """`small`: with room for few ways back."""

    hooks = ("receive", "answer")
    kinds = (
        {XDP_PASS: PASSED, XDP_DROP: DROPPED},
        {TC_ACT_UNSPEC: PASSED, TC_ACT_SHOT: DROPPED},
    )
    at_tc = frozenset((ANSWER,))

    def __init__(self, small: bool = False) -> None:
        self.flows = FLOWS[small]
        self.node = BackendNode(flows=self.flows)
        self.fronts: set[bytes] = set()  # VIPs that were told of
        programs = [
            self.node.object.programs[decap.PROGRAM].fd,
            self.node.answers.programs[decap.ANSWER_PROGRAM].fd,
        ]
        super().__init__(programs, self.node.object.maps[decap.COUNTERS], Reason)

    def close(self) -> None:
        self.node.close()

    def seeds(self) -> Iterable[Step]:
        return seeds_decap.node()

    def back(self, hook: int, what: str) -> int:
        return ANSWER

    def reset(self) -> None:
        self.node.empty()
        self.fronts.clear()

    def advance(self, rnd: random.Random) -> None:
        """The programs ask the kernel's clock."""

    def is_as_before(self, frame: bytes) -> bool:
        """At TC a frame's outermost tag is not shown."""
        return self.out == frame or (frame[12:14] in TAGS and self.out[14:] == frame[18:])

    def astray(self, hook: int, what: str, frame: bytes, was: Headers, now: Headers) -> str:
        if (was.to, was.by) != (now.to, now.by):
            return "by another way"
        if hook == ANSWER:
            return self._answered(was, now)
        source = ip_address(was.src)
        if not any(source.version == n.version and source in n for n in ACCEPTED):
            return "from a source that is not accepted"
        if was.proto in IPIPS.values():
            return "" if self._bare(frame, was.l4) else "not what was within"
        if was.proto != UDP or not self._bare(frame, was.l4 + GENEVE_BYTES, now.dst):
            return "not what was within"
        if now.dst not in OWN_PACKED:
            return "to an address that was not given"
        vip = was.l4 + GENEVE_BYTES - 20 + 16
        self.fronts.add(frame[vip - len(now.dst) : vip])
        return ""

    def _bare(self, frame: bytes, at: int, to: bytes = b"") -> bool:
        """Whether what came out is what began there, but for ECN and checksums, and (Geneve) its
        destination."""
        inner = frame[:12] + (IPV4 if frame[at] >> 4 == 4 else IPV6) + frame[at:]
        was, now = read(inner), read(self.out)
        if len(inner) != len(self.out) or not was or not now:
            return len(inner) == len(self.out) and was is now is None
        same = (was.src, was.proto, was.sport, was.dport, to or was.dst)
        return same == (now.src, now.proto, now.sport, now.dport, now.dst)

    def _answered(self, was: Headers, now: Headers) -> str:
        """From a VIP that was told of, or with another MSS alone."""
        if now.dst != was.dst:
            return "to somebody else"
        if was.src == now.src:  # clamped, or an error of a router's
            return "" if was.sport == now.sport else "from another port"
        if now.src not in self.fronts or not (was.src in OWN_PACKED or was.proto in ICMPS):
            return "from no VIP"
        return ""

    def miscounted(self, became: Counter[str], change: Any) -> str:
        """Of what comes in each is counted; of what leaves, what was changed or dropped."""
        passed, changed = became.pop(PASSED, 0), became.pop(CHANGED, 0)
        dropped = became.pop(DROPPED, 0)
        answered = self.count_of(change, "ANSWERED") + self.count_of(change, "CLAMPED")
        unwrapped, untouched = self.count_of(change, "UNWRAPPED"), self.count_of(change, "PASS_")
        refused = self.count_of(change, "DROP_")
        if refused != dropped or not changed <= unwrapped + answered or untouched > passed:
            return (
                f"{changed} changed, {passed} passed, {dropped} dropped; counted: {unwrapped} "
                f"unwrapped, {answered} answered, {untouched} passed, {refused} dropped"
            )
        return ", ".join(became)

    def check_tables(self) -> None:
        ways = len(self.node.ways())
        if ways > self.flows:
            raise Broken(f"{ways} flows in room for {self.flows}")
