# SPDX-License-Identifier: Apache-2.0
"""Health checks against real listeners, on the loopback of a namespace of their own.

```
    lo 127.0.0.1, ::1    listeners
```
"""

import asyncio
import errno
import itertools
import os
import resource
import socket
import struct
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest

from shunt.agent.probes.attempt import Target
from shunt.agent.probes.schedule import Prober, phase_s
from shunt.lab.netns import Namespace
from shunt.lb.health import Result

LOOPBACK4, LOOPBACK6 = IPv4Address("127.0.0.1"), IPv6Address("::1")


@pytest.fixture
def here() -> Iterator[Namespace]:
    """This thread's sockets are in the namespace for the whole test."""
    namespace = Namespace.create(f"shunt-probe-{os.getpid()}")
    try:
        with namespace.inside():
            yield namespace
    finally:
        namespace.delete()


class Results(defaultdict[str, list[Result]]):
    """Results by key, as they come."""

    def __init__(self) -> None:
        super().__init__(list)

    def add(self, key: str, result: Result) -> None:
        self[key].append(result)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(8):
            while not condition():  # noqa: ASYNC110 - results set no Event
                await asyncio.sleep(0.01)


@asynccontextmanager
async def probing(targets: dict[str, Target]) -> AsyncIterator[tuple[Prober[str], Results]]:
    results = Results()
    prober: Prober[str] = Prober(results.add)
    prober.set_targets(targets)
    try:
        yield prober, results
    finally:
        prober.close()


def listen(family: int = socket.AF_INET, backlog: int = 100) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
    listener.listen(backlog)
    return listener


def run(scenario: Coroutine[None, None, None]) -> None:
    asyncio.run(scenario)


@pytest.mark.usefixtures("here")
def test_open_and_closed_ports_in_both_families() -> None:
    async def scenario() -> None:
        with listen() as four, listen(socket.AF_INET6) as six:
            targets = {
                "four": Target(LOOPBACK4, four.getsockname()[1], 0.1, 0.05),
                "six": Target(LOOPBACK6, six.getsockname()[1], 0.1, 0.05),
                "closed": Target(LOOPBACK4, 1, 0.1, 0.05),
            }
            async with probing(targets) as (prober, results):
                await results.until(lambda: all(len(results[k]) >= 3 for k in targets))
                assert all(r.ok and r.latency_ms is not None for r in results["four"])
                assert all(r.ok for r in results["six"])
                assert {(r.ok, r.reason) for r in results["closed"]} == {
                    (False, "port 1: connection refused")
                }
                assert prober.counts.failures == len(results["closed"])
                assert prober.counts.troubles == Counter()

    run(scenario())


def test_no_answer_is_a_failure_after_the_timeout(here: Namespace) -> None:
    # A neighbour that swallows everything: the SYN leaves, nothing comes back.
    here.ip(
        "link add name d0 type veth peer name d1",
        "link set dev d0 up",
        "link set dev d1 up",
        "addr add 10.8.0.1/24 dev d0",
        "neigh add 10.8.0.9 lladdr 02:00:00:00:00:09 dev d0 nud permanent",
    )

    async def scenario() -> None:
        began = time.monotonic()
        async with probing({"a": Target(ip_address("10.8.0.9"), 80, 0.4, 0.2)}) as (_, results):
            await results.until(lambda: bool(results["a"]))
            assert results["a"][0].reason == "port 80: no answer within 0.2 s"
            assert 0.2 <= time.monotonic() - began < 1.5

    run(scenario())


def test_no_route_is_a_failure(here: Namespace) -> None:
    here.ip("route add unreachable 10.8.0.0/24")

    async def scenario() -> None:
        async with probing({"a": Target(ip_address("10.8.0.9"), 80, 0.1)}) as (_, results):
            await results.until(lambda: bool(results["a"]))
            assert results["a"][0].reason == "port 80: no route to host"

    run(scenario())


def test_nothing_lingers_on_either_side(here: Namespace) -> None:
    async def scenario() -> None:
        with listen() as listener:
            target = Target(LOOPBACK4, listener.getsockname()[1], 0.02, 0.01)
            async with probing({"a": target}) as (_, results):
                await results.until(lambda: len(results["a"]) >= 20)
        shown = here.run("cat", "/proc/self/net/tcp").stdout.splitlines()[1:]
        states = Counter(line.split()[3] for line in shown)
        assert states["06"] == 0, shown  # TIME_WAIT

    run(scenario())


@pytest.mark.usefixtures("here")
def test_targets_start_stop_and_keep_their_turn() -> None:
    async def scenario() -> None:
        with listen() as listener:
            port = listener.getsockname()[1]
            a, b = Target(LOOPBACK4, port, 0.1), Target(ip_address("127.0.0.2"), port, 0.1)
            async with probing({"a": a}) as (prober, results):
                await results.until(lambda: len(results["a"]) >= 2)
                prober.set_targets({"a": a, "b": b})
                assert len(prober) == 2
                await results.until(lambda: len(results["a"]) >= 4 and len(results["b"]) >= 2)
                times = [r.at_s for r in results["a"]]
                gaps = [after - before for before, after in itertools.pairwise(times)]
                assert all(0.05 < gap < 0.2 for gap in gaps), gaps
                prober.set_targets({"b": b})
                many = len(results["a"])
                await results.until(lambda: len(results["b"]) >= 4)
                assert len(results["a"]) == many
                # The same key, another port: another target.
                prober.set_targets({"b": Target(LOOPBACK4, 1, 0.1)})
                await results.until(lambda: not results["b"][-1].ok)

    run(scenario())


def test_many_targets_are_spread_over_the_interval() -> None:
    targets = [Target(IPv4Address("10.0.0.0") + n, 80, 2.0) for n in range(5000)]
    tenths = Counter(int(phase_s(t) / 0.2) for t in targets)
    assert set(tenths) == set(range(10))
    assert max(tenths.values()) < 600
    assert phase_s(targets[0]) == phase_s(Target(IPv4Address("10.0.0.0"), 80, 2.0))


@pytest.mark.usefixtures("here")
def test_out_of_files_is_our_trouble_and_no_result() -> None:
    async def scenario() -> None:
        with listen() as listener:
            target = Target(LOOPBACK4, listener.getsockname()[1], 0.05)
            async with probing({"a": target}) as (prober, results):
                await results.until(lambda: bool(results["a"]))
                soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
                many = len(results["a"])
                try:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
                    await results.until(lambda: prober.counts.troubles["EMFILE"] >= 5)
                finally:
                    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                assert len(results["a"]) == many
                assert prober.counts.failures == 0
                await results.until(lambda: len(results["a"]) > many)
                assert all(r.ok for r in results["a"])

    run(scenario())


def test_out_of_ports_is_our_trouble_and_no_result(here: Namespace) -> None:
    def fill(address: tuple[str, int], held: ExitStack) -> None:
        for _ in range(10):
            connection = held.enter_context(socket.create_connection(address))
            # No TIME_WAIT: the port is free as soon as it is closed.
            linger = struct.pack("ii", 1, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)

    async def scenario() -> None:
        with listen() as listener, ExitStack() as held:
            address = listener.getsockname()
            here.sysctl({"ipv4.ip_local_port_range": "60000 60001"})
            with pytest.raises(OSError, match="annot assign") as caught:
                fill(address, held)
            assert caught.value.errno == errno.EADDRNOTAVAIL
            target = Target(LOOPBACK4, address[1], 0.05)
            async with probing({"a": target}) as (prober, results):
                await results.until(lambda: prober.counts.troubles["EADDRNOTAVAIL"] >= 2)
                assert not results["a"]
                held.close()
                await results.until(lambda: bool(results["a"]))
                assert results["a"][0].ok

    run(scenario())


@pytest.mark.usefixtures("here")
def test_a_loop_that_is_held_up_shows_as_lateness_and_fails_nobody() -> None:
    async def scenario() -> None:
        with listen() as listener:
            target = Target(LOOPBACK4, listener.getsockname()[1], 0.1, 0.05)
            async with probing({"a": target}) as (prober, results):
                await results.until(lambda: len(results["a"]) >= 3)
                assert prober.counts.late_s_max < 0.1
                time.sleep(0.5)  # noqa: ASYNC251 - this is what is tested
                await results.until(lambda: prober.counts.skipped >= 3)
                assert 0.3 < prober.counts.late_s_max < 1
                assert prober.counts.late_s_mean < prober.counts.late_s_max
                await results.until(lambda: len(results["a"]) >= 6)
                assert all(r.ok for r in results["a"])

    run(scenario())


@pytest.mark.usefixtures("here")
def test_jitter_moves_a_check_after_its_turn_and_adds_up_to_nothing() -> None:
    async def scenario() -> None:
        with listen() as listener:
            target = Target(LOOPBACK4, listener.getsockname()[1], 0.1, 0.04, 0.5)
            async with probing({"a": target}) as (prober, results):
                began = time.monotonic()
                await results.until(lambda: len(results["a"]) >= 25)
                took_s = time.monotonic() - began
                assert all(r.ok for r in results["a"])
                assert prober.counts.checks + prober.counts.skipped <= took_s / 0.1 + 2
            turn_s = phase_s(target)
            after = [(r.at_s - turn_s) % 0.1 for r in results["a"]]
            assert max(after) - min(after) > 0.02, after

    run(scenario())


@pytest.mark.usefixtures("here")
def test_trouble_on_this_host_is_no_result() -> None:
    async def scenario() -> None:
        results, away = Results(), [True]
        prober: Prober[str] = Prober(results.add, lambda _: "away" if away else "")
        prober.set_targets({"a": Target(LOOPBACK4, 1, 0.05, 0.04)})
        try:
            await results.until(lambda: prober.counts.troubles["away"] >= 5)
            assert not results["a"]
            assert prober.counts.failures == 0
            away.clear()
            await results.until(lambda: bool(results["a"]))
            assert not results["a"][0].ok
        finally:
            prober.close()

    run(scenario())
