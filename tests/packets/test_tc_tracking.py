# SPDX-License-Identifier: Apache-2.0
"""The tracker: every state and packet of a TCP connection, and random histories against an oracle.

The oracle is written from what a connection may do, as states; the programs keep bits.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from shunt.agent import nat_expiry
from shunt.agent.nat_expiry import NS_PER_S, judge_nat
from tests.packets.balancer import START_NS, TCP, UDP, Flow, Out, Reason
from tests.packets.frames import tcp, udp
from tests.packets.translator import (
    BACKENDS,
    CLIENT,
    NEXT,
    SHOT,
    VIP,
    Track,
    Translator,
    expect,
    tuple_of,
)

IDLE_S = 7200
# Flags a segment may come with; the last ones no connection has.
FLAGS = ("S", "SA", "A", "PA", "FA", "R", "RA", "F", "", "P", "SF", "SR", "FR", "SFA")

# From a state, by who sends which segment: the next state. What is not here is refused.
# half-open -> answered -> open -> left (the client closed) or right -> closed. Any may be broken,
# by the client (open/c), the backend (open/b) or both (open/bc), until that side goes on.
TABLE: dict[str, dict[tuple[str, str], str]] = {
    "half-open": {("c", "S"): "half-open", ("b", "SA"): "answered", ("b", "A"): "half-open",
                  ("b", "PA"): "half-open"},
    "answered": {("c", "S"): "answered", ("c", "A"): "open", ("c", "PA"): "open",
                 ("c", "FA"): "left", ("b", "SA"): "answered", ("b", "A"): "answered",
                 ("b", "PA"): "answered", ("b", "FA"): "right"},
    "open": {("c", "S"): "open", ("c", "A"): "open", ("c", "PA"): "open", ("c", "FA"): "left",
             ("b", "SA"): "open", ("b", "A"): "open", ("b", "PA"): "open", ("b", "FA"): "right"},
    "left": {("c", "S"): "left", ("c", "A"): "left", ("c", "PA"): "left", ("c", "FA"): "left",
             ("b", "SA"): "left", ("b", "A"): "left", ("b", "PA"): "left", ("b", "FA"): "closed"},
    "right": {("c", "S"): "right", ("c", "A"): "right", ("c", "PA"): "right",
              ("c", "FA"): "closed", ("b", "SA"): "right", ("b", "A"): "right",
              ("b", "PA"): "right", ("b", "FA"): "right"},
    # A SYN begins another connection.
    "closed": {("c", "S"): "half-open", ("c", "A"): "closed", ("c", "PA"): "closed",
               ("c", "FA"): "closed", ("b", "SA"): "closed", ("b", "A"): "closed",
               ("b", "PA"): "closed", ("b", "FA"): "closed"},
}  # fmt: skip
SILENCE_S = {
    "half-open": 60, "answered": 60, "open": IDLE_S, "left": 3600, "right": 3600, "closed": 60,
}  # fmt: skip
BROKEN_S = 10
# How each state is come to.
WAYS: dict[str, tuple[tuple[str, str], ...]] = {
    "half-open": (("c", "S"),),
    "answered": (("c", "S"), ("b", "SA")),
    "open": (("c", "S"), ("b", "SA"), ("c", "A")),
    "left": (("c", "S"), ("b", "SA"), ("c", "A"), ("c", "FA")),
    "right": (("c", "S"), ("b", "SA"), ("c", "A"), ("b", "FA")),
    "closed": (("c", "S"), ("b", "SA"), ("c", "A"), ("c", "FA"), ("b", "FA")),
    "half-open/b": (("c", "S"), ("b", "RA")),
    "answered/c": (("c", "S"), ("b", "SA"), ("c", "R")),
    "open/c": (("c", "S"), ("b", "SA"), ("c", "A"), ("c", "R")),
    "open/b": (("c", "S"), ("b", "SA"), ("c", "A"), ("b", "RA")),
    "open/bc": (("c", "S"), ("b", "SA"), ("c", "A"), ("b", "R"), ("c", "R")),
    "left/b": (("c", "S"), ("b", "SA"), ("c", "A"), ("c", "FA"), ("b", "R")),
    "closed/c": (("c", "S"), ("b", "SA"), ("c", "A"), ("c", "FA"), ("b", "FA"), ("c", "R")),
}


@pytest.fixture
def tc() -> Iterator[Translator]:
    with Translator(inserts_per_s=10**6) as translator:
        yield translator


@dataclass
class Conversation:
    """One client's port, and the backend that it was given."""

    tc: Translator
    ip: int = 4
    proto: int = TCP
    port: int = 40000
    backend: list[Any] = field(default_factory=lambda: ["", 0])

    def say(self, who: str, flags: str = "S") -> Out:
        """One packet from the client (c) or the backend (b); what passes is translated exactly."""
        client = CLIENT[self.ip], self.port
        if who == "c":
            out = self.tc.run(self._frame(*client, VIP[self.ip], 80, flags))
            if out.verdict == NEXT:
                src, sport, *self.backend = tuple_of(out.packet)
                assert (src, sport) == client
            return out
        host, port = self.backend
        out = self.tc.leave(self._frame(host, port, *client, flags))
        if out.reasons and out.verdict == NEXT:
            assert tuple_of(out.packet) == (VIP[self.ip], 80, *client)
        return out

    def _frame(self, src: str, sport: int, dst: str, dport: int, flags: str) -> Any:
        if self.proto == UDP:
            return udp(src, dst, sport=sport, dport=dport)
        return tcp(src, dst, flags, sport=sport, dport=dport)

    def pair(self) -> tuple[Any, Any]:
        """Its two entries' values."""
        (fwd,) = [v for k, v in self.tc.entries("nat_fwd") if int(k["sport"]) == self.port]
        (rev,) = [v for _, v in self.tc.entries("nat_rev") if int(v["client_port"]) == self.port]
        return fwd, rev

    def lasts(self, seconds: int) -> bool:
        """Whether the scan forgets it after so many silent seconds, and not before."""
        fwd, rev = (np.array([v]) for v in self.pair())
        due = int(max(fwd["seen_ns"][0], rev["seen_ns"][0])) + seconds * NS_PER_S
        no, idle = np.zeros(1, np.bool_), np.array([IDLE_S * NS_PER_S])
        proto = np.array([self.proto])
        ended = [judge_nat(rev, fwd, no, no, idle, now, proto)[0] for now in (due, due + 1)]
        return ended == [False, True]


def step(state: str, who: str, flags: str) -> str | None:
    """The oracle: the next state, or None if the segment is refused."""
    of, _, broken = state.partition("/")
    if "R" in flags:
        return broken_by(of, broken + who) if flags in {"R", "RA"} else None
    if broken and (who, flags) == ("c", "S"):  # another connection
        return "half-open"
    after = TABLE[of].get((who, flags))
    if after is None or "S" in flags:
        return after and broken_by(after, broken)
    return broken_by(after, broken.replace(who, ""))


def broken_by(state: str, sides: str) -> str:
    """A state, as long as these sides are known to have broken it."""
    return f"{state}/{''.join(sorted(set(sides)))}" if sides else state


def silence(state: str, of: Mapping[str, int] = SILENCE_S) -> int:
    return BROKEN_S if "/" in state else of[state]


def serve(tc: Translator, ip: int = 4, proto: int = TCP) -> None:
    tc.add_service(VIP[ip], 80, proto, backends=BACKENDS[ip], backend_port=8080, idle_s=IDLE_S)


@pytest.mark.parametrize("ip", [4, 6])
@pytest.mark.parametrize("state", WAYS)
def test_every_segment_in_every_state(tc: Translator, state: str, ip: int) -> None:
    serve(tc, ip)
    for i, (who, flags) in enumerate((w, f) for w in "cb" for f in FLAGS):
        talk = Conversation(tc, ip, port=30000 + i)
        for earlier in WAYS[state]:
            assert talk.say(*earlier).verdict == NEXT
        assert talk.lasts(silence(state))
        out, wanted = talk.say(who, flags), step(state, who, flags)
        if wanted is None:
            expect(out, SHOT, "DROP_NAT_INVALID")
        else:
            expect(out, NEXT, "SENT_TO_BACKEND" if who == "c" else "SENT_TO_CLIENT")
        assert talk.lasts(silence(wanted or state)), (state, who, flags)
        fwd, rev = talk.pair()
        assert fwd["track"] == rev["track"], "the two entries disagree"


@pytest.mark.parametrize("ip", [4, 6])
@pytest.mark.parametrize("who", "cb")
def test_a_forged_reset_ends_no_living_connection(tc: Translator, who: str, ip: int) -> None:
    """Whoever it seems to be from goes on; for the other side's part that proves nothing."""
    serve(tc, ip)
    talk, other = Conversation(tc, ip), "b" if who == "c" else "c"
    for earlier in WAYS["open"]:
        talk.say(*earlier)
    talk.say(who, "R")
    for flags in ("A", "PA"):
        assert talk.say(other, flags).verdict == NEXT
        assert talk.lasts(BROKEN_S)
    assert talk.say(who, "A").verdict == NEXT
    assert talk.lasts(IDLE_S)
    fwd, rev = talk.pair()
    assert (int(fwd["state"]), int(fwd["closed"]), int(rev["closed"])) == (Flow.CONFIRMED, 0, 0)
    # And it is the same one still: a SYN does not begin another.
    tc.advance(IDLE_S - 1)
    backend = list(talk.backend)
    for segment in (("c", "S"), ("c", "PA"), ("b", "PA")):
        assert talk.say(*segment).verdict == NEXT
    assert talk.backend == backend
    assert talk.pair()[0]["track"] == fwd["track"]


@pytest.mark.parametrize("ip", [4, 6])
def test_udp_is_new_until_the_client_goes_on_after_an_answer(tc: Translator, ip: int) -> None:
    serve(tc, ip, UDP)
    talk = Conversation(tc, ip, UDP)
    for who, silence in (("c", 30), ("c", 30), ("b", 30), ("b", 30), ("c", IDLE_S), ("b", IDLE_S)):
        assert talk.say(who).verdict == NEXT
        assert talk.lasts(silence)


@dataclass
class Oracle:
    """What is known of each port: its state; absent: nothing."""

    states: dict[int, str] = field(default_factory=dict)

    def hear(self, port: int, who: str, flags: str) -> str:
        """The reason that the packet must be counted under; "" if it is not ours."""
        state = self.states.get(port)
        if state is None:
            if who == "b":
                return ""
            if flags != "S":
                # Told from a SYN by more flags than these four the segment is not.
                return "DROP_NAT_NO_FLOW"
            self.states[port] = "half-open"
            return "SENT_TO_BACKEND"
        wanted = step(state, who, flags)
        if wanted is None:
            return "DROP_NAT_INVALID"
        self.states[port] = wanted
        return "SENT_TO_BACKEND" if who == "c" else "SENT_TO_CLIENT"


@pytest.mark.parametrize("seed", range(6))
def test_random_histories(tc: Translator, seed: int) -> None:
    ip = (4, 6)[seed % 2]
    serve(tc, ip)
    draw, oracle = random.Random(seed), Oracle()
    talks = {port: Conversation(tc, ip, port=port) for port in range(40000, 40008)}
    likely = ("S", "SA", "A", "PA", "FA", "A", "A")
    for _ in range(300):
        port, who = draw.choice(sorted(talks)), draw.choice("cb")
        flags = draw.choice(likely) if draw.random() < 0.8 else draw.choice(FLAGS)
        if who == "b" and not talks[port].backend[0]:
            continue
        was = oracle.states.get(port)
        wanted = oracle.hear(port, who, flags)
        out = talks[port].say(who, flags)
        context = port, was, who, flags
        if wanted == "":
            assert (out.verdict, out.reasons) == (NEXT, {}), context
        else:
            assert out.reasons == {Reason[wanted]: 1}, context
        state = oracle.states.get(port)
        if state is not None:
            assert talks[port].lasts(silence(state)), context
        tc.advance(draw.choice((0, 0.1, 2)))
    assert len(tc.entries("nat_fwd")) == len(tc.entries("nat_rev")) == len(oracle.states)


def test_that_the_oracle_can_disagree(tc: Translator) -> None:
    serve(tc)
    talk = Conversation(tc)
    talk.say("c", "S")
    assert talk.say("c", "A").reasons != {Reason.SENT_TO_BACKEND: 1}
    assert step("half-open", "c", "A") is None


def test_the_agents_numbers_are_the_programs() -> None:
    names = ("TRACKED", "ANSWERED", "ASSURED", "ENDED_CLIENT", "ENDED_BACKEND", "MASQUERADED")
    assert [int(Track[n]) for n in names] == [getattr(nat_expiry, n) for n in names]
    assert Track.BROKEN | Track.BROKEN_BACKEND == nat_expiry.BROKEN


def test_seen_is_written_in_both_directions(tc: Translator) -> None:
    serve(tc)
    talk = Conversation(tc)
    talk.say("c", "S")
    tc.advance(5)
    talk.say("b", "SA")
    tc.advance(5)
    talk.say("c", "A")
    fwd, rev = talk.pair()
    assert (int(fwd["seen_ns"]) - START_NS, int(rev["seen_ns"]) - START_NS) == (
        10 * NS_PER_S,
        5 * NS_PER_S,
    )
    assert int(fwd["state"]) == Flow.CONFIRMED


def test_what_xdp_made_is_not_judged(tc: Translator) -> None:
    """It saw but one direction of it, perhaps: TC translates, and has no opinion."""
    serve(tc)
    talk = Conversation(tc)
    talk.say("c", "S")
    for name in ("nat_fwd", "nat_rev"):
        ((key, value),) = tc.entries(name)
        value["track"] = 0
        tc.map(name).update(key, value)
    assert talk.say("c", "A").reasons == {Reason.SENT_TO_BACKEND: 1}
    assert talk.say("b", "FA").reasons == {Reason.SENT_TO_CLIENT: 1}
    assert int(talk.pair()[1]["closed"]) == 2
