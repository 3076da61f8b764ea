# SPDX-License-Identifier: Apache-2.0
"""Affinity, hashing, source ranges, rates and every port on a real shuntd, with real connections.

```
    client ---- router ---- switch ---- lb1        shuntd: nat in both families, two DSR modes
                                   '---- be1, be2  echo servers that say who they are
```

lab/topology.py draws it in full. The client has many addresses.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from shunt.cli.client import Refused
from shunt.lab.scenario import SERVICES, LabService
from shunt.lab.servers import ECHO_PORT
from shunt.lab.shuntd import daemons
from shunt.lab.topology import CLIENT4, CLIENT6, Lab
from shunt.lb.model import IPAddress, Mode
from tests.netns.lab_scene import LabScene
from tests.scenes import lab_with_servers

FORMS = [s for s in SERVICES if s.name in {"nat-v4", "nat-v6", "ipip-6in6", "l2-v4"}]
forms = pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])
BY_CLIENT = [replace(form, name=f"{form.name}-client", vip=form.vip + 100) for form in FORMS]
# All of them on one of two backends by chance: once in eight million runs.
CLIENTS = 24
LOW, HIGH = 1, 65000
DROPPED_S = 0.2  # nobody answers for so long
AFFINITY_S = 0.5
ROUNDED_S = 0.15  # two ticks of bpf/abi.h, by which an age may be taken for less


def clients(version: int) -> list[IPAddress]:
    first = (CLIENT4 if version == 4 else CLIENT6) + 14
    return [first + n for n in range(CLIENTS)]


class Scene(LabScene):
    def document(self, form: LabService, **options: Any) -> dict[str, Any]:
        """With nat, connections to any port go to one."""
        plain = form.document(self.lab.backends) | {"ports": [ECHO_PORT]}
        if form.mode is Mode.NAT:
            addresses = plain["backends"]
            plain["backends"] = [{"address": a, "port": ECHO_PORT} for a in addresses]
        return plain | options

    def ask(self, form: LabService, **options: Any) -> None:
        """Put the service in force with these keys more.

        Raises: Refused
        """
        self.daemon.write_services([self.document(form, **options)])
        self.daemon.client.post("reload")

    def open(
        self,
        form: LabService,
        port: int = ECHO_PORT,
        source: IPAddress | None = None,
        timeout_s: float = 10.0,
    ) -> socket.socket:
        """Raises: TimeoutError"""
        version = form.vip.version
        source = source or (CLIENT4 if version == 4 else CLIENT6)
        with self.lab.client.inside():
            client = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6)
        try:
            client.settimeout(timeout_s)
            client.bind((str(source), 0))
            client.connect((str(form.vip), port))
        except BaseException:
            client.close()
            raise
        return client

    def who(self, form: LabService, source: IPAddress | None = None) -> str:
        """The backend that a new connection reaches."""
        with self.open(form, source=source) as client:
            client.sendall(b"who\n")
            return client.recv(100).split()[0].decode()

    def backends_of_connections(self, form: LabService) -> set[str]:
        return {self.who(form) for _ in range(CLIENTS)}

    def serves(self, form: LabService, source: IPAddress | None = None) -> bool:
        return self.who(form, source) in {host.role for host in self.lab.backends}

    def drops(self, form: LabService, reason: str, source: IPAddress | None = None) -> bool:
        """Whether nobody answers a new connection; it is counted then, for that reason."""
        before = self.reasons().get(reason, 0)
        try:
            self.open(form, source=source, timeout_s=DROPPED_S).close()
        except TimeoutError:
            self.daemon.wait_until(lambda: self.reasons().get(reason, 0) > before, reason)
            return True
        return False


def add_clients(lab: Lab) -> None:
    lab.client.ip(
        *(f"addr add {address}/24 dev eth0" for address in clients(4)),
        *(f"addr add {address}/64 dev eth0 nodad" for address in clients(6)),
    )


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    every = [*FORMS, *BY_CLIENT]
    with contextlib.ExitStack() as stack:
        entering = lab_with_servers(every, balancer_count=1, backend_count=2)
        lab, _ = stack.enter_context(entering)
        add_clients(lab)
        for host in lab.backends:
            with host.namespace.inside():
                for port in (LOW, HIGH):
                    listener = socket.create_server(
                        ("::", port), family=socket.AF_INET6, dualstack_ipv6=True
                    )
                    stack.enter_context(listener)
        (daemon,) = stack.enter_context(daemons(lab, [])).values()
        scene = Scene(lab, daemon)
        daemon.write_services([scene.document(form) for form in FORMS])
        daemon.write_services([scene.document(form, hash="client") for form in BY_CLIENT])
        daemon.client.post("reload")
        daemon.wait_up(30)
        yield scene


@forms
def test_affinity_is_switched_on_and_off_live(scene: Scene, form: LabService) -> None:
    """S49, S53."""
    scene.ask(form)
    assert len(scene.backends_of_connections(form)) == 2
    scene.ask(form, affinity="1h")
    assert len(scene.backends_of_connections(form)) == 1
    scene.ask(form)
    assert len(scene.backends_of_connections(form)) == 2


def test_affinity_ends(scene: Scene) -> None:
    """Of all services at once, since it has to be waited for."""
    first = {}
    for form in FORMS:
        scene.ask(form, affinity=f"{AFFINITY_S * 1000:g}ms")
        for client in clients(form.vip.version):
            began = time.monotonic()
            first[form.name, client] = scene.who(form, client)
            again = scene.who(form, client)
            late = time.monotonic() - began >= AFFINITY_S
            assert late or again == first[form.name, client]
    ends = time.monotonic() + AFFINITY_S + ROUNDED_S
    while (left_s := ends - time.monotonic()) > 0:
        time.sleep(left_s)
    for form in FORMS:
        own = clients(form.vip.version)
        assert any(scene.who(form, client) != first[form.name, client] for client in own), form
        scene.ask(form)


@pytest.mark.parametrize("form", BY_CLIENT, ids=[form.name for form in BY_CLIENT])
def test_a_hash_by_client(scene: Scene, form: LabService) -> None:
    """Each client has one backend, and clients have both."""
    found = {
        client: {scene.who(form, client) for _ in range(3)} for client in clients(form.vip.version)
    }
    assert {len(backends) for backends in found.values()} == {1}
    assert len(set.union(*found.values())) == 2


@forms
def test_a_denied_client_is_dropped_until_it_is_allowed(scene: Scene, form: LabService) -> None:
    """S62."""
    one, other, *_ = clients(form.vip.version)
    bits = one.max_prefixlen
    near, far = {4: ("192.0.2.0/24", "198.18.0.0/24"), 6: ("2001:db8:1::/64", "2001:db8:2::/64")}[
        form.vip.version
    ]
    scene.ask(form, sources={"deny": [f"{one}/{bits}"]})
    assert scene.drops(form, "DROP_SOURCE_DENIED", one)
    assert scene.serves(form, other)
    scene.ask(form, sources={"allow": [near], "deny": [f"{other}/{bits}"]})
    assert scene.serves(form, one)
    scene.ask(form, sources={"allow": [far]})
    assert scene.drops(form, "DROP_SOURCE_DENIED", one)
    scene.ask(form)
    assert scene.serves(form, one)


@forms
def test_new_connections_are_limited(scene: Scene, form: LabService) -> None:
    """A client network is an IPv4 address, or 64 bits of an IPv6 one."""
    one, other, *_ = clients(form.vip.version)
    scene.ask(form, rate={"connections": 0.01, "burst": 3})
    assert [scene.serves(form, one) for _ in range(3)] == [True] * 3
    assert scene.drops(form, "DROP_RATE_LIMITED", one)
    if form.vip.version == 4:
        assert scene.serves(form, other)
    else:
        assert scene.drops(form, "DROP_RATE_LIMITED", other)
    scene.ask(form)
    assert scene.serves(form, one)


@forms
def test_every_port_of_a_vip(scene: Scene, form: LabService) -> None:
    scene.ask(form, ports=["any"])
    for port in (LOW, ECHO_PORT, HIGH):
        scene.open(form, port).close()
    assert "any" in str(scene.daemon.client.get("services", form.name))
    scene.ask(form)


def test_a_hash_in_force_stays(scene: Scene) -> None:
    form = FORMS[0]
    scene.ask(form)
    with pytest.raises(Refused) as refused:
        scene.ask(form, hash="client")
    assert "can't change while the service is in force" in str(refused.value.errors)
    assert scene.serves(form)
    scene.ask(form)
