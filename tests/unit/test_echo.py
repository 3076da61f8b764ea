# SPDX-License-Identifier: Apache-2.0
"""Which VIPs answer echo requests."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from shunt.agent.echo import answering
from shunt.agent.tables import Placed
from shunt.lb.compile import Condition, targets
from shunt.lb.model import Backend, Configuration, Port, Protocol, Service, Settings

A, B = ip_address("203.0.113.1"), ip_address("2001:db8::1")
WELL = Condition()
BACKEND = Backend(ip_address("10.0.0.1"))


def service(name: str, *vips: object, echo: bool | None = None, empty: bool = False) -> Service:
    return Service(
        name=name,
        vips=tuple(vips),  # type: ignore[arg-type]
        ports=(Port(80, Protocol.TCP), Port(53, Protocol.UDP)),
        backends=() if empty else (BACKEND,),
        echo=echo,
    )


def who(*services: Service, node: bool = True, condition: Condition = WELL) -> set[object]:
    configuration = Configuration(Settings(interfaces=("eth0",), echo=node), services)
    found = targets(services, lambda _name, _endpoint: condition)
    placed = {name: Placed(svc, name) for svc, name in enumerate(sorted(found), 1)}
    return set(answering(found.values(), configuration, placed))


@pytest.mark.parametrize("node", [True, False])
def test_the_service_says_else_the_node(node: bool) -> None:
    assert who(service("a", A, B), node=node) == ({A, B} if node else set())
    assert who(service("a", A, echo=True), node=node) == {A}
    assert who(service("a", A, echo=False), node=node) == set()


def test_one_service_of_a_vip_is_enough() -> None:
    assert who(service("a", A, echo=False), service("b", A)) == {A}
    assert who(service("a", A, empty=True), service("b", A)) == {A}


def test_only_while_a_backend_lives() -> None:
    assert who(service("a", A, empty=True)) == set()
    assert who(service("a", A), condition=Condition(up=False)) == set()
    # Drained, it still serves the connections it has.
    assert who(service("a", A), condition=Condition(drained=True)) == {A}


def test_the_first_service_by_name_counts_it() -> None:
    services = service("b", A), service("a", A)
    configuration = Configuration(Settings(interfaces=("eth0",)), services)
    found = targets(services, lambda _name, _endpoint: Condition())
    placed = {name: Placed(svc, name) for svc, name in enumerate(sorted(found), 1)}
    assert answering(found.values(), configuration, placed) == {A: placed["a/tcp"].svc}
