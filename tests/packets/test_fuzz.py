# SPDX-License-Identifier: Apache-2.0
"""A little of `make fuzz-packets`: what is kept, some thousand mutations; and the checks bite."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pytest

from tests.fuzz import kept
from tests.fuzz.balancer_target import BalancerTarget
from tests.fuzz.balancing import Balancing
from tests.fuzz.decap_target import DecapTarget
from tests.fuzz.headers import IPV4, SCTP, TCP, UDP, Headers, packed, read, reply_to
from tests.fuzz.mutations import mutations
from tests.fuzz.packets import TARGETS, Run
from tests.fuzz.served import NUMBERS, Served, services
from tests.fuzz.target import CHANGED, LONGEST, SENT, Broken, Target
from tests.fuzz.translator_target import EGRESS, INGRESS, TranslatorTarget
from tests.packets.frames import either, ether, ip, tcp
from tests.packets.test_tc_masquerade import OWN, POD, WORLD

NAMES = pytest.mark.parametrize("target", list(TARGETS), indirect=True)
CLIENT = "192.0.2.1"


class Targets:
    """Each loaded once, when it is first asked for."""

    def __init__(self) -> None:
        self._loaded: dict[str, Target] = {}

    def take(self, name: str) -> Target:
        if name not in self._loaded:
            self._loaded[name] = TARGETS[name](True)
        target = self._loaded[name]
        target.reset()
        target.before = target.counts()
        return target

    def close(self) -> None:
        for target in self._loaded.values():
            target.close()


@pytest.fixture(scope="module")
def targets() -> Iterator[Targets]:
    found = Targets()
    yield found
    found.close()


@pytest.fixture
def target(targets: Targets, request: pytest.FixtureRequest) -> Target:
    return targets.take(request.param)


@pytest.fixture
def lb(targets: Targets) -> BalancerTarget:
    found = targets.take("lb")
    assert isinstance(found, BalancerTarget)
    return found


@pytest.fixture
def tc(targets: Targets) -> TranslatorTarget:
    found = targets.take("tc")
    assert isinstance(found, TranslatorTarget)
    return found


@pytest.fixture
def decap(targets: Targets) -> DecapTarget:
    found = targets.take("decap")
    assert isinstance(found, DecapTarget)
    return found


def name_of(target: Target) -> str:
    return next(name for name, kind in TARGETS.items() if kind is type(target))


@pytest.mark.parametrize(
    ("target", "packets", "reasons"),
    [("lb", 6000, 22), ("tc", 6000, 18), ("decap", 3000, 12)],
    indirect=["target"],
)
def test_all_that_is_known_and_mutations_of_it(target: Target, packets: int, reasons: int) -> None:
    run = Run(name_of(target), target, seed=1)
    run.go(packets)
    assert len(run.seen) >= reasons, {target.reasons(r).name for r in run.seen}


@NAMES
def test_what_is_kept_reaches_what_it_is_named_after(target: Target) -> None:
    found = {
        path.stem: kept.reason_of(target, kept.load(path, target.hooks))
        for path in kept.files(name_of(target))
    }
    assert found == {name: {name} for name in found}
    assert len(found) >= 13


def test_what_is_kept_needs_all_of_it(lb: BalancerTarget) -> None:
    steps = [(0, bytes(frame)) for frame in (tcp(CLIENT, "203.0.113.32", "S"),)]
    (path,) = (p for p in kept.files("lb") if p.stem == "sent_to_client")
    assert kept.reason_of(lb, kept.load(path, lb.hooks)[-1:]) != {"sent_to_client"}
    wanted = kept.load(path, lb.hooks)
    comes = kept.fewest(
        [*steps, *wanted[:-1], *steps, wanted[-1]],
        lambda them: kept.reason_of(lb, them) == {"sent_to_client"},
    )
    assert comes == wanted


@NAMES
def test_mutations_are_frames(target: Target) -> None:
    corpus = list(target.seeds())
    found = mutations(random.Random(2), corpus, len(target.hooks))
    for hook, frame in map(target.runnable, islice(found, 1000)):
        assert 14 <= len(frame) <= LONGEST
        assert 0 <= hook < len(target.hooks)


def test_a_services_number_is_its_own() -> None:
    """Kept packets name VIPs: who joins comes last, and changes no other's."""
    every = {
        (s.version, s.mode, s.proto, s.state): s.vip
        for s in services(tuple(NUMBERS), (TCP, UDP, SCTP))
    }
    few = services(("local", "nat"), (UDP,))
    assert {every[s.version, s.mode, s.proto, s.state] == s.vip for s in few} == {True}
    assert len(set(every.values())) == len(every)
    assert NUMBERS["nat"] == 2
    assert len(set(NUMBERS.values())) == len(NUMBERS)


# The checks can fail ----------------------------------------------------------------------------


def served(target: Balancing, mode: str, proto: int = TCP, version: int = 4) -> Served:
    return next(
        s
        for s in target.directory.services
        if (s.mode, s.proto, s.version, s.state) == (mode, proto, version, "settled")
    )


def said(target: Target, hook: int, what: str, frame: Any, out: bytes) -> str:
    """What is said if this had become of a frame."""
    was, now = read(bytes(frame)), read(out)
    assert was
    assert now
    target.out = out
    return target.astray(hook, what, bytes(frame), was, now)


def became(target: Target, hook: int, frame: Any) -> tuple[str, bytes]:
    ((_, what, out),) = target.send([(hook, bytes(frame))])[1]
    return what, out


@pytest.mark.parametrize("mode", ["dsr-ipip", "dsr-l2", "nat", "dsr-geneve", "nat46"])
@pytest.mark.parametrize("version", [4, 6])
def test_another_services_backend_is_astray(lb: BalancerTarget, mode: str, version: int) -> None:
    mine, others = served(lb, mode, TCP, version), served(lb, mode, UDP, version)
    client = CLIENT if version == 4 else "2001:db8:c::1"
    frame = either(TCP, client, mine.vip)
    what, out = became(lb, 0, frame)
    assert said(lb, 0, what, frame, out) == ""
    h = read(out)
    assert h
    i = list(mine.backends).index(h.to)
    mac, address = list(others.backends.items())[i]
    for to, destination in ((mac, address), (h.to, address), (mac, h.dst)):
        assert said(lb, 0, what, frame, sent_to(out, h, to, destination)), (to, destination)


def sent_to(out: bytes, h: Headers, mac: bytes, address: bytes) -> bytes:
    at = h.at + (16 if out[12:14] == IPV4 else 24)
    return mac + out[6:at] + address + out[at + len(address) :]


def test_another_mode_is_astray(lb: BalancerTarget) -> None:
    frame = either(TCP, CLIENT, served(lb, "dsr-l2").vip)
    for mode in ("dsr-ipip", "nat", "dsr-geneve"):
        other = served(lb, mode)
        _, out = became(lb, 0, either(TCP, CLIENT, other.vip))
        moved = Served(4, other.vip, "dsr-l2", TCP, "settled", other.number)
        was, now = read(bytes(either(TCP, CLIENT, other.vip))), read(out)
        assert was
        assert now
        assert not moved.sends(was, bytes(frame), out, now)


def test_an_answer_to_somebody_else_is_astray(lb: BalancerTarget) -> None:
    empty = next(s for s in lb.directory.services if s.state == "empty" and s.proto == TCP)
    frame = either(TCP, CLIENT, empty.vip)
    what, out = became(lb, 0, frame)
    assert said(lb, 0, what, frame, out) == ""
    h = read(out)
    assert h
    assert said(lb, 0, what, frame, sent_to(out, h, h.to, packed("192.0.2.2")))
    assert said(lb, 0, what, frame, sent_to(out, h, bytes(6), h.dst))


def test_a_reply_to_somebody_else_is_astray(lb: BalancerTarget) -> None:
    _, out = became(lb, 0, either(TCP, CLIENT, served(lb, "nat").vip))
    reply = reply_to(out)
    assert reply
    what, back = became(lb, 0, reply)
    h = read(back)
    assert h
    assert said(lb, 0, what, reply, back) == ""
    assert said(lb, 0, what, reply, sent_to(back, h, h.to, packed("192.0.2.2")))


def test_what_tc_sends_elsewhere_is_astray(tc: TranslatorTarget) -> None:
    local, other = served(tc, "local", UDP), served(tc, "local")
    frame = either(UDP, CLIENT, local.vip)
    what, out = became(tc, INGRESS, frame)
    h = read(out)
    assert h
    stray = sent_to(out, h, h.to, packed(other.addresses[0]))
    assert said(tc, INGRESS, what, frame, out) == ""
    assert said(tc, INGRESS, what, frame, stray)
    assert said(tc, INGRESS, CHANGED, frame, bytes(6) + out[6:])
    pod = either(UDP, POD[4], WORLD[4], dport=443)
    what, out = became(tc, EGRESS, pod)
    h = read(out)
    assert h
    assert h.src == packed(OWN[4])
    assert said(tc, EGRESS, what, pod, out) == ""
    assert said(tc, EGRESS, what, pod, sent_to(out, h, h.to, packed(POD[4])))
    assert said(tc, EGRESS, SENT, pod, out)
    assert said(tc, EGRESS, what, either(UDP, CLIENT, WORLD[4], dport=443), out)


def test_what_decap_opens_for_another_host_is_astray(decap: DecapTarget) -> None:
    frame = next(f for hook, f in decap.seeds() if hook == 0 and decap.send([(hook, f)])[1])
    _, out = became(decap, 0, frame)
    assert said(decap, 0, CHANGED, frame, out) == ""
    plain = bytes(ether(ip(CLIENT, "10.9.0.254") / out[34:]))
    assert said(decap, 0, CHANGED, plain, out)
    assert said(decap, 0, CHANGED, frame, out[:-1])
    assert said(decap, 0, CHANGED, frame, bytes(6) + out[6:])


@NAMES
def test_what_is_not_counted_is_noticed(target: Target) -> None:
    hook, frame = next(iter(target.seeds()))
    dropped = next(i for n, i in target.reasons.__members__.items() if n.startswith("DROP_"))
    target.before[dropped] -= 1
    with pytest.raises(Broken, match=r"PASS_|DROP_|dropped"):
        target.send([(hook, frame)])


def test_a_contradiction_of_tables_is_noticed(lb: BalancerTarget) -> None:
    lb.before[int(lb.reasons.DROP_BAD_TABLE)] -= 1
    with pytest.raises(Broken, match="1 found that tables contradict"):
        lb.send([])


@pytest.mark.parametrize("lost", ["nat_fwd", "nat_rev"])
@pytest.mark.parametrize("target", ["lb", "tc"], indirect=True)
def test_half_a_pair_is_noticed(target: Balancing, lost: str, monkeypatch: Any) -> None:
    def lose(*_: object) -> None:
        found = target.lb.map(lost)
        found.delete_many(found.items()[0][:1])

    target.send([(0, bytes(either(TCP, CLIENT, served(target, "nat").vip)))])
    target.check_tables()
    with monkeypatch.context() as patched:
        patched.setattr(target.scanner, "run", lose)
        with pytest.raises(Broken, match=r"after the scan, nat_(fwd|rev) without nat_(fwd|rev)"):
            target.check_tables()
    with pytest.raises(Broken, match=r"^nat_(fwd|rev) without nat_(fwd|rev)"):
        target.check_tables()


def test_the_scan_ends_what_is_silent(tc: TranslatorTarget) -> None:
    tc.send([(INGRESS, bytes(either(TCP, CLIENT, served(tc, "nat").vip, sport=7)))])
    assert len(tc.lb.entries("nat_fwd")) == 1
    tc.lb.advance(100)
    tc.check_tables()
    assert tc.lb.entries("nat_fwd") == tc.lb.entries("nat_rev") == []
