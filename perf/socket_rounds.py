# SPDX-License-Identifier: Apache-2.0
"""One round of what perf-sockets measures."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Mapping, Sequence
from functools import partial

from perf import harness
from perf.generators import Generator
from perf.socket_ways import BUILD, PORT, Way
from shunt.kern.programs import enable_statistics
from shunt.lab.netns import Process
from shunt.lb.errors import ShuntError

KEPT = (1, 32)
WRITES = {4096: "bulk_4k", 65536: "bulk_64k"}
# What a round measures, and in which unit.
CLOSED = (
    *(f"requests_{n}_{what}" for n in KEPT for what in ("per_s", "cpu_us")),
    *("connections_per_s", "connections_cpu_us", "connect_us"),
    *(f"{name}_gbit_per_s" for name in WRITES.values()),
)
PACED = tuple(
    f"{case}_{part}_us"
    for case in (*(f"requests_{n}" for n in KEPT), "connections")
    for part in ("p50", "p99", "p999")
)
MEASURED = (*CLOSED, *PACED)
# And what may be nothing: this way's programs, and the part of its messages that passed TCP by.
PROGRAMS = tuple(f"{case}_programs_ns" for case in ("requests_32", "connections"))
REDIRECTED = tuple(f"{case}_redirected" for case in ("connections", *WRITES.values()))
BESIDES = (*PROGRAMS, *REDIRECTED)
Found = dict[str, float]
Servers = Mapping[Way, Process]


def one_round(
    ways: Sequence[Way], generator: Generator, order: random.Random, closed_s: float, paced_s: float
) -> Mapping[Way, Found]:
    """Measure everything once, the ways by turns.

    Raises: ShuntError if an answer was not right.
    """
    with contextlib.ExitStack() as stack:
        argv = [str(BUILD / "socket_server"), str(PORT)]
        servers = {way: stack.enter_context(way.serving(argv)) for way in ways}
        closed = [
            *(partial(requests, servers, kept, closed_s) for kept in KEPT),
            partial(connections, servers, closed_s),
            *(partial(bulk, servers, size, closed_s) for size in WRITES),
            partial(programs, servers, closed_s),
        ]
        found = harness.by_turns(ways, closed, order)
    with harness.awake():
        at_a_rate = [partial(paced, generator, kept, paced_s) for kept in (*KEPT, 0)]
        latencies = harness.by_turns(ways, at_a_rate, order)
    return {way: found[way] | latencies[way] for way in ways}


def requests(servers: Servers, kept: int, seconds: float, way: Way) -> Found:
    """Small requests on so many kept connections."""
    before = way.redirected()
    # Alone, a connection would mostly wait for a processor to wake up.
    did = way.did("requests", seconds, kept, servers[way], together=kept == 1)
    check_redirected(way, way.redirected() - before, did.count)
    return {
        f"requests_{kept}_per_s": did.count / did.wall_s,
        f"requests_{kept}_cpu_us": did.cpu_s / did.count * 1e6,
    }


def connections(servers: Servers, seconds: float, way: Way) -> Found:
    """A connection for each request."""
    before = way.redirected()
    did = way.did("connections", seconds, None, servers[way], together=True)
    return {
        # A question and an answer each.
        "connections_redirected": (way.redirected() - before) / did.count / 2,
        "connections_per_s": did.count / did.wall_s,
        "connections_cpu_us": did.cpu_s / did.count * 1e6,
        "connect_us": did.p50_us,
    }


def bulk(servers: Servers, size: int, seconds: float, way: Way) -> Found:
    """One connection, written to `size` bytes at a time."""
    before = way.redirected()
    did = way.did("bulk", seconds, size, servers[way], together=False)
    return {
        f"{WRITES[size]}_redirected": (way.redirected() - before) * size / did.count,
        f"{WRITES[size]}_gbit_per_s": did.count / did.wall_s * 8 / 1e9,
    }


def programs(servers: Servers, seconds: float, way: Way) -> Found:
    """How long a way's own programs run for a request, or a connection; taking their time takes
    time, so that it is done apart."""
    found = {}
    taken = enable_statistics()
    try:
        for name, (what, kept) in zip(
            PROGRAMS, (("requests", 32), ("connections", None)), strict=True
        ):
            before = way.programs_s()
            did = way.did(what, seconds, kept, servers[way], together=kept is None)
            found[name] = (way.programs_s() - before) / did.count * 1e9
    finally:
        os.close(taken)
    return found


def paced(generator: Generator, kept: int, seconds: float, way: Way) -> Found:
    """Requests at a constant rate; 0 `kept` connections: one for each."""
    one = generator.latency(way, kept, seconds)
    case = f"requests_{kept}" if kept else "connections"
    return {f"{case}_{part}_us": getattr(one, part) for part in ("p50", "p99", "p999")}


def check_redirected(way: Way, messages: int, requests: int) -> None:
    """Raises: ShuntError if the way's messages did not go the way that its name says."""
    # A request is two of them; some connections may have fallen back to TCP.
    if (messages >= requests) != (way.kind == "redirected"):
        raise ShuntError(
            f"{way}: {messages} messages of {requests} requests were redirected",
            "it would measure another way than it says",
            "see `shunt status`, and the log of its shuntd",
        )
