# SPDX-License-Identifier: Apache-2.0
"""What sockets get while a plan is carried out, and where an agent was killed in its midst."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

import pytest
from msgspec.structs import replace

from shunt.agent.writes import Write
from shunt.lb.compile import Endpoint, Target, unmapped
from tests.packets.sockets import TAKEN, Asker
from tests.packets.test_prefixes import World, services

Configuration = dict[str, Target]
ASKED = 24  # questions for each frontend at each prefix


@pytest.fixture(scope="module")
def w() -> Iterator[World]:
    world = World()
    yield world
    world.object.close()


@pytest.fixture(scope="module")
def asker(w: World) -> Iterator[Asker]:
    with Asker(w) as found:
        yield found


def some_closed(rnd: random.Random, found: Configuration) -> Configuration:
    """The same, with backends that fail or are drained: some, or all but one."""
    few = rnd.random() < 0.5

    def close(target: Target) -> Target:
        one = rnd.randrange(max(1, len(target.members)))
        shut = [n != one if few else rnd.random() < 0.3 for n in range(len(target.members))]
        how = [rnd.random() < 0.5 for _ in shut]
        members = [
            replace(m, up=not (s and h), drained=s and not h)
            for m, s, h in zip(target.members, shut, how, strict=True)
        ]
        return replace(target, members=tuple(members))

    return {name: close(target) for name, target in found.items()}


def change(seed: int) -> tuple[Configuration, Configuration]:
    """Before and after. Of every other one the services stay, and only what is known of their
    backends changes."""
    rnd = random.Random(seed)
    old = services(rnd, second=4)
    new = services(rnd, second=4) if seed % 2 else old
    return some_closed(rnd, old), some_closed(rnd, new)


def open_ones(target: Target) -> set[Endpoint]:
    return {member.endpoint for member in target.members if member.takes_new_flows}


def wrong(asker: Asker, old: Configuration, new: Configuration) -> str | None:
    """What no socket may get between `old` and `new`, if one does."""
    for frontend in sorted({f for c in (old, new) for t in c.values() for f in t.frontends}):
        owners = [[t for t in c.values() if frontend in t.frontends] for c in (old, new)]
        names = {t.name for o in owners for t in o}
        both = [t for c in (old, new) for t in c.values() if t.name in names]
        allowed = {e.address for t in both for e in open_ones(t)}
        alive = all(o and open_ones(o[0]) for o in owners)
        for n in range(ASKED):
            answer = asker.ask(str(frontend.vip), frontend.port, entropy=(n << 32) // ASKED)
            backend = unmapped(answer["addr"].tobytes())
            if answer["reason"] == TAKEN and backend not in allowed:
                return f"{frontend} went to {backend}, which is not open, or another service's"
            if answer["reason"] != TAKEN and alive:
                return f"{frontend} was refused ({answer['reason']}) though backends are alive"
    return None


def stop_at(w: World, asker: Asker, seed: int, writes: int, turn: bool) -> str | None:
    """Stop a change after so many writes, look, restart, finish, and look again."""
    old, new = change(seed)
    w.begin()
    w.applier.apply(w.plan(old))
    plan: Sequence[Write] = w.plan(new)
    plan = plan[::-1] if turn else plan
    w.applier.apply(plan[:writes])
    if found := wrong(asker, old, new):
        return f"seed {seed}, after {writes} of {len(plan)}: {found}"
    w.restart()
    w.applier.apply(w.plan(new))
    if found := wrong(asker, new, new):
        return f"seed {seed}, finished after {writes} of {len(plan)}: {found}"
    return None


def first_wrong(w: World, asker: Asker, seeds: Iterable[int], turn: bool = False) -> str | None:
    for seed in seeds:
        old, new = change(seed)
        w.begin()
        w.applier.apply(w.plan(old))
        for writes in range(len(w.plan(new)) + 1):
            try:
                found = stop_at(w, asker, seed, writes, turn)
            except (KeyError, IndexError):
                if not turn:
                    raise
                found = "a write before what it refers to"
            if found:
                return found
    return None


def test_sockets_get_an_open_backend_at_every_prefix(w: World, asker: Asker) -> None:
    assert first_wrong(w, asker, range(12)) is None


def test_that_check_can_fail(w: World, asker: Asker) -> None:
    assert first_wrong(w, asker, range(8), turn=True) is not None
