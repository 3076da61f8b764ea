# SPDX-License-Identifier: Apache-2.0
"""What `shunt explain --from socket` asks: the live decision, word for word, and not a write."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any

import numpy as np
import pytest

from shunt.agent.socket_upkeep import words
from shunt.lb import frontends
from shunt.lb.model import Port, Protocol
from shunt.sockops.dry import BIND, PROGRAM, DrySockets
from shunt.xdp.dry import Step
from tests.packets.balancer import SCTP, START_NS, TCP, UDP, Balancer, S, SvcFlag, mapped
from tests.packets.sockets import BOTH, TAKEN, Asker, Family, SockReason
from tests.packets.test_sockets import V4, WEB, tables

OWN = ("sock_clients", "sock_excluded", "sock_node_ports")
NETNS = 7


@pytest.fixture
def asker(lb: Balancer) -> Iterator[Asker]:
    with Asker(lb) as found:
        yield found


def dry_of(lb: Balancer, asker: Asker, *, excludes: bool = False) -> DrySockets:
    own = {name: asker.object.maps[name] for name in OWN}
    return DrySockets(lb.object.maps, own, excludes=excludes, netns=NETNS)


@pytest.fixture
def dry(lb: Balancer, asker: Asker) -> Iterator[DrySockets]:
    found = dry_of(lb, asker)
    yield found
    found.close()


def fields(vip: str, port: int, proto: int, **more: int) -> dict[str, Any]:
    asked = {"entropy": 0, "netns": 1, "families": BOTH, "now_ns": START_NS, **more}
    return {"vip": mapped(vip), "port": port, "proto": proto, **asked}


def clients(asker: Asker) -> list[bytes]:
    keys, values = asker.object.maps["sock_clients"].items()
    return sorted(k.tobytes() + v.tobytes() for k, v in zip(keys, values, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_both_decide_alike_and_one_writes_nothing(
    lb: Balancer, asker: Asker, dry: DrySockets, seed: int
) -> None:
    _, asked = tables(lb, seed)
    rng = random.Random(seed)
    seen, remembered = set(), 0
    for _ in range(1500):
        vip, port, proto = rng.choice(asked)
        more = {
            "entropy": rng.getrandbits(32),
            "netns": rng.randrange(1, 50),
            "families": rng.choice((Family.IPV4, Family.IPV6, BOTH)),
        }
        before = clients(asker)
        told, steps = dry.ask(**fields(vip, port, proto, **more))
        assert clients(asker) == before
        live = asker.ask(vip, port, proto, **more)
        for name in ("reason", "svc", "backend", "port", "sources"):
            assert told[name] == live[name], name
        assert told["addr"].tobytes() == live["addr"].tobytes()
        assert steps[0].kind.name == "PORT"
        assert (steps[-1].kind.name in {"BACKEND", "CLIENT"}) == (live["reason"] == TAKEN)
        seen.add(int(live["reason"]))
        remembered += clients(asker) != before
    assert TAKEN in seen
    assert remembered, "the live one does write: this test can fail"


def test_a_client_is_not_refreshed_by_asking(lb: Balancer, asker: Asker, dry: DrySockets) -> None:
    lb.add_service(V4, backends=WEB).ask(affinity_ns=10 * S)
    first = asker.ask(V4, 80)["backend"]
    before = clients(asker)
    later = {"now_ns": START_NS + 5 * S, "entropy": 0xFFFFFFFF}
    told, steps = dry.ask(**fields(V4, 80, TCP, **later))
    assert (told["backend"], [s.kind.name for s in steps][-2:]) == (first, ["CLIENT", "BACKEND"])
    assert clients(asker) == before
    assert asker.ask(V4, 80, **later)["backend"] == first
    assert clients(asker) != before


def test_control_groups(lb: Balancer, asker: Asker) -> None:
    lb.add_service(V4, backends=WEB)
    groups = asker.object.maps["sock_excluded"]
    key, value = groups.new_keys(1), groups.new_values(1)
    key["id"], value["excluded"] = 77, 1
    groups.update(key, value)
    for excludes in (True, False):
        dry = dry_of(lb, asker, excludes=excludes)
        try:
            for chain, hit in (((77,), True), ((1, 2, 77, 4), True), ((1, 2), False), ((), False),
                               ((*range(100, 131), 77), True)):  # fmt: skip
                told, _ = dry.ask(chain, **fields(V4, 80, TCP))
                want = SockReason.PASS_CGROUP if hit and excludes else TAKEN
                assert told["reason"] == want, chain
        finally:
            dry.close()


def test_a_service_with_sockets_off(lb: Balancer, asker: Asker, dry: DrySockets) -> None:
    service = lb.add_service(V4, backends=WEB)
    assert asker.ask(V4, 80)["reason"] == TAKEN
    service.ask(sockets=False)
    for found in (asker.ask(V4, 80), dry.ask(**fields(V4, 80, TCP))[0]):
        assert (found["reason"], found["svc"]) == (SockReason.PASS_SERVICE, service.id)
    assert asker.ask(V4, 80, UDP)["reason"] == SockReason.PASS_NOT_OURS


def test_packets_of_such_a_service_go_the_short_way_too(lb: Balancer) -> None:
    assert frontends.UNSEEN == SvcFlag.NO_SOCKETS | SvcFlag.NODE
    service = lb.add_service(V4, backends=WEB)
    (plain,) = _shortcuts(lb)
    assert plain
    service.ask(sockets=False)
    assert _shortcuts(lb) == {plain}
    service.ask(sockets=False, affinity_ns=S)
    assert _shortcuts(lb) == {0}


def _shortcuts(lb: Balancer) -> set[int]:
    """Those of all frontends in the map."""
    entries = lb.map("services").mapped()["entry"].reshape(-1)
    return {int(e["shortcut"]) for e in entries if int(e["svc_reach"]) & 0xFFFFFF}


@pytest.mark.parametrize("program", [PROGRAM, BIND])
def test_the_dry_programs_have_no_map_of_their_own_that_they_write(
    dry: DrySockets, program: str
) -> None:
    """bpf_map_update_elem is not even called."""
    code = np.frombuffer(dry.instructions(program), np.uint64)
    called = {int(word >> 32) for word in code.tolist() if word & 0xFF == 0x85}
    assert 1 in called, "bpf_map_lookup_elem: the reading of calls works"
    assert not called & {2, 3, 131}, "bpf_map_update_elem, bpf_map_delete_elem, a ring"


# bind() --------------------------------------------------------------------------------------

ADDRESSES = ("10.9.1.1", "10.9.2.1", "fd09:1::1", "fd09:2::1")
ANYWHERE = {"0.0.0.0": (4,), "::ffff:0.0.0.0": (4,), "::": (4, 6)}
PORTS = (1, 63, 64, 30080, 65535)


@dataclass
class Binds:
    """Node ports at random, and what a bind() has to end in, written from docs/operations.md.

    Services by address, port and protocol; those of `named` have it as a VIP of their own.
    """

    taken: dict[tuple[str, int, int], int] = field(default_factory=dict)
    named: dict[tuple[str, int, int], int] = field(default_factory=dict)

    def of(self, version: int, port: int, proto: int) -> bool:
        """Whether an address of that version has the port."""
        return (version, port, proto) in {(ip_address(a).version, p, q) for a, p, q in self.taken}

    def refused(self, address: str, port: int, proto: int, *, only: bool) -> bool:
        versions = ANYWHERE.get(address)
        if versions is not None:
            seen = (6,) if only and address == "::" else versions
            return any(self.of(version, port, proto) for version in seen)
        return (address.removeprefix("::ffff:"), port, proto) in self.taken


def reserved(lb: Balancer, asker: Asker, seed: int) -> Binds:
    rng, binds = random.Random(seed), Binds()
    every = [(a, p, q) for a in ADDRESSES for p in PORTS for q in (TCP, UDP)]
    for n, at in enumerate(rng.sample(every, 20)):
        service = lb.add_service(*at, slots=16)
        service.ask(node=n < 12)
        (binds.taken if n < 12 else binds.named)[at] = service.id
    bits = asker.object.maps["sock_node_ports"].mapped()["bits"]
    bits[:] = words({(ip_address(a).version, Port(p, Protocol(q))) for a, p, q in binds.taken})
    return binds


@pytest.mark.parametrize("seed", range(4))
def test_a_bind_is_refused_as_written(
    lb: Balancer, asker: Asker, dry: DrySockets, seed: int
) -> None:
    """Every address, port and protocol there is of them, and some that nobody has."""
    binds, ends = reserved(lb, asker, seed), Counter[str]()
    mapped4 = [f"::ffff:{a}" for a in ADDRESSES if ":" not in a]
    for address in (*ADDRESSES, *mapped4, *ANYWHERE, "127.0.0.1", "::1", "192.0.2.1"):
        for port, proto in itertools.product((0, 2, *PORTS), (TCP, UDP, SCTP)):
            for only in (False, True):
                asked = {"addr": mapped(address), "port": port, "proto": proto, "ipv6_only": only}
                reason, steps = dry.bind(netns=NETNS, **asked)
                want = "PASS_BIND"
                if binds.refused(address, port, proto, only=only):
                    want = "REFUSED_NODE_PORT"
                assert SockReason(reason).name == want, (asked, steps)
                ends[want] += 1
                elsewhere, none = dry.bind(netns=NETNS + 1, **asked)
                assert (elsewhere, none) == (SockReason.PASS_NAMESPACE, ())
                _check_steps(binds, steps, address, port, proto)
    assert min(ends.values()) > 20


def _check_steps(
    binds: Binds, steps: tuple[Step, ...], address: str, port: int, proto: int
) -> None:
    """What is told is so: of the port in each family, and who has the address."""
    assert bool(steps) == (port != 0 and proto != SCTP)
    for step in steps:
        at = address.removeprefix("::ffff:"), port, proto
        if step.kind.name == "NODE_PORT":
            assert bool(step.a) == binds.of(6 if step.b else 4, port, proto)
        elif step.kind.name == "SERVICE":
            assert bool(step.b & SvcFlag.NODE) == (at in binds.taken)
        else:
            assert step.kind.name == "FRONTEND"
            assert step.a == (binds.taken | binds.named).get(at, 0)
