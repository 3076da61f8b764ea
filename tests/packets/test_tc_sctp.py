# SPDX-License-Identifier: Apache-2.0
"""The tracker and SCTP: every state and chunk, and random histories against an oracle.

The oracle is written from RFC 9260 as states of an association; the programs keep bits.
"""

from __future__ import annotations

import random

import pytest
from scapy.layers.l2 import Ether

from tests.packets.balancer import SCTP, TCP, Balancer, Reason
from tests.packets.frames import network, sctp, verify
from tests.packets.test_fragments import fragments_of, reassemble
from tests.packets.test_icmp import error, quote_of
from tests.packets.test_icmp import tuple_of as quoted_tuple
from tests.packets.test_tc_tracking import IDLE_S, OWN, SENT, Conversation, broken_by, silence
from tests.packets.translator import (
    BACKENDS,
    CLIENT,
    FAMILIES,
    MODES,
    NEXT,
    SHOT,
    VIP,
    WAY,
    Track,
    Translator,
    expect,
    tuple_of,
)

ANY_TIME = ("DATA", "SACK", "HEARTBEAT", "ERROR", "SACK+DATA")
# What a packet may have; those with + are bundles, the last ones none that anybody may send.
CHUNKS = (
    "INIT", "INIT ACK", "COOKIE ECHO", "COOKIE ECHO+DATA", "COOKIE ACK", "COOKIE ACK+DATA",
    *ANY_TIME, "SHUTDOWN", "SACK+SHUTDOWN", "SHUTDOWN ACK", "SHUTDOWN COMPLETE", "ABORT",
    "SACK+ABORT", "INIT+DATA", "INIT ACK+SACK", "SHUTDOWN COMPLETE+SACK",
)  # fmt: skip
NEVER = ("INIT+DATA", "INIT ACK+SACK", "SHUTDOWN COMPLETE+SACK")
SILENCE_S = {
    "half-open": 60, "answered": 60, "echoed": 60, "open": IDLE_S, "left": 300, "right": 300,
    "closed": 60,
}  # fmt: skip
LIVING = {"DATA", "SACK", "HEARTBEAT"}  # what nobody sends without an association
OPENED = (("c", "INIT"), ("b", "INIT ACK"), ("c", "COOKIE ECHO"), ("b", "COOKIE ACK"))
# How each state is come to.
WAYS: dict[str, tuple[tuple[str, str], ...]] = {
    "half-open": OPENED[:1],
    "answered": OPENED[:2],
    "echoed": OPENED[:3],
    "open": OPENED,
    "left": (*OPENED, ("c", "SHUTDOWN")),
    "right": (*OPENED, ("b", "SHUTDOWN")),
    "closed": (*OPENED, ("c", "SHUTDOWN"), ("b", "SHUTDOWN ACK")),
    "answered/c": (*OPENED[:2], ("c", "ABORT")),
    "open/c": (*OPENED, ("c", "ABORT")),
    "open/b": (*OPENED, ("b", "ABORT")),
    "open/bc": (*OPENED, ("b", "ABORT"), ("c", "SACK+ABORT")),
    "closed/b": (*OPENED, ("c", "SHUTDOWN"), ("b", "SHUTDOWN ACK"), ("b", "ABORT")),
}


def step(state: str, who: str, chunks: str) -> str | None:
    """The oracle: the next state, or None if the packet is refused."""
    names, (of, _, broken) = set(chunks.split("+")), state.partition("/")
    if chunks in NEVER or (who, chunks) == ("b", "INIT"):
        return None
    if "ABORT" in names:
        return broken_by(of, broken + who)
    if chunks == "INIT" and (broken or of == "closed"):
        return "half-open"
    after = _unbroken(of, who, chunks, names)
    return after and broken_by(after, broken.replace(who, "") if names & LIVING else broken)


def _unbroken(state: str, who: str, chunks: str, names: set[str]) -> str | None:
    opening = state in {"half-open", "answered", "echoed"}
    if who == "c":
        if chunks == "INIT" or (chunks == "SHUTDOWN COMPLETE" and opening):
            return state
        if names & {"INIT ACK", "COOKIE ACK"} or state == "half-open":
            return None
        if "COOKIE ECHO" in names:
            return "echoed" if state == "answered" else state
        if opening:
            return None
        return _ending(state, names, "left", "right")
    if chunks == "INIT ACK":
        return "answered" if state == "half-open" else state
    if chunks == "SHUTDOWN ACK" and opening:
        return state
    if "COOKIE ECHO" in names or state in {"half-open", "answered"}:
        return None
    if "COOKIE ACK" in names:
        return "open" if state == "echoed" else state
    if state == "echoed" and names & {"SHUTDOWN", "SHUTDOWN COMPLETE"}:
        return None if "SHUTDOWN COMPLETE" in names else "early"
    return _ending(state, names, "right", "left")


def _ending(state: str, names: set[str], own: str, other: str) -> str | None:
    """`own` is the state in which this end has said SHUTDOWN, `other` that of the other one."""
    if "SHUTDOWN ACK" in names and state not in {other, "closed"}:
        return None
    if "SHUTDOWN COMPLETE" in names and state != "closed":
        return None
    if names & {"SHUTDOWN", "SHUTDOWN ACK"}:
        return {"open": own, other: "closed"}.get(state, state)
    return state


def associate(tc: Translator, ip: int = 4, mode: str = "local", port: int = 40000) -> Conversation:
    """One client's port, and its backend, which serves the VIP's port."""
    return Conversation(tc, ip, mode, SCTP, port)


def serve(tc: Translator, ip: int, mode: str = "local") -> None:
    tc.add_service(VIP[ip], 80, SCTP, mode, BACKENDS[ip], idle_s=IDLE_S)


def is_early(state: str, who: str, chunks: str) -> bool:
    """Whether it is a SHUTDOWN that has a test of its own."""
    early = (state.partition("/")[0], who) == ("echoed", "b")
    return early and "SHUTDOWN" in chunks.split("+")


@MODES
@FAMILIES
@pytest.mark.parametrize("state", WAYS)
def test_every_chunk_in_every_state(tc: Translator, state: str, ip: int, mode: str) -> None:
    serve(tc, ip, mode)
    for i, (who, chunks) in enumerate((w, c) for w in "cb" for c in CHUNKS):
        if is_early(state, who, chunks):
            continue
        talk = associate(tc, ip, mode, 30000 + i)
        talk.sends(*WAYS[state])
        assert talk.lasts(silence(state, SILENCE_S))
        out, wanted = talk.say(who, chunks), step(state, who, chunks)
        if wanted is None:
            expect(out, SHOT, "DROP_NAT_INVALID")
        else:
            expect(out, WAY[mode], SENT[who])
        assert talk.lasts(silence(wanted or state, SILENCE_S)), (state, who, chunks)
        fwd, rev = talk.pair()
        assert fwd["track"] == rev["track"], "the two entries disagree"


@MODES
def test_a_shutdown_whose_cookie_ack_was_lost_before_us(tc: Translator, mode: str) -> None:
    serve(tc, 4, mode)
    talk = associate(tc, mode=mode)
    talk.sends(*WAYS["echoed"], ("b", "SHUTDOWN"))
    assert talk.lasts(300)
    talk.sends(("c", "COOKIE ECHO"))


@MODES
@pytest.mark.parametrize("seed", range(4))
def test_random_histories(tc: Translator, seed: int, mode: str) -> None:
    ip = (4, 6)[seed % 2]
    serve(tc, ip, mode)
    draw = random.Random(seed)
    states: dict[int, str] = {}
    reached = set()
    talks = {port: associate(tc, ip, mode, port) for port in range(40000, 40006)}
    likely = [*OPENED, *OPENED, ("c", "DATA"), ("b", "SACK"), ("c", "SHUTDOWN"),
              ("b", "SHUTDOWN ACK"), ("c", "SHUTDOWN COMPLETE"), ("b", "SHUTDOWN")]  # fmt: skip
    for _ in range(500):
        port = draw.choice(sorted(talks))
        who, chunks = draw.choice(likely)
        if draw.random() < 0.15:
            who, chunks = draw.choice("cb"), draw.choice(CHUNKS)
        state = states.get(port)
        if (who == "b" and state is None) or is_early(state or "", who, chunks):
            continue
        out, context = talks[port].say(who, chunks), (port, state, who, chunks)
        if state is None and chunks != "INIT":
            assert out.reasons == {Reason.DROP_NAT_NO_FLOW: 1}, context
            continue
        wanted = step(state, who, chunks) if state else "half-open"
        reason = SENT[who] if wanted else "DROP_NAT_INVALID"
        assert out.said == (WAY[mode] if wanted else SHOT, {Reason[reason]: 1}), context
        states[port] = wanted or states[port]
        assert talks[port].lasts(silence(states[port], SILENCE_S)), context
        reached.add(states[port])
        tc.advance(draw.choice((0, 0.1, 2)))
    assert reached >= {"half-open", "answered", "echoed", "open", "closed"}
    assert any("/" in state for state in reached)
    assert len(tc.entries("nat_fwd")) == len(tc.entries("nat_rev")) == len(states)


def test_that_the_oracle_can_disagree(tc: Translator) -> None:
    serve(tc, 4)
    talk = associate(tc)
    talk.say("c", "INIT")
    assert talk.say("c", "COOKIE ECHO").reasons != {Reason.SENT_TO_BACKEND: 1}
    assert step("half-open", "c", "COOKIE ECHO") is None


@FAMILIES
def test_what_no_association_sends(tc: Translator, ip: int) -> None:
    """A tag of zero is INIT's alone (8.5.1); chunks have a header's length at least."""
    serve(tc, ip)
    talk = associate(tc, ip)
    talk.sends(*OPENED)
    here = (CLIENT[ip], VIP[ip])
    expect(tc.run(sctp(*here, "DATA", tag=0)), SHOT, "DROP_NAT_INVALID")
    expect(tc.run(sctp(*here, "INIT", tag=9)), SHOT, "DROP_NAT_INVALID")
    expect(tc.run(sctp(*here, "INIT", tag=9, sport=5)), SHOT, "DROP_NAT_NO_FLOW")
    short = bytearray(bytes(sctp(*here, "SACK")))
    at = 14 + (20 if ip == 4 else 40) + 12
    short[at + 2 : at + 4] = b"\0\3"
    expect(tc.run(bytes(short)), SHOT, "DROP_NAT_INVALID")
    expect(tc.run(bytes(sctp(*here, "SACK"))[: at + 2]), SHOT, "DROP_NAT_MALFORMED")
    assert talk.lasts(IDLE_S)


@FAMILIES
def test_chunks_behind_others_are_seen(tc: Translator, ip: int) -> None:
    """An ABORT comes last of what is bundled with it; nothing after DATA is looked at."""
    serve(tc, ip)
    for count, lasts in ((7, 10), (8, IDLE_S)):
        talk = associate(tc, ip, port=count)
        talk.sends(*OPENED)
        assert talk.say("b", "+".join(["SACK"] * count + ["ABORT"])).verdict == NEXT
        assert talk.lasts(lasts)


@MODES
@FAMILIES
def test_translation_is_exact(tc: Translator, ip: int, mode: str) -> None:
    """Addresses change and nothing else: the checksum has none, and the ports stay."""
    serve(tc, ip, mode)
    sent = sctp(CLIENT[ip], VIP[ip], sport=40000)
    out = tc.run(sent)
    assert out.reasons == {Reason.SENT_TO_BACKEND: 1}
    src, sport, dst, dport = tuple_of(out.packet)
    own = (CLIENT if mode == "local" else OWN)[ip]
    assert (src, sport, dport) == (own, 40000, 80)
    assert dst in BACKENDS[ip]
    l4 = 14 + (20 if ip == 4 else 40)
    assert out.data[l4:] == bytes(sent)[l4:]
    back = sctp(dst, own, "INIT ACK", sport=80, dport=40000)
    out = tc.leave(back) if mode == "local" else tc.run(back)
    assert out.reasons == {Reason.SENT_TO_CLIENT: 1}
    assert tuple_of(out.packet) == (VIP[ip], 80, CLIENT[ip], 40000)
    assert out.data[l4:] == bytes(back)[l4:]


@FAMILIES
def test_a_port_that_another_client_has_is_refused(tc: Translator, ip: int) -> None:
    """With one address for all, clients are told apart by their ports, which they keep."""
    tc.add_service(VIP[ip], 80, SCTP, "nat", BACKENDS[ip][:1])
    first, other = CLIENT[ip], CLIENT[ip][:-1] + "2"
    assert tc.run(sctp(first, VIP[ip])).reasons == {Reason.SENT_TO_BACKEND: 1}
    expect(tc.run(sctp(other, VIP[ip])), SHOT, "DROP_NAT_SCTP_PORT")
    assert len(tc.entries("nat_fwd")) == len(tc.entries("nat_rev")) == 1
    assert tc.map("nat_refused").mapped()["flows"][1] == 1
    assert tc.run(sctp(other, VIP[ip], sport=40001)).reasons == {Reason.SENT_TO_BACKEND: 1}
    # The first goes on; once it has ended, its port is free with it.
    assert tc.run(sctp(first, VIP[ip])).reasons == {Reason.SENT_TO_BACKEND: 1}


def test_another_port_of_the_backend_is_never_half_translated(tc: Translator) -> None:
    """The configuration refuses it; if the tables had it nevertheless, nothing is sent."""
    tc.add_service(VIP[4], 80, SCTP, backends=BACKENDS[4][:1], backend_port=8080)
    expect(tc.run(sctp(CLIENT[4], VIP[4])), SHOT, "DROP_BAD_TABLE")


@FAMILIES
def test_without_backends_the_client_is_told(tc: Translator, ip: int) -> None:
    tc.add_service(VIP[ip], 80, SCTP)
    out = tc.run(sctp(CLIENT[ip], VIP[ip]))
    assert out.reasons == {Reason.SENT_UNREACHABLE: 1}
    assert quoted_tuple(quote_of(out.packet, ip)) == (CLIENT[ip], 40000, VIP[ip], 80)


@FAMILIES
@pytest.mark.parametrize("kind", ["too-big", "unreachable"])
def test_errors_reach_both_ends(tc: Translator, ip: int, kind: str) -> None:
    """The tag in the quote stays: an end takes no error without its own (RFC 9260, 10)."""
    serve(tc, ip)
    talk = associate(tc, ip)
    talk.sends(*OPENED)
    host = talk.backend[0]
    said = sctp(VIP[ip], CLIENT[ip], "DATA", sport=80, dport=40000, tag=0xABCDEF01)
    out = tc.run(error(ip, VIP[ip], said.payload, kind=kind))
    expect(out, NEXT, "SENT_ERROR_TO_BACKEND")
    inner = quote_of(out.packet, ip)
    assert quoted_tuple(inner) == (host, 80, CLIENT[ip], 40000)
    assert b"\xab\xcd\xef\x01" in bytes(inner)
    said = sctp(CLIENT[ip], host, "DATA", sport=40000, dport=80, tag=0xABCDEF02)
    out = tc.leave(error(ip, CLIENT[ip], said.payload, kind=kind))
    expect(out, NEXT, "SENT_ERROR_TO_CLIENT")
    inner = quote_of(out.packet, ip)
    assert quoted_tuple(inner) == (CLIENT[ip], 40000, VIP[ip], 80)
    assert b"\xab\xcd\xef\x02" in bytes(inner)


@FAMILIES
def test_fragments_follow_the_first(tc: Translator, ip: int) -> None:
    serve(tc, ip)
    talk = associate(tc, ip)
    talk.sends(*OPENED)
    frame = sctp(CLIENT[ip], VIP[ip], "DATA", payload=bytes(range(256)) * 15)
    outs = [tc.run(part) for part in fragments_of(frame)]
    assert [out.reasons for out in outs] == [{Reason.SENT_TO_BACKEND: 1}] * len(outs)
    whole = reassemble([network(Ether(out.data)) for out in outs])
    assert (whole.src, whole.dst) == (CLIENT[ip], talk.backend[0])


def test_the_same_port_of_two_protocols(tc: Translator) -> None:
    """S6."""
    serve(tc, 4)
    tc.add_service(VIP[4], 80, TCP, backends=["10.0.0.9"])
    assert tuple_of(tc.run(sctp(CLIENT[4], VIP[4])).packet)[2] in BACKENDS[4]
    assert {int(k["proto"]) for k, _ in tc.entries("nat_fwd")} == {SCTP}


@FAMILIES
def test_xdp_leaves_what_is_translated_to_tc(lb: Balancer, ip: int) -> None:
    with Translator() as tc:
        tc.add_service(VIP[ip], 80, SCTP, "nat", BACKENDS[ip][:1])
        tc.open_port(SCTP, 20000)
        xdp = Balancer(maps=tc.object.maps)
        try:
            sent = sctp(CLIENT[ip], VIP[ip], sport=20000)
            out = xdp.run(sent)
            assert (out.data, out.reasons) == (bytes(sent), {Reason.PASS_TO_TC: 1})
            src, sport, dst, dport = tuple_of(tc.run(sent).packet)
            reply = sctp(dst, src, "INIT ACK", sport=dport, dport=sport)
            out = xdp.run(reply)
            assert (out.data, out.reasons) == (bytes(reply), {Reason.PASS_NOT_OURS: 1})
            back = tc.run(reply)
            assert back.reasons == {Reason.SENT_TO_CLIENT: 1}
            assert verify(back.data)
        finally:
            xdp.close()


def test_the_cookie_has_a_bit_of_its_own() -> None:
    assert int(Track.ECHOED) not in {int(Track[n]) for n in ("ANSWERED", "ASSURED", "MASQUERADED")}
