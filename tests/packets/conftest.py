# SPDX-License-Identifier: Apache-2.0
"""Packet tests: one packet through a real, loaded program."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.packets.balancer import Balancer
from tests.packets.tracking import Case


@pytest.fixture(autouse=True)
def one_processor() -> Iterator[None]:
    """Budgets are kept for each processor: a test that moved would find a second one."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(allowed)[os.getpid() % len(allowed)]})
    yield
    os.sched_setaffinity(0, allowed)


@pytest.fixture
def make_lb() -> Iterator[Callable[..., Balancer]]:
    """make_lb(sizes, **config): balancers with other constants or map sizes."""
    with ExitStack() as stack:
        yield lambda *args, **config: stack.enter_context(Balancer(*args, **config))


@pytest.fixture
def lb() -> Iterator[Balancer]:
    with Balancer() as balancer:
        yield balancer


@pytest.fixture(params=[4, 6])
def make_case(
    request: pytest.FixtureRequest, make_lb: Callable[..., Balancer]
) -> Callable[..., Case]:
    """make_case(sizes, **config): a service on the move; in both families."""
    return lambda *args, **config: Case(make_lb(*args, **config), request.param)


@pytest.fixture
def case(make_case: Callable[..., Case]) -> Case:
    return make_case()
