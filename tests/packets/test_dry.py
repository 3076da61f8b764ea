# SPDX-License-Identifier: Apache-2.0
"""The dry program against the live one: it tells what will be, and writes nothing."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import pytest

from shunt.kern import libbpf
from shunt.kern.maps import Map
from shunt.kern.testrun import Ran, run_xdp
from shunt.lb.model import Mode, Protocol
from shunt.xdp.dry import OWN, DryRun, Tried
from tests.fuzz import kept
from tests.fuzz.balancer_target import BalancerTarget
from tests.fuzz.headers import read, reply_to
from tests.fuzz.mutations import mutations
from tests.packets import histories
from tests.packets.balancer import OBJECT, SCTP, Reason
from tests.packets.frames import sctp, tcp
from tests.packets.histories import Lab, history

UNREAD = {libbpf.MAP_RINGBUF, libbpf.MAP_PROG_ARRAY}


def contents(maps: Mapping[str, Map]) -> dict[str, bytes]:
    """All that is in all maps."""
    found = {}
    for name, each in maps.items():
        if each.spec.flags & libbpf.BPF_F_MMAPABLE:
            found[name] = each.mapped().tobytes()
        elif each.spec.type not in UNREAD:
            found[name] = b"".join(part.tobytes() for part in each.items())
    return found


def verdict_of(tried: Tried) -> tuple[int, int, int, int]:
    """(action, reason, service, backend) by the last step."""
    last = tried.steps[-1]
    assert last.kind.name == "VERDICT"
    return last.a, last.b & 0xFF, last.b >> 8 & 0xFFFFFF, last.b >> 32


def comparable(reason: int, frame: bytes, data: bytes) -> bytes:
    """What became of a frame, without what is left to chance: the identifier of what the stack is
    to fragment, and of what was IPv6; also of what an error quotes."""
    was, now = read(frame), read(data)
    crossed = was and now and len(was.dst) > len(now.dst)
    if not now or (reason != Reason.PASS_TO_FRAGMENT and not crossed):
        return data
    quoted = [now.l4 + 8] if now.proto == 1 else []
    for at in (now.at, *quoted):
        data = data[: at + 4] + bytes(2) + data[at + 6 : at + 10] + bytes(2) + data[at + 12 :]
    return data


class Pair:
    """The two programs on the same maps; the dry one is asked first."""

    def __init__(self, config: Any, maps: Mapping[str, Map], fd: int, clock: Any) -> None:
        self.maps, self.fd, self.clock = maps, fd, clock
        self.dry = DryRun(config, maps)
        self.asked = 0

    def _counts(self) -> tuple[Any, Any]:
        backends = self.maps["backend_stats"].mapped()["packets"]
        return self.maps["reasons"].totals()["packets"], backends.astype(np.int64)

    def ask(self, frame: bytes) -> Tried:
        self.dry.clock[...] = self.clock
        return self.dry.run(frame)

    def run(self, _fd: int, frame: bytes) -> Ran:
        """One frame through both. Raises: AssertionError where they differ."""
        self.asked += 1
        tried = self.ask(frame)
        reasons, backends = self._counts()
        ran = run_xdp(self.fd, frame)
        after = self._counts()
        (reason,) = np.flatnonzero(after[0] - reasons)
        grown = np.flatnonzero(after[1] - backends) % self.maps["backends"].spec.entries
        action, why, _, backend = verdict_of(tried)
        seen = Reason(why), backend, tried.verdict, action
        assert seen == (Reason(int(reason)), sum(grown), ran.verdict, ran.verdict), frame.hex()
        same = comparable(why, frame, tried.data) == comparable(why, frame, ran.data)
        assert same, frame.hex()
        return ran


@pytest.fixture
def target() -> Iterator[tuple[BalancerTarget, Pair]]:
    """Every mode, family, option and state of slots."""
    found = BalancerTarget()
    lb = found.lb
    pair = Pair(lb.config, lb.object.maps, lb.object.programs["shunt_lb"].fd, lb.clock)
    yield found, pair
    pair.dry.close()
    found.close()


def test_it_says_of_any_packet_what_becomes_of_it(target: tuple[BalancerTarget, Pair]) -> None:
    found, pair = target
    rnd, corpus = random.Random(3), [*kept.load_all("lb", found.hooks), *found.seeds()]
    frames = (frame for _, frame in mutations(rnd, corpus))
    reasons = set()
    for _ in range(20):
        block = list(islice(frames, 60))
        before = contents(pair.maps)
        for frame in block:
            pair.ask(frame)
        assert contents(pair.maps) == before
        for frame in block:
            ran = pair.run(0, frame)
            reasons.add(verdict_of(pair.ask(frame))[1])
            if reply := reply_to(ran.data):
                pair.run(0, reply)
                corpus.append((0, reply))
        found.lb.advance(rnd.choice((0.001, 0.1, 1, 61)))
    assert len(found.lb.samples()) > 0
    assert len(reasons) >= 12, {Reason(r).name for r in reasons}


def test_associations_on_moving_slots(target: tuple[BalancerTarget, Pair]) -> None:
    found, pair = target
    reasons = set()
    for mode, vip in (
        ("dsr-ipip", "203.0.113.77"),
        ("dsr-l2", "203.0.113.78"),
        ("nat", "203.0.113.79"),
    ):
        backends = ["10.0.0.1", "10.0.0.2"]
        found.lb.add_service(vip, 80, SCTP, mode, backends).move()
        for chunks in ("INIT", "SACK", "INIT", "COOKIE ECHO", "DATA", "ABORT", "INIT", "SHUTDOWN"):
            before = contents(pair.maps)
            frame = bytes(sctp("192.0.2.9", vip, chunks))
            pair.ask(frame)
            assert contents(pair.maps) == before
            pair.run(0, frame)
            reasons.add(Reason(verdict_of(pair.ask(frame))[1]).name)
    assert reasons == {"SENT_TO_BACKEND", "PASS_TO_TC"}


def test_what_the_dry_run_is_compared_with_does_write(target: tuple[BalancerTarget, Pair]) -> None:
    found, pair = target
    syn = bytes(tcp("192.0.2.1", "203.0.113.32", "S"))  # nat, settled
    before = contents(pair.maps)
    assert pair.ask(syn).steps
    assert contents(pair.maps) == before
    found.lb.run(syn)
    changed = {name for name, raw in contents(pair.maps).items() if raw != before[name]}
    assert {"nat_fwd", "nat_rev", "reasons", "backend_stats", "events"} <= changed


def test_a_disagreement_is_seen(target: tuple[BalancerTarget, Pair]) -> None:
    _, pair = target
    frame = bytes(tcp("192.0.2.1", "203.0.113.0", "A"))
    asked = pair.ask(frame)

    def ask_otherwise(frame: bytes) -> Tried:
        return asked

    pair.maps["backends"].mapped()["flags"] = 0
    pair.ask = ask_otherwise  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        pair.run(0, frame)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"protocol": Protocol.UDP},
        {"affinity_s": 60},
        {"hash_by": "client"},
        {"mode": Mode.NAT},
        {"mode": Mode.DSR_GENEVE},
    ],
    ids=lambda o: "-".join(map(str, o.values())) or "plain",
)
def test_histories_agree(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots that move and linger, full tables, drains, failures, restarts of the agent."""
    asked = 0
    for seed in range(2):
        lab = Lab(OBJECT, **options)
        pair = Pair(lab.config, lab.obj.maps, lab.fd, lab.clock)
        monkeypatch.setattr(histories, "run_xdp", pair.run)
        try:
            history(lab, seed, steps=250)  # whether its promise holds is another test's matter
            asked += pair.asked
        finally:
            pair.dry.close()
            lab.close()
    assert asked > 60


def test_every_other_map_is_the_live_one(target: tuple[BalancerTarget, Pair]) -> None:
    _, pair = target
    for name, each in pair.dry._object.maps.items():
        same = libbpf.MapInfo(), libbpf.MapInfo()
        for info, of in zip(same, (each, pair.maps[name]), strict=True):
            libbpf.info_by_fd(of.fd, info)
        assert (same[0].id == same[1].id) == (name not in OWN), name
