# SPDX-License-Identifier: Apache-2.0
"""The tracker: every state and packet of a TCP connection, and random histories against an oracle.

The oracle is written from what a connection may do, as states; the programs keep bits. Both modes
that TC translates have it: local, and nat, whose replies come in from a wire.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from shunt.agent import nat_expiry
from shunt.agent.nat_expiry import NS_PER_S, judge_nat
from tests.packets.balancer import OWN4, OWN6, SCTP, START_NS, TCP, UDP, Balancer, Flow, Out, Reason
from tests.packets.frames import packed
from tests.packets.translator import (
    BACKENDS,
    CLIENT,
    FAMILIES,
    MODES,
    SHOT,
    VIP,
    WAY,
    Track,
    Translator,
    expect,
    returned,
    tuple_in,
)

IDLE_S = 7200
OWN = {4: OWN4, 6: OWN6}
SENT = {"c": "SENT_TO_BACKEND", "b": "SENT_TO_CLIENT"}
# What a client's packets said, which stands in the forward entry alone.
CLIENTS = Track.ASSURED | Track.ENDED_CLIENT | Track.BROKEN
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


@dataclass
class Conversation:
    """One client's port, and the backend that it was given."""

    tc: Translator
    ip: int = 4
    mode: str = "local"
    proto: int = TCP
    port: int = 40000
    own: tuple[str, int] = ("", 0)  # whom the backend takes for its client
    backend: tuple[str, int] = ("", 0)

    def say(self, who: str, flags: str = "S", to: Balancer | None = None) -> Out:
        """One packet from the client (c) or the backend (b), to TC or another program; what passes
        is translated exactly."""
        client, vip = (CLIENT[self.ip], self.port), (VIP[self.ip], 80)
        program = to or self.tc
        if who == "c":
            out = program.run(self.frame(*client, *vip, flags))
            if out.reasons == {Reason.SENT_TO_BACKEND: 1}:
                src, sport, dst, dport = tuple_in(out.data)
                self.own, self.backend = (src, sport), (dst, dport)
                self._check_own()
        else:
            reply = self.frame(*self.backend, *self.own, flags)
            out = returned(program, self.mode, reply)
            if out.reasons == {Reason.SENT_TO_CLIENT: 1}:
                assert tuple_in(out.data) == (*vip, *client)
        return out

    def _check_own(self) -> None:
        """Mode local keeps the client's; nat has this host's, but SCTP its port: bpf/sctp.h."""
        src, sport = self.own
        assert src == (CLIENT if self.mode == "local" else OWN)[self.ip]
        kept = self.mode == "local" or self.proto == SCTP
        assert sport == self.port if kept else sport in self.tc.nat_ports

    def sends(self, *packets: tuple[str, str]) -> None:
        """Packets that must be sent on, each on its way."""
        for who, flags in packets:
            expect(self.say(who, flags), WAY[self.mode], SENT[who])

    def frame(self, src: str, sport: int, dst: str, dport: int, flags: str) -> bytes:
        return packed(self.proto, src, dst, flags, sport, dport)

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


def serve(tc: Translator, ip: int = 4, proto: int = TCP, mode: str = "local") -> None:
    tc.add_service(VIP[ip], 80, proto, mode, BACKENDS[ip], backend_port=8080, idle_s=IDLE_S)


@MODES
@FAMILIES
@pytest.mark.parametrize("state", WAYS)
def test_every_segment_in_every_state(tc: Translator, state: str, ip: int, mode: str) -> None:
    serve(tc, ip, mode=mode)
    for i, (who, flags) in enumerate((w, f) for w in "cb" for f in FLAGS):
        talk = Conversation(tc, ip, mode, port=30000 + i)
        talk.sends(*WAYS[state])
        assert talk.lasts(silence(state))
        out, wanted = talk.say(who, flags), step(state, who, flags)
        if wanted is None:
            expect(out, SHOT, "DROP_NAT_INVALID")
        else:
            expect(out, WAY[mode], SENT[who])
        assert talk.lasts(silence(wanted or state)), (state, who, flags)
        fwd, rev = talk.pair()
        assert int(rev["track"]) == int(fwd["track"]) & ~CLIENTS, "the two entries disagree"


@MODES
@FAMILIES
@pytest.mark.parametrize("who", "cb")
def test_a_forged_reset_ends_no_living_connection(
    tc: Translator, who: str, ip: int, mode: str
) -> None:
    """Whoever it seems to be from goes on; for the other side's part that proves nothing."""
    serve(tc, ip, mode=mode)
    talk, other = Conversation(tc, ip, mode), "b" if who == "c" else "c"
    talk.sends(*WAYS["open"], (who, "R"))
    for flags in ("A", "PA"):
        talk.sends((other, flags))
        assert talk.lasts(BROKEN_S)
    talk.sends((who, "A"))
    assert talk.lasts(IDLE_S)
    fwd, rev = talk.pair()
    assert (int(fwd["state"]), int(fwd["closed"]), int(rev["closed"])) == (Flow.CONFIRMED, 0, 0)
    # And it is the same one still: a SYN does not begin another.
    tc.advance(IDLE_S - 1)
    backend = talk.backend
    talk.sends(("c", "S"), ("c", "PA"), ("b", "PA"))
    assert talk.backend == backend
    assert talk.pair()[0]["track"] == fwd["track"]


@MODES
@FAMILIES
def test_udp_is_new_until_the_client_goes_on_after_an_answer(
    tc: Translator, ip: int, mode: str
) -> None:
    serve(tc, ip, UDP, mode)
    talk = Conversation(tc, ip, mode, UDP)
    for who, silence in (("c", 30), ("c", 30), ("b", 30), ("b", 30), ("c", IDLE_S), ("b", IDLE_S)):
        talk.sends((who, ""))
        assert talk.lasts(silence)


def heard(states: dict[int, str], port: int, who: str, flags: str) -> str:
    """The reason that a packet must be counted under, by what is known of each port: its state."""
    state = states.get(port)
    # Told from a SYN by more flags than these four the segment is not.
    wanted = step(state, who, flags) if state else "half-open" if flags == "S" else None
    if wanted is None:
        return "DROP_NAT_INVALID" if state else "DROP_NAT_NO_FLOW"
    states[port] = wanted
    return SENT[who]


@MODES
@pytest.mark.parametrize("seed", range(6))
def test_random_histories(tc: Translator, seed: int, mode: str) -> None:
    ip = (4, 6)[seed % 2]
    serve(tc, ip, mode=mode)
    draw, states = random.Random(seed), dict[int, str]()
    talks = {port: Conversation(tc, ip, mode, port=port) for port in range(40000, 40008)}
    likely = ("S", "SA", "A", "PA", "FA", "A", "A")
    for _ in range(300):
        port, who = draw.choice(sorted(talks)), draw.choice("cb")
        flags = draw.choice(likely) if draw.random() < 0.8 else draw.choice(FLAGS)
        if who == "b" and port not in states:
            continue
        context = port, states.get(port), who, flags
        wanted = heard(states, port, who, flags)
        out = talks[port].say(who, flags)
        assert out.reasons == {Reason[wanted]: 1}, context
        assert out.verdict == (WAY[mode] if wanted == SENT[who] else SHOT), context
        if port in states:
            assert talks[port].lasts(silence(states[port])), context
        tc.advance(draw.choice((0, 0.1, 2)))
    assert len(tc.entries("nat_fwd")) == len(tc.entries("nat_rev")) == len(states)


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


@MODES
def test_seen_is_written_in_both_directions(tc: Translator, mode: str) -> None:
    serve(tc, mode=mode)
    talk = Conversation(tc, mode=mode)
    for segment in WAYS["open"]:
        talk.sends(segment)
        tc.advance(5)
    fwd, rev = talk.pair()
    assert (int(fwd["seen_ns"]) - START_NS, int(rev["seen_ns"]) - START_NS) == (
        10 * NS_PER_S,
        5 * NS_PER_S,
    )
    assert int(fwd["state"]) == Flow.CONFIRMED


@MODES
def test_what_xdp_made_is_not_judged(tc: Translator, mode: str) -> None:
    """It saw but one direction of it, perhaps: TC translates, and has no opinion."""
    serve(tc, mode=mode)
    talk = Conversation(tc, mode=mode)
    talk.say("c", "S")
    for name in ("nat_fwd", "nat_rev"):
        ((key, value),) = tc.entries(name)
        value["track"] = 0
        tc.map(name).update(key, value)
    talk.sends(("c", "A"), ("b", "FA"))
    assert int(talk.pair()[1]["closed"]) == 2
