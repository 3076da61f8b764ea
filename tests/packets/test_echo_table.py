# SPDX-License-Identifier: Apache-2.0
"""Which VIPs are known, and answer echo requests: the agent's part, on the real map."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from shunt.agent.echo import AT_TC, Echo, answers
from shunt.agent.tables import Placed
from shunt.lb.compile import Condition, targets
from shunt.lb.model import Backend, IPAddress, Mode, Port, Protocol, Service
from tests.packets.balancer import Balancer

A, B = ip_address("203.0.113.1"), ip_address("2001:db8::1")
WELL = Condition()
BACKEND = Backend(ip_address("10.0.0.1"))
ALL = tuple("abc")


def service(name: str, *vips: object, echo: bool | None = None, empty: bool = False) -> Service:
    return Service(
        name=name,
        vips=tuple(vips),  # type: ignore[arg-type]
        ports=(Port(80, Protocol.TCP), Port(53, Protocol.UDP)),
        backends=() if empty else (BACKEND,),
        echo=echo,
    )


class Asked:
    """The map of a loaded balancer, brought to what services want."""

    def __init__(self, lb: Balancer) -> None:
        self.lb = lb
        self.echo = Echo(lb.map("echo"))
        self.placed = {
            name: Placed(svc, name)
            for svc, name in enumerate((f"{s}/{p}" for s in ALL for p in ("tcp", "udp")), 1)
        }

    def who(self, *services: Service, **asked: Any) -> dict[IPAddress, int]:
        """Who answers then, by the map."""
        return {vip: word for vip, word in self.known(*services, **asked).items() if word}

    def known(
        self,
        *services: Service,
        node: bool = True,
        condition: Condition = WELL,
        only: tuple[str, ...] | None = None,
    ) -> dict[IPAddress, int]:
        """The map, then."""
        want = targets(services, lambda _name, _endpoint: condition)
        own = {s.name: s.echo for s in services}
        names = only and [f"{s}/{p}" for s in only for p in ("tcp", "udp")]
        self.echo.update(
            names,
            want,
            self.placed,
            lambda s, _vip: node if own[s] is None else bool(own[s]),
            lambda target: target.mode is Mode.LOCAL,
        )
        there = Echo(self.lb.map("echo")).there
        assert there == self.echo.there
        return there


@pytest.fixture
def asked() -> Iterator[Asked]:
    with Balancer() as lb:
        yield Asked(lb)


@pytest.mark.parametrize("node", [True, False])
def test_the_service_says_else_the_node(node: bool, asked: Asked) -> None:
    assert asked.who(service("a", A, B), node=node).keys() == ({A, B} if node else set())
    assert asked.who(service("a", A, echo=True), node=node).keys() == {A}
    assert asked.who(service("a", A, echo=False), node=node) == {}


def test_one_service_of_a_vip_is_enough(asked: Asked) -> None:
    assert asked.who(service("a", A, echo=False), service("b", A)).keys() == {A}
    assert asked.who(service("a", A, empty=True), service("b", A)).keys() == {A}


def test_only_while_a_backend_lives(asked: Asked) -> None:
    assert asked.who(service("a", A, empty=True)) == {}
    assert asked.who(service("a", A), condition=Condition(up=False)) == {}
    # Drained, it still serves the connections it has.
    assert asked.who(service("a", A), condition=Condition(drained=True)).keys() == {A}


def test_the_first_target_by_name_counts_it(asked: Asked) -> None:
    assert asked.who(service("b", A), service("a", A)) == {A: asked.placed["a/tcp"].svc}
    assert asked.who(service("b", A)) == {A: asked.placed["b/tcp"].svc}


def test_only_what_changed_is_looked_at(asked: Asked) -> None:
    a, b, c = service("a", A), service("b", A, B), service("c", B)
    assert asked.who(a, b, c).keys() == {A, B}
    assert asked.who(a, c, only=("b",)) == {A: 1, B: 5}
    assert asked.who(a, only=("c",)) == {A: 1}
    assert asked.who(b, only=("a", "b")) == {A: 3, B: 3}
    assert asked.who(only=ALL) == {}


def test_what_a_predecessor_left_is_corrected(asked: Asked) -> None:
    asked.who(service("a", A), service("b", B))
    asked.echo = Echo(asked.lb.map("echo"))
    assert asked.who(service("a", A)) == {A: 1}


def test_those_that_do_not_answer_are_known_too(asked: Asked) -> None:
    """As long as a backend lives; their fragments are counted."""
    assert asked.known(service("a", A, B, echo=False), service("b", B)) == {A: 0, B: 3}
    assert asked.known(service("a", A, echo=False), condition=Condition(up=False)) == {}


def test_of_which_some_services_are_tcs(asked: Asked) -> None:
    local = replace(service("b", A, B, echo=False), mode=Mode.LOCAL)
    assert asked.known(service("a", A), local) == {A: AT_TC | 1, B: AT_TC}
    assert asked.known(service("a", A), only=("b",)) == {A: 1}
    assert asked.lb.object.btf.enum("vip_flag", "VIP_")["AT_TC"] == AT_TC


def test_addresses_of_this_host_are_not_in_it() -> None:
    node = replace(service("a", A, B), node=(ip_network("203.0.113.0/24"),))
    assert [answers(node, vip, default) for vip in (A, B) for default in (True, False)] == [
        None,
        None,
        True,
        False,
    ]
