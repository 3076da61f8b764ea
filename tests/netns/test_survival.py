# SPDX-License-Identifier: Apache-2.0
"""Long-lived connections through two real load balancers, and what they outlive.

```
    client ---- router ---- switch ---- lb1, lb2            shuntd, from YAML files
                  |           '-------- be1, be2, be3, be4  HTTP and echo servers, on all VIPs
                  '-- ECMP by five-tuple to the VIPs, by way of lb1 and lb2
```

lab/topology.py draws it in full. Every mode has 200 connections in each family, all up at the same
time; each says something every other second and must be answered by the backend that it began
with. So one event befalls them all. The events come in the order of this file: the drain makes
slots move, and what a lost node knew of flows on moving slots nobody else knows.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import pytest

from shunt.kern.maps import Map
from shunt.lab.reports import Kind, Opened, Plan, Target
from shunt.lab.scenario import NAT, SERVICES, LabService
from shunt.lab.servers import ECHO_PORT
from shunt.lab.shuntd import Shuntd
from shunt.lab.topology import Lab
from shunt.lab.traffic import Traffic
from shunt.lb import slots as slot
from shunt.lb.model import IPAddress, Mode
from tests.scenes import balanced_lab, nothing_lost

CONNECTIONS = 200  # of each service: a mode and a family, or two
UDP_FLOWS = 5  # of each service
WINDOW = 16  # datagrams under way
LATE_S = 3.0
NEW = 32  # connections opened to each service after an event
DSR = frozenset(s.name for s in SERVICES) - NAT


def plan() -> Plan:
    return Plan(
        targets=tuple(
            Target(
                name=s.name,
                address=str(s.vip),
                http_rate=4,
                udp_rate=4,
                tcp_flows=CONNECTIONS,
                udp_flows=UDP_FLOWS,
                message_interval_s=1.5,
            )
            for s in SERVICES
        ),
        # Longer than what a shared, slow processor may take; a lost flow is never answered.
        request_timeout_s=5.0,
        stall_timeout_s=5.0,
    )


@dataclass
class Scene:
    """Everything up, and all flows with it."""

    lab: Lab
    daemons: dict[str, Shuntd]
    traffic: Traffic

    def nothing_lost(
        self, of: frozenset[str] = DSR | NAT, kinds: frozenset[Kind] = frozenset(Kind)
    ) -> AbstractContextManager[dict[int, Opened]]:
        return nothing_lost(self.traffic, of, kinds)

    def everybody_answers(self) -> None:
        """Connections and flows go on, and new ones are taken."""
        before = self.traffic.answers()
        self.traffic.wait_answered()
        wanted = {(s.name, kind) for s in SERVICES for kind in (Kind.HTTP, Kind.UDP)}
        self.traffic.wait_until(
            lambda t: wanted <= {key[:2] for key in t.answers() - before}, "new requests answered"
        )

    def slots(self) -> dict[str, dict[str, int]]:
        """By node: slots in all and moving ones."""
        return {role: d.client.get("status")["slots"] for role, d in self.daemons.items()}


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    with contextlib.ExitStack() as stack:
        lab, started = stack.enter_context(balanced_lab())
        traffic = stack.enter_context(Traffic(lab.client, plan(), lab.directory))
        traffic.wait_established(30)
        yield Scene(lab, started, traffic)


class Datagrams:
    """A thread that exchanges datagrams with a service; each is numbered and sent only once."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.numbers = sock, itertools.count(1)
        self.open: set[int] = set()  # not answered yet
        self.backends: set[str] = set()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._exchange)
        self.thread.start()

    def _exchange(self) -> None:
        progress_s = time.monotonic()
        while not self.done.wait(0.002) or (self.open and time.monotonic() < progress_s + LATE_S):
            # No more than any queue holds: a full one is no load balancer's fault.
            if len(self.open) < WINDOW and not self.done.is_set():
                self.open.add(number := next(self.numbers))
                with contextlib.suppress(OSError):  # an ICMP error about an earlier one
                    self.sock.send(b"%d" % number)
            with contextlib.suppress(OSError):
                while answer := self.sock.recv(100):
                    backend, _, number_text = answer.decode().split()
                    self.backends.add(backend)
                    self.open.discard(int(number_text))
                    progress_s = time.monotonic()

    def end(self) -> int:
        """Wait for the answers; how many had one."""
        self.done.set()
        self.thread.join()
        return next(self.numbers) - 1 - len(self.open)


@contextlib.contextmanager
def every_datagram_arrives(lab: Lab) -> Iterator[dict[str, Datagrams]]:
    """Meanwhile not one datagram to any service is lost, nor its answer, however late: where TCP
    would send again and nobody would notice."""
    with contextlib.ExitStack() as stack:
        with lab.client.inside():
            sockets = {s.name: stack.enter_context(udp_socket(s.vip)) for s in SERVICES}
        exchanges = {name: Datagrams(sock) for name, sock in sockets.items()}
        for exchange in exchanges.values():
            stack.callback(exchange.end)
        yield exchanges
        answered = {name: exchange.end() for name, exchange in exchanges.items()}
        lost = {name: len(exchange.open) for name, exchange in exchanges.items()}
        assert lost == dict.fromkeys(exchanges, 0)
        assert {len(exchange.backends) for exchange in exchanges.values()} == {1}
        assert min(answered.values()) > 2 * WINDOW


def udp_socket(vip: IPAddress) -> socket.socket:
    family = socket.AF_INET if vip.version == 4 else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.connect((str(vip), ECHO_PORT))
    return sock


@contextlib.contextmanager
def connections(lab: Lab, service: LabService, number: int = NEW) -> Iterator[list[socket.socket]]:
    """New connections to a service's echo server."""
    address = str(service.vip), ECHO_PORT
    with contextlib.ExitStack() as stack:
        with lab.client.inside():
            made = [
                stack.enter_context(socket.create_connection(address, 5)) for _ in range(number)
            ]
        yield made


def backends_of(sockets: Sequence[socket.socket]) -> list[str]:
    """Who answers on each; "" where it is lost."""
    return [_ask(sock) for sock in sockets]


def _ask(sock: socket.socket) -> str:
    try:
        sock.sendall(b"who\n")
        return sock.recv(100).decode().partition(" ")[0]
    except OSError:
        return ""


def test_at_first_every_backend_and_both_nodes_carry_every_service(scene: Scene) -> None:
    with scene.nothing_lost() as flows:
        assert Counter(s.mode for s in SERVICES) == {Mode.DSR_IPIP: 4, Mode.DSR_L2: 2, Mode.NAT: 2}
        for service in SERVICES:
            own = [f for f in flows.values() if f.target == service.name]
            assert {f.backend for f in own} == {host.role for host in scene.lab.backends}
            assert len({f.peer for f in own}) == (2 if service.mode is Mode.NAT else 1)
        for daemon in scene.daemons.values():
            assert {i["mode"] for i in daemon.client.get("status")["interfaces"]} == {"native"}
            shown = daemon.client.get("services")["services"]
            assert all(service["packets"] for service in shown)


def test_a_restart(scene: Scene) -> None:
    with scene.nothing_lost(), every_datagram_arrives(scene.lab):
        for daemon in scene.daemons.values():
            daemon.stop()
        scene.everybody_answers()
        for daemon in scene.daemons.values():
            daemon.start()
        for daemon in scene.daemons.values():
            daemon.wait_up()


def test_kill_9(scene: Scene) -> None:
    with scene.nothing_lost(), every_datagram_arrives(scene.lab):
        for daemon in scene.daemons.values():
            daemon.kill()
        scene.everybody_answers()
        for daemon in scene.daemons.values():
            daemon.start()
        for daemon in scene.daemons.values():
            daemon.wait_up()


def test_a_program_swap(scene: Scene) -> None:
    with scene.nothing_lost(), every_datagram_arrives(scene.lab):
        for daemon in scene.daemons.values():
            before = daemon.program()
            daemon.swap()
            assert daemon.program() != before
        scene.everybody_answers()


def test_the_loss_of_a_node_and_its_return_with_empty_tables(scene: Scene) -> None:
    assert {s["moving"] + s["lingering"] for s in scene.slots().values()} == {0}
    lost, *others = scene.lab.balancers
    own = {str(address) for address in lost.addresses}
    with scene.nothing_lost(DSR) as flows:
        scene.lab.unplug(lost)
        scene.lab.announce(others)
        scene.daemons[lost.role].power_off()
        scene.traffic.wait_answered()
        live = {f.flow for f in scene.traffic.live()}
        ended = [f for f in flows.values() if f.flow not in live]
        # Translations end with their node, and no others do.
        assert {(f.target, f.kind) for f in ended} == {(n, Kind.TCP_FLOW) for n in NAT}
        assert {f.peer for f in ended} <= own
        scene.lab.plug_in(lost)
        scene.daemons[lost.role].start()
        scene.daemons[lost.role].wait_up()
        scene.lab.announce(scene.lab.balancers)
        scene.everybody_answers()
    scene.traffic.wait_established()


def test_a_drain(scene: Scene) -> None:
    drained = scene.lab.backends[1].role
    with scene.nothing_lost() as flows, every_datagram_arrives(scene.lab):
        for daemon in scene.daemons.values():
            daemon.drain(scene.lab.backends[1])
        for service in SERVICES:
            with connections(scene.lab, service) as new:
                others = {host.role for host in scene.lab.backends} - {drained}
                assert set(backends_of(new)) == others, service.name
        scene.everybody_answers()
        staying = Counter(f.target for f in scene.traffic.live() if f.backend == drained)
        assert staying == Counter(f.target for f in flows.values() if f.backend == drained)
        assert min(staying[s.name] for s in SERVICES) > 0


def test_that_a_lost_datagram_is_noticed(scene: Scene) -> None:
    service = SERVICES[0]
    with (
        scene.nothing_lost(),  # of what is sent again
        pytest.raises(AssertionError, match=service.name),
        every_datagram_arrives(scene.lab) as exchanges,
        blackhole(scene.lab, service.vip),
    ):
        scene.traffic.wait_until(
            lambda _: len(exchanges[service.name].open) == WINDOW, "nothing is answered"
        )


@contextlib.contextmanager
def blackhole(lab: Lab, vip: IPAddress) -> Iterator[None]:
    lab.router.ip(f"route add blackhole {vip}")
    try:
        yield
    finally:
        lab.router.ip(f"route del blackhole {vip}")


def test_connections_made_while_slots_move_need_the_node_that_made_them(scene: Scene) -> None:
    """The limit that the design names. Older ones are safe for a whole idle window: a node that
    does not know them sends them to the owner from before the change."""
    old = frozenset({Kind.TCP_FLOW})
    with scene.nothing_lost(DSR, old), contextlib.ExitStack() as stack:
        new = {
            s.name: stack.enter_context(connections(scene.lab, s))
            for s in SERVICES
            if s.name in DSR
        }
        before = {name: backends_of(sockets) for name, sockets in new.items()}
        scene.lab.announce(scene.lab.balancers[1:])
        after = {name: backends_of(sockets) for name, sockets in new.items()}
        scene.traffic.wait_answered()
        scene.lab.announce(scene.lab.balancers)
    moved = [
        now
        for name in new
        for was, now in zip(before[name], after[name], strict=True)
        if was != now
    ]
    assert set(moved) == {""}
    assert len(moved) < len(new) * NEW / 2


def test_that_slots_without_a_memory_lose_connections(scene: Scene) -> None:
    """What a load balancer that only hashes does; and what the tests above would see of it."""
    scene.traffic.wait_established()
    with scene.nothing_lost():
        pass
    before = len(scene.traffic.failures())
    for daemon in scene.daemons.values():
        daemon.kill()
        _exchange_owners(daemon)
    scene.traffic.wait_until(
        lambda t: {f.target for f in t.failures()[before:] if f.flow} >= DSR, "flows are lost"
    )
    lost = {f.target for f in scene.traffic.failures()[before:] if f.flow}
    assert lost == DSR  # nat has its state in any case


def _exchange_owners(daemon: Shuntd) -> None:
    """Every slot gets the backend after its own, at once, as if that had always been its owner."""
    slots = Map.pinned(daemon.bpffs / "maps" / "slots")
    words = slots.mapped()["word"]
    used = np.flatnonzero(words)
    words[used] = slot.settled(np.roll(slot.cur(words[used]), 1))
    slots.close()
