# SPDX-License-Identifier: Apache-2.0
"""Packet tests: one packet through a real, loaded program."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.packets.backend_node import BackendNode
from tests.packets.balancer import Balancer
from tests.packets.tracking import Case
from tests.packets.translator import Translator

KEPT = 8
HOOKED = ("hooks", True)
Asked = tuple[tuple[Any, ...], tuple[Any, ...]]  # sizes, config


@pytest.fixture(autouse=True)
def one_processor() -> Iterator[None]:
    """Budgets are kept for each processor: a test that moved would find a second one."""
    allowed = os.sched_getaffinity(0)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0")
    os.sched_setaffinity(0, {sorted(allowed)[int(worker.removeprefix("gw")) % len(allowed)]})
    yield
    os.sched_setaffinity(0, allowed)


class Loaded:
    """Balancers that tests have left, emptied: most ask for the same, and loading takes long."""

    def __init__(self) -> None:
        self._free: list[tuple[Asked, Balancer]] = []

    def take(self, sizes: dict[str, int] | None, config: dict[str, Any]) -> tuple[Asked, Balancer]:
        asked = tuple(sorted((sizes or {}).items())), tuple(sorted(config.items()))
        for at, (kind, balancer) in enumerate(self._free):
            if kind == asked:
                del self._free[at]
                return asked, balancer
        return asked, Balancer(sizes, **config)

    def give(self, asked: Asked, balancer: Balancer) -> None:
        if HOOKED in asked[1]:  # its program array has a user's hook
            balancer.close()
        if balancer.closed:
            return
        balancer.empty()
        self._free.append((asked, balancer))
        if len(self._free) > KEPT:
            self._free.pop(0)[1].close()

    def close(self) -> None:
        for _, balancer in self._free:
            balancer.close()


@pytest.fixture(scope="session")
def loaded() -> Iterator[Loaded]:
    found = Loaded()
    yield found
    found.close()


@pytest.fixture
def make_lb(loaded: Loaded) -> Iterator[Callable[..., Balancer]]:
    """make_lb(sizes, **config): balancers with other constants or map sizes."""
    taken = []

    def make(sizes: dict[str, int] | None = None, **config: Any) -> Balancer:
        taken.append(loaded.take(sizes, config))
        return taken[-1][1]

    yield make
    for asked, balancer in taken:
        loaded.give(asked, balancer)


@pytest.fixture
def lb(make_lb: Callable[..., Balancer]) -> Balancer:
    return make_lb()


@pytest.fixture(params=[4, 6])
def make_case(
    request: pytest.FixtureRequest, make_lb: Callable[..., Balancer]
) -> Callable[..., Case]:
    """make_case(sizes, **config): a service on the move; in both families."""
    return lambda *args, **config: Case(make_lb(*args, **config), request.param)


@pytest.fixture
def case(make_case: Callable[..., Case]) -> Case:
    return make_case()


@pytest.fixture(scope="module")
def translator() -> Iterator[Translator]:
    with Translator() as translator:
        yield translator


@pytest.fixture
def tc(translator: Translator) -> Translator:
    """The TC programs, emptied."""
    translator.empty()
    return translator


@pytest.fixture
def program(hook: str, request: pytest.FixtureRequest) -> Balancer:
    """By a test's parameter `hook`: the balancer, or TC's programs."""
    found: Balancer = request.getfixturevalue({"xdp": "lb", "tc": "tc"}[hook])
    return found


@pytest.fixture
def make_node() -> Iterator[Callable[..., BackendNode]]:
    """The programs of a backend, as often as needed."""
    made: list[BackendNode] = []

    def make(*args: Any, **fields: Any) -> BackendNode:
        made.append(BackendNode(*args, **fields))
        return made[-1]

    yield make
    for node in made:
        node.close()


@pytest.fixture(scope="module")
def loaded_node() -> Iterator[BackendNode]:
    with BackendNode() as node:
        yield node


@pytest.fixture
def node(loaded_node: BackendNode) -> BackendNode:
    """One that remembers nothing."""
    loaded_node.empty()
    return loaded_node
