# SPDX-License-Identifier: Apache-2.0
"""Connections without a pause while backends come and go, and while the agent is killed.

The node is that of socket_node.py; each of two services has 16 backends of its own:

```
    storm, 203.0.113.30      10.9.1.101 to .116, on be1
    other, 203.0.113.31      10.9.2.101 to .116, on be2
```
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException

import pytest

from shunt.cli.client import Client, Refused
from shunt.lb.errors import ShuntError
from tests.netns import storm
from tests.netns.socket_node import Node, a_node
from tests.netns.storm import Made, Sets

PORT, STORMS = 9000, 1
VIPS = {"storm": "203.0.113.30", "other": "203.0.113.31"}
POOLS = {
    name: tuple(f"10.9.{n}.{host}" for host in range(101, 117)) for n, name in enumerate(VIPS, 1)
}
STEP_S = 0.010  # how often something changes
STORM_S, CHANGES, PAUSE_S = 5, 100, 0.3  # at least so long, and so many
KILLS, LONGEST_UPDATE_S = 6, 0.4


class Storm:
    """The node, who connects there, and who changes what."""

    def __init__(self, node: Node) -> None:
        self.node, self.rnd = node, random.Random(5)
        self.client = Client(node.sock)
        self.sets = {name: Sets(frozenset()) for name in VIPS}
        self.logs = [node.directory / f"storm-{n}.log" for n in range(STORMS)]

    def put(self, name: str, backends: frozenset[str]) -> None:
        """The service with these backends; returns when they are in force."""
        document = {
            "name": name,
            "vip": VIPS[name],
            "ports": [PORT, f"{PORT}/udp"],
            "backends": sorted(backends),
        }
        sets = self.sets[name]
        sets.change(backends)
        try:
            self.client.put("services", name, body=document)
        except Refused as e:
            raise AssertionError(e, e.errors) from e
        sets.changed()

    def some(self, name: str) -> frozenset[str]:
        """Any of its backends, and at least one: mostly none that it has now."""
        pool = list(POOLS[name])
        if self.rnd.random() < 0.7:
            pool = [b for b in pool if b not in self.sets[name].sets[-1]] or pool
        return frozenset(self.rnd.sample(pool, min(len(pool), self.rnd.choice((1, 1, 2, 3, 8)))))

    def made(self) -> list[Made]:
        return [one for log in self.logs for one in storm.read(log)]

    def wait(self, more: int) -> None:
        """Until so many more connections were made."""
        want = len(self.made()) + more
        deadline = time.monotonic() + 60
        while len(self.made()) < want:
            assert time.monotonic() < deadline, self.logs[0].read_text()[-1000:]
            time.sleep(0.02)

    def check(self) -> Counter[str]:
        """Everybody was answered, by a backend of the right service that it had. Who how often."""
        names = {vip: name for name, vip in VIPS.items()}
        wrong = []
        for one in self.made():
            allowed = self.sets[names[one.vip]].allowed(one)
            if one.answer not in allowed:
                wrong.append((one, sorted(allowed)))
        assert wrong == [], f"{Counter(one.answer for one, _ in wrong)}: {wrong[:3]}"
        return Counter(one.answer for one in self.made())


@pytest.fixture
def storming() -> Iterator[Storm]:
    with a_node("storms") as node, contextlib.ExitStack() as stack:
        for n, (name, role) in enumerate(zip(VIPS, ("be1", "be2"), strict=True)):
            there = node.servers[role].host.namespace
            there.ip(*(f"addr add {address}/24 dev eth0" for address in POOLS[name]))
            argv = [sys.executable, storm.__file__, "serve", str(PORT)]
            stack.callback(there.start(argv, node.directory / f"server-{n}.log").stop)
        node.start()
        found = Storm(node)
        for name in VIPS:
            found.put(name, found.some(name))
            found.sets[name] = Sets(found.sets[name].sets[-1])
        for address in (pool[0] for pool in POOLS.values()):
            node.until(lambda a=address: answers(node, a), "servers")  # type: ignore[misc]
        for log in found.logs:
            argv = [sys.executable, storm.__file__, "connect", str(PORT), *VIPS.values()]
            stack.callback(node.here.start(argv, log).stop)
        found.wait(50)
        yield found


def answers(node: Node, address: str) -> bool:
    with node.client() as sock:
        return sock.connect_ex((address, PORT)) == 0


def drain_and_undrain(storming: Storm, name: str) -> int:
    """Every STEP_S another of its backends takes no more new connections, or does again; how many
    of these changes there were."""
    changes, due = 0, time.monotonic()
    end = due + STORM_S
    while changes < CHANGES or due < end:
        now = storming.sets[name].sets[-1]
        backend = storming.rnd.choice(POOLS[name])
        if now == {backend}:
            continue
        storming.sets[name].change(now ^ {backend})
        wish = "drain" if backend in now else "undrain"
        storming.client.post("services", name, "backends", backend, wish)
        storming.sets[name].changed()
        changes += 1
        due = max(due + STEP_S, time.monotonic() - STEP_S)
        time.sleep(max(0, due - time.monotonic()))
    return changes


@pytest.mark.timeout(180)
def test_backends_change_every_ten_milliseconds(storming: Storm) -> None:
    """Of one service they are replaced without a pause, of the other drained. Nobody is refused,
    and nobody gets a backend that was gone an update before."""
    ended = threading.Event()

    def replace() -> None:
        while not ended.wait(PAUSE_S):
            storming.put("storm", storming.some("storm"))

    storming.put("other", frozenset(POOLS["other"]))
    with ThreadPoolExecutor() as pool:
        replacing = pool.submit(replace)
        try:
            changes = drain_and_undrain(storming, "other")
        finally:
            ended.set()
        replacing.result()
    storming.wait(50)
    seen = storming.check()
    print(f"{sum(seen.values())} connections, {changes} drains,", end=" ")
    print(f"{len(storming.sets['storm'].sets)} sets")
    assert len(storming.sets["storm"].sets) >= 5
    assert len(seen) > 20, "of both services"


def test_that_a_refusal_and_a_stray_are_seen(storming: Storm) -> None:
    """The check above sees a service without backends, and a backend that it is not told of."""
    other = storming.sets["other"]
    storming.put("other", frozenset(POOLS["other"][:1]))
    other.sets = [frozenset(POOLS["other"][1:])] * len(other.sets)
    storming.wait(20)
    with pytest.raises(AssertionError, match=POOLS["other"][0]):
        storming.check()
    storming.put("other", frozenset())
    storming.wait(20)
    with pytest.raises(AssertionError, match="ConnectionRefusedError"):
        storming.check()


@pytest.mark.timeout(300)
def test_the_agent_is_killed_in_the_midst_of_updates(storming: Storm) -> None:
    """At any moment, over and over: what it leaves serves everybody until it is there again."""
    node = storming.node
    for _ in range(KILLS):
        assert node.process is not None
        updates = [
            threading.Thread(target=cut_short, args=(storming, name, storming.some(name)))
            for name in VIPS
        ]
        for update in updates:
            update.start()
        time.sleep(storming.rnd.uniform(0, LONGEST_UPDATE_S))
        node.process.kill()
        for update in updates:
            update.join()
        storming.wait(60)
        node.start()
        storming.wait(20)
        for name in VIPS:  # whatever came of that update: from now on there is no doubt
            storming.put(name, storming.some(name))
    storming.check()


def cut_short(storming: Storm, name: str, backends: frozenset[str]) -> None:
    with contextlib.suppress(ShuntError, OSError, HTTPException):
        storming.put(name, backends)
