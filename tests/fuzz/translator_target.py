# SPDX-License-Identifier: Apache-2.0
"""TC (tc/translate.bpf.c), in and out: services of modes local and nat, and what is masqueraded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from shunt.kern.libbpf import TC_ACT_REDIRECT, TC_ACT_SHOT, TC_ACT_UNSPEC
from tests.fuzz import seeds_tc
from tests.fuzz.balancing import Balancing, config, sizes
from tests.fuzz.headers import ICMPS, SCTP, TCP, UDP, Headers, packed
from tests.fuzz.served import OWN_PACKED, Served, answers, services
from tests.fuzz.target import CHANGED, DROPPED, PASSED, SENT, Step
from tests.packets.balancer import ELSEWHERE, LOOPBACK
from tests.packets.test_tc_masquerade import OWN, Masquerader

INGRESS, EGRESS = 0, 1
LEAVES_AS = {packed(address) for address in OWN.values()}


class TranslatorTarget(Balancing):
    """Each service's last backend is a veth's other end, to which packets are handed over."""

    hooks = ("ingress", "egress")
    kinds = ({TC_ACT_UNSPEC: PASSED, TC_ACT_REDIRECT: SENT, TC_ACT_SHOT: DROPPED},) * 2
    at_tc = frozenset((INGRESS, EGRESS))

    def __init__(self, small: bool = False) -> None:
        tc = Masquerader(sizes(small), handover_peer=1, **config(small))
        tc.add_veth(ELSEWHERE)
        self.masqueraded: set[bytes] = set()
        served = list(services(seeds_tc.MODES, (TCP, UDP, SCTP)))
        super().__init__(tc, ["shunt_ingress", "shunt_egress"], served)

    def seeds(self) -> Iterable[Step]:
        return seeds_tc.translator()

    def ifindex(self, served: Served, mac: bytes) -> int:
        return ELSEWHERE if mac == list(served.backends)[-1] else LOOPBACK

    def back(self, hook: int, what: str) -> int:
        """What was sent, or left by the device, is answered from without; the rest from here."""
        return EGRESS if what == CHANGED and hook == INGRESS else INGRESS

    def reset(self) -> None:
        super().reset()
        self.masqueraded.clear()

    def is_as_before(self, frame: bytes) -> bool:
        """A frame's outermost tag is not shown."""
        return self.out == frame or (frame[12:14] in seeds_tc.TAGS and self.out[14:] == frame[18:])

    def astray(self, hook: int, what: str, frame: bytes, was: Headers, now: Headers) -> str:
        if what == SENT and answers(was, now):
            return ""
        if what == SENT:
            fine = hook == INGRESS and self._redirected(frame, was, now)
            return "" if fine else "neither to a backend of its service nor to a client"
        if (was.to, was.by) != (now.to, now.by):
            return "by another way"
        fine = self._enters(was, now) if hook == INGRESS else self._leaves(was, now)
        return "" if fine else "to no one that it may go to"

    def _redirected(self, frame: bytes, was: Headers, now: Headers) -> bool:
        """To a backend of mode nat or one that is handed its packets; or a reply to a client."""
        for served in self.directory.of(was):
            if served.is_nat and served.sends(was, frame, self.out, now):
                return True
            handed = served.backends.get(now.to) == now.dst and now.src == was.src
            if served.mode == "local" and (handed or self._is_a_hairpins(served, was, now)):
                return True
        if was.dst in OWN_PACKED:
            of = [s for s in self.directory.services if s.is_nat]
        else:
            of = [s for s in self.directory.with_backend(was.src) if s.mode == "local"]
        if was.proto not in ICMPS:
            of = [s for s in of if was.src in s.known and now.src == s.key]
        return any((now.to, now.dst) in s.clients for s in of)

    def _is_a_hairpins(self, served: Served, was: Headers, now: Headers) -> bool:
        """An error about what a backend has sent or got by way of the VIP, itself at both ends: by
        the way that it came, for nobody but the backend speaks of that."""
        back = now.dst in served.known and now.src == served.key
        known = (now.to, now.dst) in served.clients or now.to == was.by
        return was.proto in ICMPS and back and known

    def _enters(self, was: Headers, now: Headers) -> bool:
        """To a local backend; or a reply to whom this host has stood for."""
        if was.dst in LEAVES_AS:
            return now.dst in self.masqueraded
        of = [s for s in self.directory.of(was) if s.mode == "local"]
        return now.src == was.src and any(now.dst in s.known for s in of)

    def _leaves(self, was: Headers, now: Headers) -> bool:
        """From the VIP to its client; or with this host's address."""
        if now.dst != was.dst:
            return False
        of = [s for s in self.directory.at_vip(now.src) if s.mode == "local"]
        if was.proto not in ICMPS:  # also a router's error is the VIP's
            of = [s for s in of if was.src in s.known]
        if of:
            return any(now.dst == client for s in of for _, client in s.clients)
        if now.src not in LEAVES_AS:
            return False
        self.masqueraded.add(was.src)
        return seeds_tc.is_pod(was.src) or any(
            s.mode == "local" for s in self.directory.with_backend(was.dst)
        )

    def uneven(self, became: Counter[str], change: Any) -> str:
        """What is none of ours goes on, uncounted."""
        passed = became.pop(PASSED, 0)
        sent, dropped = became.pop(SENT, 0) + became.pop(CHANGED, 0), became.pop(DROPPED, 0)
        counted = {prefix: self.count_of(change, prefix) for prefix in ("PASS_", "SENT_", "DROP_")}
        if counted["PASS_"] > passed or (counted["SENT_"], counted["DROP_"]) != (sent, dropped):
            return f"{counted} were counted, {passed} passed, {sent} sent, {dropped} dropped"
        return ", ".join(became)
