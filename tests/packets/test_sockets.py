# SPDX-License-Identifier: Apache-2.0
"""Which backend a socket gets: the programs' decision beside one in Python, on the same tables."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from ipaddress import ip_address, ip_network

import pytest

from shunt.lb.compile import unmapped
from shunt.lb.frontends import FrontendTable
from shunt.lb.model import ANY_PORT, Frontend, Protocol, SourceRule
from shunt.xdp.resize import service_words
from tests.packets.balancer import START_NS, TCP, UDP, UP, Balancer, Flag, S, Service
from tests.packets.sockets import BOTH, TAKEN, Asker, Family, SockReason, kept

V4, V6 = "203.0.113.1", "2001:db8::1"
WEB = ("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4")


@pytest.fixture
def asker(lb: Balancer) -> Iterator[Asker]:
    with Asker(lb) as found:
        yield found


# Against an oracle ---------------------------------------------------------------------------


class Oracle:
    """The same decision, written in Python from docs/operations.md. It forgets no client."""

    TRIES, SEEN = 16, 1 << 16

    def __init__(self, lb: Balancer) -> None:
        self.lb = lb
        self.frontends = dict(FrontendTable(service_words(lb.map("services"))).items())
        self.clients: dict[tuple[int, int], int] = {}
        self.affine: set[int] = set()

    def find(self, vip: str, port: int, proto: int) -> int:
        address, protocol = ip_address(vip), Protocol(proto)
        for each in (port, ANY_PORT):
            if svc := self.frontends.get(Frontend(address, each, protocol)):
                return svc
        return 0

    def open(self, backend: int) -> bool:
        flags = int(self.lb.map("backends").mapped()["flags"][backend])
        return backend != 0 and flags & ~Flag.IPV6 == UP

    def fits(self, backend: int, families: int) -> bool:
        v6 = int(self.lb.map("backends").mapped()["flags"][backend]) & Flag.IPV6
        return bool(families & (Family.IPV6 if v6 else Family.IPV4))

    def choose(
        self, vip: str, port: int, proto: int, entropy: int, netns: int, families: int
    ) -> tuple[int, int, int]:
        """(reason, service, backend)"""
        svc = self.find(vip, port, proto)
        if not svc:
            return SockReason.PASS_NOT_OURS, 0, 0
        known = self.clients.get((netns, svc), 0)
        if svc in self.affine and self.open(known) and self.fits(known, families):
            return TAKEN, svc, known
        region = int(self.lb.map("svc").mapped()["region"][svc])
        first, log2 = region >> 8, region & 255
        words = self.lb.map("slots").mapped()["word"]
        why = SockReason.REFUSED_NO_BACKEND
        for slot in self.drawn(entropy, log2):
            backend = int(words[first + slot]) & 0xFFFFFF
            if self.open(backend):
                if self.fits(backend, families):
                    self.clients[netns, svc] = backend
                    return TAKEN, svc, backend
                why = SockReason.PASS_FAMILY
        return why, svc, 0

    def drawn(self, entropy: int, log2: int) -> Iterator[int]:
        """The slots that are asked, in this order: some at random, then all from the last one."""
        slot = 0
        for _ in range(self.TRIES):
            yield (slot := entropy << log2 >> 32)
            entropy = (entropy * 1664525 + 1013904223) & 0xFFFFFFFF
        yield from ((slot + n) & ((1 << log2) - 1) for n in range(min(1 << log2, self.SEEN)))


def tables(lb: Balancer, seed: int) -> tuple[Oracle, list[tuple[str, int, int]]]:
    """Services at random, and the frontends to ask for: theirs, and some that nobody has."""
    rng = random.Random(seed)
    asked: list[tuple[str, int, int]] = []
    affine = set()
    for n in range(24):
        vip = rng.choice((f"203.0.113.{n}", f"2001:db8::{n:x}"))
        port, proto = rng.choice((0, 53, 80, 443, 65535)), rng.choice((TCP, UDP))
        pool = [f"10.0.{n}.{i}" for i in range(1, 6)] + [f"fd00:{n:x}::{i}" for i in range(1, 6)]
        backends = rng.sample(pool, rng.choice((0, 1, 4, 8)))
        service = lb.add_service(
            vip, port, proto, backends=backends, backend_port=rng.choice((0, 8080)), slots=32
        )
        if rng.random() < 0.3:
            service.ask(affinity_ns=10 * S)
            affine.add(service.id)
        for backend in service.backends:
            # Failing, drained, removed, gone: in tables that lag behind, slots still name them.
            lb.set_flags(backend, rng.choice((UP, UP, UP, Flag.KNOWN, UP | Flag.DRAINED,
                                              UP | Flag.REMOVED, 0)))  # fmt: skip
        asked += [(vip, port or 1234, proto), (vip, 80, proto), (vip, 53, TCP + UDP - proto)]
    oracle = Oracle(lb)
    oracle.affine = affine
    return oracle, [*asked, ("192.0.2.1", 80, TCP), ("2001:db8:ffff::", 443, TCP)]


@pytest.mark.parametrize("seed", range(4))
def test_the_same_backend_as_the_oracle(lb: Balancer, asker: Asker, seed: int) -> None:
    oracle, asked = tables(lb, seed)
    rng = random.Random(-seed)
    seen: Counter[int] = Counter()
    for _ in range(3000):
        vip, port, proto = rng.choice(asked)
        entropy, netns = rng.getrandbits(32), rng.randrange(1, 50)
        families = rng.choice((Family.IPV4, Family.IPV6, BOTH))
        want = oracle.choose(vip, port, proto, entropy, netns, families)
        got = asker.ask(vip, port, proto, entropy=entropy, netns=netns, families=families)
        assert (got["reason"], got["svc"], got["backend"]) == want, (vip, port, proto, entropy)
        if want[0] == TAKEN:
            row = lb.map("backends").mapped()[want[2]]
            assert got["addr"].tobytes() == row["addr"].tobytes()
            assert got["port"] == (row["port"] or port)
        seen[got["reason"]] += 1
    assert set(seen) >= {
        *(SockReason.PASS_NOT_OURS, SockReason.PASS_FAMILY, SockReason.REFUSED_NO_BACKEND, TAKEN)
    }


def test_every_backend_gets_its_share(lb: Balancer, asker: Asker) -> None:
    service = lb.add_service(V4, backends=WEB)
    rng = random.Random(1)
    got = Counter(asker.ask(V4, 80, entropy=rng.getrandbits(32))["backend"] for _ in range(4000))
    assert set(got) == set(service.backends)
    assert max(got.values()) < 1.2 * min(got.values())


# One thing at a time -------------------------------------------------------------------------


def backends(asker: Asker, times: int = 200, **more: int) -> set[int]:
    return {int(asker.ask(V4, 80, entropy=n << 24, **more)["backend"]) for n in range(times)}


def test_a_moving_slot_gives_its_new_owner(lb: Balancer, asker: Asker) -> None:
    service = lb.add_service(V4, backends=WEB)
    service.move(cur=2, prev=0)
    assert backends(asker) == {service.backends[2]}


@pytest.mark.parametrize(
    "flags", [Flag.KNOWN, UP | Flag.DRAINED, UP | Flag.REMOVED, 0], ids=lambda f: f"{f:#x}"
)
def test_a_slot_whose_owner_takes_nothing_new_is_passed_by(
    lb: Balancer, asker: Asker, flags: int
) -> None:
    service = lb.add_service(V4, backends=WEB)
    lb.set_flags(service.backends[1], flags)
    assert backends(asker) == set(service.backends) - {service.backends[1]}


MANY = tuple(f"10.0.1.{n}" for n in range(1, 101))


def test_the_last_backend_is_found(lb: Balancer, asker: Asker) -> None:
    """However few slots it has: nobody is refused while one backend is alive."""
    service = lb.add_service(V4, backends=MANY, slots=1024)
    for backend in service.backends[1:]:
        lb.set_flags(backend, Flag.KNOWN)
    assert backends(asker) == {service.backends[0]}


def test_the_only_backend_of_a_family_is_found(lb: Balancer, asker: Asker) -> None:
    service = lb.add_service(V4, backends=("fd00::1", *MANY), slots=1024)
    assert backends(asker, families=Family.IPV6) == {service.backends[0]}


def test_slots_without_an_owner_tell_nothing_of_others(lb: Balancer, asker: Asker) -> None:
    """As they are when an agent was killed while it wrote them."""
    service = lb.add_service(V4, backends=WEB)
    service.set_slots([0] * 15 + [service.backends[2]])
    assert backends(asker) == {service.backends[2]}


@pytest.mark.parametrize("owners", [[], WEB])
def test_without_a_backend_it_is_refused(lb: Balancer, asker: Asker, owners: list[str]) -> None:
    service = lb.add_service(V4, backends=owners)
    for backend in service.backends:
        lb.set_flags(backend, Flag.KNOWN)
    answer = asker.ask(V4, 80)
    assert (answer["reason"], answer["svc"]) == (SockReason.REFUSED_NO_BACKEND, service.id)
    assert (answer["backend"], answer["port"]) == (0, 0)


def test_a_slot_beyond_the_table_is_left_alone(lb: Balancer, asker: Asker) -> None:
    service = lb.add_service(V4, backends=WEB)
    lb.map("svc").mapped()["region"][service.id] = 1 << 38 | 6
    assert asker.ask(V4, 80)["reason"] == SockReason.PASS_BAD_TABLE


def test_a_service_that_is_just_going_is_left_alone(lb: Balancer, asker: Asker) -> None:
    service = lb.add_service(V4, backends=WEB)
    lb.map("svc").mapped()["mode"][service.id] = 0
    assert asker.ask(V4, 80)["reason"] == SockReason.PASS_BAD_TABLE


def test_every_port_of_a_vip_and_one_of_its_own(lb: Balancer, asker: Asker) -> None:
    every = lb.add_service(V4, ANY_PORT, backends=WEB[:1])
    one = lb.add_service(V4, 443, backends=WEB[1:2], backend_port=8443)
    assert [int(asker.ask(V4, port)["svc"]) for port in (1, 443, 65535)] == [
        every.id, one.id, every.id,
    ]  # fmt: skip
    assert [int(asker.ask(V4, port)["port"]) for port in (1, 443, 65535)] == [1, 8443, 65535]


def test_families(lb: Balancer, asker: Asker) -> None:
    lb.add_service(V6, backends=WEB)
    assert asker.ask(V6, 80, families=BOTH)["reason"] == TAKEN
    assert asker.ask(V6, 80, families=Family.IPV6)["reason"] == SockReason.PASS_FAMILY
    found = asker.ask(V6, 80, families=BOTH)
    assert str(unmapped(found["addr"].tobytes())) in WEB


def test_source_ranges_are_named(lb: Balancer, asker: Asker) -> None:
    service = lb.add_service(V4, backends=WEB)
    assert asker.ask(V4, 80)["sources"] == 0
    network = SourceRule(ip_network("10.0.0.0/8"), True)
    service.ask(sources=(network,))
    assert asker.ask(V4, 80)["sources"] == lb.map("svc_options").mapped()["sources"][service.id]


def test_hash_by_client_takes_a_namespace_for_one(lb: Balancer, asker: Asker) -> None:
    service = lb.add_service(V4, backends=WEB)
    service.ask(hash_client=True)
    chosen = [backends(asker, netns=netns) for netns in range(1, 60)]
    assert {len(each) for each in chosen} == {1}
    assert set(itertools.chain(*chosen)) == set(service.backends)


# Affinity ------------------------------------------------------------------------------------


@pytest.fixture
def affine(lb: Balancer) -> Service:
    service = lb.add_service(V4, backends=WEB)
    service.ask(affinity_ns=10 * S)
    return service


def test_a_namespace_keeps_its_backend(affine: Service, asker: Asker) -> None:
    for netns in range(1, 60):
        first = int(asker.ask(V4, 80, netns=netns, entropy=netns << 26)["backend"])
        assert backends(asker, 20, netns=netns) == {first}
    assert len({int(asker.ask(V4, 80, netns=netns)["backend"]) for netns in range(1, 60)}) == 4


def test_affinity_ends_after_its_time(affine: Service, asker: Asker) -> None:
    def ask(at_s: int, entropy: int) -> int:
        return int(asker.ask(V4, 80, entropy=entropy, now_ns=START_NS + at_s * S)["backend"])

    first, other = ask(0, 0), (1 << 32) - 1
    assert ask(9, other) == first
    assert ask(18, other) == first  # each new connection counts
    assert ask(29, other) != first


@pytest.mark.parametrize("flags", [Flag.KNOWN, UP | Flag.DRAINED, UP | Flag.REMOVED, 0])
def test_affinity_to_one_that_takes_nothing_new_ends(
    affine: Service, asker: Asker, lb: Balancer, flags: int
) -> None:
    first = int(asker.ask(V4, 80)["backend"])
    lb.set_flags(first, flags)
    assert first not in backends(asker)
    lb.set_flags(first, UP)
    assert first not in backends(asker)


def test_affinity_sees_that_an_id_is_another_backends(
    affine: Service, asker: Asker, lb: Balancer
) -> None:
    first = int(asker.ask(V4, 80)["backend"])
    lb.map("backends").mapped()["addr"][first][15] = 99
    assert len(backends(asker)) == 1
    affine.set_slots(affine.backends[3])
    assert backends(asker, netns=7) == {affine.backends[3]}
    assert first != affine.backends[3]


# A flow that is there already ----------------------------------------------------------------


@pytest.fixture
def dns(lb: Balancer) -> Service:
    return lb.add_service(V4, 53, UDP, backends=WEB, idle_s=60)


def again(asker: Asker, flow: object, entropy: int, after_s: int = 1) -> int:
    now = START_NS + after_s * S
    answer = asker.ask(V4, 53, UDP, entropy=entropy, now_ns=now, kept=flow)
    return int(answer["backend"])


def test_a_flow_follows_its_backend_until_it_fails(
    dns: Service, asker: Asker, lb: Balancer
) -> None:
    first = asker.ask(V4, 53, UDP)
    flow, other = kept(first, V4, 53, START_NS), (1 << 32) - 1
    assert again(asker, flow, other) == first["backend"]
    lb.set_flags(int(first["backend"]), UP | Flag.DRAINED)
    assert again(asker, flow, other) == first["backend"]
    lb.set_flags(int(first["backend"]), Flag.KNOWN)
    assert again(asker, flow, other) != first["backend"]


def test_a_flow_that_was_silent_begins_anew(dns: Service, asker: Asker) -> None:
    first = asker.ask(V4, 53, UDP)
    flow, other = kept(first, V4, 53, START_NS), (1 << 32) - 1
    assert again(asker, flow, other, after_s=59) == first["backend"]
    assert again(asker, flow, other, after_s=61) != first["backend"]


@pytest.mark.parametrize(("field", "value"), [("addr", 9), ("port", 5353), ("svc", 77)])
def test_a_flow_whose_id_is_anothers_now_begins_anew(
    dns: Service, asker: Asker, lb: Balancer, field: str, value: int
) -> None:
    first = asker.ask(V4, 53, UDP)
    flow = kept(first, V4, 53, START_NS)
    dns.set_slots(dns.backends[3])
    assert again(asker, flow, 0) == first["backend"] != dns.backends[3]
    row = lb.map("backends").mapped()[int(first["backend"])]
    if field == "addr":
        row["addr"][15] = value
    else:
        row[field] = value
    assert again(asker, flow, 0) == dns.backends[3]
