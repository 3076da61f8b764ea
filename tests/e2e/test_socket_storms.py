# SPDX-License-Identifier: Apache-2.0
"""Connections without a pause while backends come and go, and while the agent is killed.

The node is that of socket_node.py; each of two services has two VIPs, and 16 backends of its own:

```
    storm, 203.0.113.30 and 2001:db8::30     10.9.1.101 to .108 and fd09:1::101 to ::108, on be1
    other, 203.0.113.31 and 2001:db8::31     10.9.2.101 to .108 and fd09:2::101 to ::108, on be2
```

A socket of IPv4 can have backends of IPv4 alone, so there is always one; a socket of IPv6, any.
"""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from itertools import product
from pathlib import Path

import pytest

from shunt.cli.client import Client, Refused
from shunt.lb.errors import ShuntError
from tests.netns import storm
from tests.netns.socket_node import Node, a_node
from tests.netns.storm import KINDS, Log, Made, Set, Sets

PORT = 9000
VIPS = {"storm": ("203.0.113.30", "2001:db8::30"), "other": ("203.0.113.31", "2001:db8::31")}
HOSTS = range(101, 109)
POOLS = {
    name: (
        tuple(f"10.9.{n}.{host}" for host in HOSTS),
        tuple(f"fd09:{n}::{host}" for host in HOSTS),
    )
    for n, name in enumerate(VIPS, 1)
}
CLIENTS = max(2, min(4, os.cpu_count() or 1))
# Something changes as often as this, so that where nothing is in the way each change is in force at
# most STEP_S after the one before: then every part of a connect() meets one.
OFFERED_S, STEP_S, PAUSE_S = 0.008, 0.010, 0.05
STORM_S, CLOSE = 5, 300  # at least so long, and so many changes that close together
GIVE_UP_S = 120
KILLS, LONGEST_UPDATE_S = 6, 0.2
# What a change may cost the daemon, in requests that ask for nothing: 3 and 17 were measured.
DRAIN_COSTS, PUT_COSTS = 10, 50


def both(name: str) -> tuple[str, ...]:
    """All backends that there are for a service."""
    four, six = POOLS[name]
    return (*four, *six)


class Storm:
    """The node, who connects there, and who changes what."""

    def __init__(self, node: Node) -> None:
        self.node, self.rnd = node, random.Random(5)
        self.client = Client(node.sock)
        none = Set(frozenset(), frozenset())
        self.sets = {name: Sets(none) for name in VIPS}
        self.logs = [Log(node.directory / f"storm-{n}.log") for n in range(CLIENTS)]

    def put(self, name: str, backends: frozenset[str]) -> None:
        """The service with these backends; returns when they are in force."""
        document = {
            "name": name,
            "vip": list(VIPS[name]),
            "ports": [PORT, f"{PORT}/udp"],
            "backends": sorted(backends),
        }
        sets = self.sets[name]
        sets.change(Set(backends, backends))
        try:
            self.client.put("services", name, body=document)
        except Refused as e:
            raise AssertionError(e, e.errors) from e
        sets.changed()

    def turn(self, name: str, backend: str) -> None:
        """Drain a backend, or end that; returns when it is in force."""
        sets = self.sets[name]
        now = sets.last
        sets.change(Set(now.open ^ {backend}, now.kept))
        wish = "drain" if backend in now.open else "undrain"
        self.client.post("services", name, "backends", backend, wish)
        sets.changed()

    def some(self, name: str) -> frozenset[str]:
        """Any of its backends, and at least one of IPv4: mostly none that it has now."""
        four, six = (list(pool) for pool in POOLS[name])
        if self.rnd.random() < 0.7:
            now = self.sets[name].last.open
            four, six = ([b for b in pool if b not in now] or pool for pool in (four, six))
        few = self.rnd.choice((1, 1, 2, 4))
        chosen = self.rnd.sample(four, min(few, len(four)))
        return frozenset(chosen + self.rnd.sample(six, min(self.rnd.choice((0, few)), len(six))))

    def made(self) -> list[Made]:
        return [one for log in self.logs for one in log.read()]

    def wait(self, more: int) -> None:
        """Until every client has made so many more connections."""
        want = [len(log.read()) + more for log in self.logs]
        deadline = time.monotonic() + 60
        while any(len(log.read()) < n for log, n in zip(self.logs, want, strict=True)):
            assert time.monotonic() < deadline, self.logs[0].path.read_text()[-1000:]
            time.sleep(0.02)

    def check(self) -> Counter[str]:
        """Everybody was answered, by a backend of the right service that it had. Who how often."""
        names = {vip: name for name, vips in VIPS.items() for vip in vips}
        wrong = []
        for one in self.made():
            allowed = self.sets[names[one.vip]].allowed(one)
            if one.answer not in allowed:
                wrong.append((one, sorted(allowed)))
        assert wrong == [], f"{Counter(one.answer for one, _ in wrong)}: {wrong[:3]}"
        return Counter(one.answer for one in self.made())


@pytest.fixture
def calm() -> Iterator[Storm]:
    """Nobody connects yet."""
    with a_node("storms") as node, contextlib.ExitStack() as stack:
        for name, role in zip(VIPS, ("be1", "be2"), strict=True):
            there = node.servers[role].host.namespace
            four, six = POOLS[name]
            there.ip(*(f"addr add {address}/24 dev eth0" for address in four))
            there.ip(*(f"addr add {address}/64 dev eth0 nodad" for address in six))
            argv = [sys.executable, storm.__file__, "serve", str(PORT)]
            stack.callback(there.start(argv, node.directory / f"server-{role}.log").stop)
        node.start()
        found = Storm(node)
        for name in VIPS:
            found.put(name, found.some(name))
            found.sets[name] = Sets(found.sets[name].last)
            address = both(name)[0]
            node.until(lambda a=address: answers(node, a), "servers")  # type: ignore[misc]
        yield found


@pytest.fixture
def storming(calm: Storm) -> Iterator[Storm]:
    """Everybody does."""
    with contextlib.ExitStack() as stack:
        for n, log in enumerate(calm.logs):
            vips = [vip for pair in VIPS.values() for vip in pair]
            argv = [storm.__file__, "connect", str(PORT), *vips[n:], *vips[:n]]
            stack.callback(calm.node.here.start([sys.executable, *argv], log.path).stop)
        calm.node.until(lambda: all(log.path.exists() for log in calm.logs), "clients")
        calm.wait(50)
        yield calm


def answers(node: Node, address: str) -> bool:
    with node.client() as sock:
        return sock.connect_ex((address, PORT)) == 0


def processor_s(process: int) -> float:
    """What a process's first thread, where the event loop is, has had of a processor."""
    return int(Path(f"/proc/{process}/schedstat").read_text().split()[0]) / 1e9


def drain_and_undrain(storming: Storm, name: str) -> None:
    """Every OFFERED_S another of its backends takes no more new connections, or does again."""
    sets, due = storming.sets[name], time.monotonic()
    end, give_up = due + STORM_S, due + GIVE_UP_S
    close = 0
    while close < CLOSE or due < end:
        backend = storming.rnd.choice(both(name))
        if sets.last.open & {*POOLS[name][0]} == {backend}:
            continue
        storming.turn(name, backend)
        close += sets.done[-1] - sets.done[-2] <= STEP_S
        due = max(due + OFFERED_S, time.monotonic() - OFFERED_S)
        assert due < give_up, f"{close} changes of {len(sets.done)} within {STEP_S} s"
        time.sleep(max(0, due - time.monotonic()))


def told(what: str, sets: Sets) -> str:
    """How often there was a change."""
    apart = sets.apart_s()
    median_ms, worst_ms = statistics.median(apart) * 1000, max(apart) * 1000
    return f"{len(apart)} {what}, {median_ms:.1f} ms apart ({worst_ms:.0f} at most)"


@pytest.mark.timeout(300)
def test_backends_change_every_ten_milliseconds(storming: Storm) -> None:
    """Of one service they are replaced without a pause, of the other drained. Nobody is refused,
    and nobody gets a backend that was gone an update before."""
    ended = threading.Event()

    def replace() -> None:
        while not ended.wait(PAUSE_S):
            storming.put("storm", storming.some("storm"))

    storming.put("other", frozenset(both("other")))
    with ThreadPoolExecutor() as pool:
        replacing = pool.submit(replace)
        try:
            drain_and_undrain(storming, "other")
        finally:
            ended.set()
        replacing.result()
    storming.wait(50)
    seen = storming.check()
    kinds = Counter((one.vip, one.kind) for one in storming.made())
    print(f"{sum(seen.values())} connections; {told('drains', storming.sets['other'])};", end=" ")
    print(f"{told('sets', storming.sets['storm'])}; {seen[storm.ABORTED]} closed")
    assert len(storming.sets["storm"].sets) >= 20
    assert seen.keys() >= {*both("other")}
    assert all(len(seen.keys() & {*pool}) >= 4 for pool in POOLS["storm"])
    assert kinds.keys() == {*product((vip for pair in VIPS.values() for vip in pair), KINDS)}
    assert min(kinds.values()) >= 20


def test_which_backends_the_check_allows() -> None:
    """Those between the call and its return; and a closed socket only if a backend went."""

    def allowed(kind: str, begin: float, end: float, told: float) -> frozenset[str]:
        return sets.allowed(Made(begin, end, told, kind, "", ""))

    one, two, three = ({*names} for names in ("a", "ab", "b"))
    sets = Sets(Set(frozenset(one), frozenset(two)))
    sets.sets += [Set(frozenset(two), frozenset(two)), Set(frozenset(three), frozenset(three))]
    sets.begun += [1.0, 3.0]
    sets.done, sets.in_force = [0.0, 2.0, 4.0], [0, 1, 2]
    assert allowed("udp", 0.1, 0.9, 2.9) == one
    assert allowed("udp", 0.1, 1.1, 1.2) == allowed("udp", 1.1, 1.2, 1.3) == two
    assert allowed("udp", 2.1, 2.2, 2.9) == two, "a drained one has not gone"
    assert allowed("udp", 2.1, 2.2, 3.1) == two | {storm.ABORTED}
    assert allowed("tcp", 2.1, 2.2, 3.1) == two, "TCP goes on"
    assert allowed("udp", 4.1, 4.2, 4.3) == three


def test_that_a_refusal_and_a_stray_are_seen(storming: Storm) -> None:
    """The check above sees a service without backends, and a backend that it is not told of."""
    other, first = storming.sets["other"], both("other")[0]
    storming.put("other", frozenset({first}))
    rest = frozenset(both("other")[1:])
    other.sets = [Set(rest, rest)] * len(other.sets)
    storming.wait(20)
    with pytest.raises(AssertionError, match=first):
        storming.check()
    storming.put("other", frozenset())
    storming.wait(20)
    with pytest.raises(AssertionError, match="ConnectionRefusedError"):
        storming.check()


def test_what_a_change_costs_the_daemon(calm: Storm) -> None:
    """Beside a request that changes nothing, which is as slow as the machine is: the processor's
    time, however many others want it. A change every STEP_S leaves most of it."""
    assert calm.node.process is not None
    pid = calm.node.process.pid
    calm.put("other", frozenset(both("other")))

    def costs_s(times: int, do: Callable[[int], object]) -> float:
        began = processor_s(pid)
        for n in range(times):
            do(n)
        return (processor_s(pid) - began) / times

    nothing = costs_s(100, lambda _n: calm.client.get("errors"))
    drain = costs_s(100, lambda n: calm.turn("other", both("other")[n // 2 % 16]))
    put = costs_s(20, lambda _n: calm.put("storm", calm.some("storm")))
    all_of = costs_s(20, lambda n: calm.put("storm", frozenset(both("storm")[n % 2 :])))
    costs = {"nothing": nothing, "drain": drain, "some": put, "all": all_of}
    print({what: f"{cost * 1000:.2f} ms" for what, cost in costs.items()})
    print(f"{told('drains', calm.sets['other'])}; {told('sets', calm.sets['storm'])}")
    assert drain < DRAIN_COSTS * nothing
    assert max(put, all_of) < PUT_COSTS * nothing


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
