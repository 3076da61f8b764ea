# SPDX-License-Identifier: Apache-2.0
"""XDP and TC send every packet to the same backend, whichever of them sees it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

from shunt.lb import maglev
from tests.packets import quic
from tests.packets.agreement import BACKENDS, KINDS, SLOTS, Programs, Scene, loaded
from tests.packets.balancer import TCP, UDP, UP, Event, Flag, Out, Reason, Slot
from tests.packets.frames import packed
from tests.packets.test_quic import cid
from tests.packets.test_tc_tracking import IDLE_S, SENT, Conversation, step
from tests.packets.translator import CLIENT, FAMILIES, PROTOS, VIP

WEIGHTS = (1, 2, 3, 10, 50)
PAYLOADS = (
    *(quic.short(cid(n)) for n in range(4)),
    *(quic.long(cid(n), quic.V1, kind) for n in range(4) for kind in (0, 2)),
    quic.long(bytes(8)),
    quic.short(cid(0, 5)),
    b"no id",
)
QUIC_EVENTS = {"QUIC_BY_ID", "QUIC_FIRST", "QUIC_UNROUTABLE", "QUIC_DOWN"}


@pytest.fixture(scope="module")
def loaded_programs() -> Iterator[Programs]:
    with loaded() as programs:
        yield programs


@pytest.fixture
def programs(loaded_programs: Programs) -> Programs:
    loaded_programs.begin(0)
    return loaded_programs


# First packets ----------------------------------------------------------------------------------


@FAMILIES
@PROTOS
@pytest.mark.parametrize("kind", ["plain", "hash client", "any port"])
def test_a_first_packet_whatever_the_mode(
    programs: Programs, ip: int, proto: int, kind: str
) -> None:
    """Of mode local, too, which is TC's alone. Slots are by weight."""
    owners = maglev.fill(BACKENDS[ip], WEIGHTS, SLOTS)
    draw, base = random.Random(ip), CLIENT[ip][:-1]
    first = [(f"{base}{draw.randrange(1, 200)}", draw.randrange(1024, 65535)) for _ in range(60)]
    port = KINDS[kind][1] or 7000
    chosen = []
    for mode in ("nat", "local"):
        programs.begin(0)
        scene = Scene(programs, ip, proto, kind, mode)
        scene.set_slots([scene.ids[n] for n in owners])
        for host, sport in first:
            sent = packed(proto, host, VIP[ip], "S", sport, port)
            if mode == "nat":
                assert programs.run(sent).reasons == {Reason.SENT_TO_BACKEND: 1}
            else:
                assert programs.tc.run(sent).reasons == {Reason.SENT_TO_BACKEND: 1}
        chosen.append(programs.tc.counts("backend_stats")["packets"].tolist())
    assert chosen[0] == chosen[1]
    assert chosen[0][scene.ids[-1]] > 30, "the heaviest has most"


@pytest.mark.parametrize("odd", range(3))
def test_that_a_disagreement_is_noticed(programs: Programs, odd: int) -> None:
    scene = Scene(programs, 4, TCP)
    scene.set_slots(scene.ids[0])
    scene.send(1)
    scene.services[odd].set_slots(scene.ids[1])
    with pytest.raises(AssertionError):
        scene.send(2)


# Slots and backends that change -----------------------------------------------------------------

CONDITIONS = {"up": UP, "drains": UP | Flag.DRAINED, "fails": int(Flag.KNOWN), "gone": 0}


@FAMILIES
@PROTOS
@pytest.mark.parametrize("state", ["SETTLED", "MOVING", "LINGERING"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_slots_that_change_hands(
    programs: Programs, ip: int, proto: int, state: str, condition: str
) -> None:
    """Of a translated flow its entry decides, and not the slot: S73, S76."""
    scene = Scene(programs, ip, proto)
    old, new = scene.ids[:2]
    scene.set_slots(old)
    for sport in (1, 2):
        scene.reply(scene.send(sport))
        assert scene.backend_of(scene.send(sport, "A")) == old
    scene.set_slots(new, old, Slot[state])
    scene.set_flags(old, CONDITIONS[condition])
    goes_on = {"gone": None}.get(condition, old)
    begins = old if condition in {"up", "drains"} else new
    if proto == UDP:
        goes_on = begins
    assert scene.backend_of(scene.send(1, "A")) == goes_on, "known"
    assert scene.backend_of(scene.send(2, "S")) == begins, "known, again from the beginning"
    assert scene.backend_of(scene.send(3, "A")) == (None if proto == TCP else new), "unknown"
    assert scene.backend_of(scene.send(4, "S")) == new, "new"
    scene.set_flags(old, UP)
    assert scene.backend_of(scene.send(2, "S")) == begins, "and there it stays"


@FAMILIES
@PROTOS
@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_client_that_is_remembered(
    programs: Programs, ip: int, proto: int, condition: str
) -> None:
    """S49, S52, S54: by whichever program it was seen first."""
    scene = Scene(programs, ip, proto, "affinity")
    old, new = scene.ids[:2]
    for host in range(1, 6):
        client = f"{CLIENT[ip][:-1]}{host}"
        scene.set_flags(old, UP)
        scene.set_slots(old)
        assert scene.backend_of(scene.send(1, host=client)) == old
        scene.set_slots(new)
        scene.set_flags(old, CONDITIONS[condition])
        then = old if condition == "up" else new
        assert scene.backend_of(scene.send(2, host=client)) == then
        scene.set_flags(old, UP)
        assert scene.backend_of(scene.send(3, host=client)) == then


# Whoever sees which packet ----------------------------------------------------------------------

Said = tuple[tuple[str, str], ...]
OPENED: Said = (("c", "S"), ("b", "SA"), ("c", "A"))
# What a connection may come to, and whether a SYN in its tuple is another's then.
ENDS: dict[str, tuple[Said, bool]] = {
    "open": (OPENED, False),
    "refused": ((("c", "S"), ("b", "RA")), True),
    "client closed": ((*OPENED, ("c", "FA")), False),
    "backend closed": ((*OPENED, ("b", "FA")), False),
    "both closed": ((*OPENED, ("c", "FA"), ("b", "FA")), True),
    "client reset": ((*OPENED, ("c", "R")), True),
    "backend reset": ((*OPENED, ("b", "R")), True),
    "client reset, and goes on": ((*OPENED, ("c", "R"), ("c", "A")), False),
    "backend reset, and closes": ((*OPENED, ("b", "R"), ("b", "FA")), False),
    "client reset, backend goes on": ((*OPENED, ("c", "R"), ("b", "PA")), True),
}


@FAMILIES
@pytest.mark.parametrize("end", ENDS)
def test_whoever_sees_which_packet(programs: Programs, ip: int, end: str) -> None:
    """Either program may see any of a connection's packets: none is refused, all go to its
    backend, and the next SYN begins another only if the connection is over (S76)."""
    segments, over = ENDS[end]
    scene = Scene(programs, ip, TCP)
    old, new = scene.ids[:2]
    for seen_by in product(programs.sharing, repeat=len(segments) + 1):
        scene.set_slots(old)
        talk = Conversation(programs.sharing[1], ip, "nat")
        for program, (who, flags) in zip(seen_by, segments, strict=False):
            assert talk.say(who, flags, program).reasons == {Reason[SENT[who]]: 1}
            assert talk.backend[0] == BACKENDS[ip][0]
        if end == "open":
            assert talk.lasts(IDLE_S)
        scene.set_slots(new)
        assert talk.say("c", "S", seen_by[-1]).reasons == {Reason.SENT_TO_BACKEND: 1}
        assert talk.backend[0] == BACKENDS[ip][over], seen_by
        for table in ("nat_fwd", "nat_rev"):
            talk.tc.map(table).delete_many(talk.tc.map(table).items()[0])


# Random histories -------------------------------------------------------------------------------


class History:
    """Packets of a few clients, while slots and backends change."""

    def __init__(self, scene: Scene, seed: int) -> None:
        self.scene, self.draw = scene, random.Random(seed)
        base = CLIENT[scene.ip][:-1]
        ports = (scene.port,) if scene.port else (53, 80, 15000)
        self.flows = list(product([f"{base}{n}" for n in (1, 2, 3)], (2001, 2002), ports))
        self.sent: dict[Any, Out] = {}
        self.state: dict[Any, str] = {}
        self.seen = Counter[str]()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            x = self.draw.random()
            if x < 0.07:
                self._slots()
            elif x < 0.14:
                condition = self.draw.choice([*CONDITIONS, "up", "up"])
                self.scene.set_flags(self.draw.choice(self.scene.ids), CONDITIONS[condition])
            elif x < 0.2:
                self.scene.programs.advance(self.draw.choice((0.1, 2, 70)))
            else:
                self._packet(self.draw.choice(self.flows))

    def _slots(self) -> None:
        here = [b for b in self.scene.ids if self.scene.flags[b]]
        cur = self.draw.sample(here, self.draw.randint(1, len(here))) if here else 0
        if self.draw.random() < 0.1:
            cur = 0
        state = self.draw.choice((Slot.SETTLED, Slot.MOVING, Slot.LINGERING))
        self.scene.set_slots(cur, self.draw.choice(here) if here else 0, state)

    def _packet(self, flow: tuple[str, int, int]) -> None:
        """Of those that a connection in its state may have; the tracker has its own test."""
        scene, was = self.scene, self.state.get(flow)
        who = self.draw.choice("ccb") if flow in self.sent else "c"
        flags = self.draw.choice(("S", "SA", "A", "PA", "A", "FA", "R"))
        if scene.proto == TCP and was and step(was, who, flags) is None:
            return
        if who == "b":
            out = scene.reply(self.sent[flow], flags)
        else:
            host, sport, dport = flow
            payload = self.draw.choice(PAYLOADS) if "quic" in scene.kind else b""
            out = scene.send(sport, flags, host=host, dport=dport, payload=payload)
        (reason,) = out.reasons
        self.seen[reason.name] += 1
        self.seen.update(event.name for event in out.events)
        if reason == Reason.SENT_TO_BACKEND:
            self.sent[flow] = out
            self.seen[f"to {scene.backend_of(out)}"] += 1
        if Event.NAT_CREATED in out.events:
            self.state[flow] = "half-open"
        elif reason in {Reason.SENT_TO_BACKEND, Reason.SENT_TO_CLIENT} and was:
            self.state[flow] = step(was, who, flags) or was


@FAMILIES
@pytest.mark.parametrize(
    ("proto", "kind"),
    [(p, k) for p in (TCP, UDP) for k in KINDS if p == UDP or "quic" not in k],
)
def test_random_histories(programs: Programs, ip: int, proto: int, kind: str) -> None:
    programs.begin(ip)
    history = History(Scene(programs, ip, proto, kind), ip)
    history.run(250)
    wanted = {"SENT_TO_BACKEND", "SENT_TO_CLIENT", "NAT_CREATED"}
    assert sum(what.startswith("to ") for what in history.seen) >= 3, history.seen
    wanted |= {"DROP_NAT_NO_FLOW"} if proto == TCP else set()
    wanted |= {"CLIENT_REMEMBERED"} if "affinity_ns" in KINDS[kind][0] else set()
    wanted |= QUIC_EVENTS if "quic" in kind else set()
    assert wanted <= set(history.seen), history.seen
