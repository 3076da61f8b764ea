# SPDX-License-Identifier: Apache-2.0
"""Panic and slow start, as decisions, and what they make of a service's slots."""

from ipaddress import ip_address

import numpy as np
import pytest

from shunt.lb.compile import Condition, Endpoint, owners, targets
from shunt.lb.model import Backend, Port, Protocol, Service
from shunt.lb.standing import STEPS, Panic, SlowStarts, panic


@pytest.mark.parametrize(
    ("ups", "threshold", "panics"),
    [
        ("++++", 0.5, False),
        ("++--", 0.5, False),  # fewer than the share, not as few
        ("+---", 0.5, True),
        ("+" + "-" * 99, 0.01, False),
        ("-" * 100, 0.01, True),
        ("-", 0.01, True),
        ("----", 0.0, False),  # switched off
        ("+++-", 1.0, True),
        ("", 1.0, False),
    ],
)
def test_panic(ups: str, threshold: float, panics: bool) -> None:
    found = panic([up == "+" for up in ups], threshold)
    assert found == (Panic(ups.count("+"), len(ups)) if panics else None)


def test_slow_start_goes_up_in_steps() -> None:
    slow: SlowStarts[str] = SlowStarts()
    assert slow.tenths("a", 0.0) == STEPS
    slow.begin("a", 100.0, 20.0)
    assert [slow.tenths("a", 100.0 + s) for s in (0, 1.9, 2, 4, 17.9, 18, 99)] == [
        *(1, 1, 2, 3, 9, 10, 10),
    ]
    assert [slow.next_s("a", 100.0 + s) for s in (0, 0.5, 2, 17.5)] == [2.0, 1.5, 2.0, 0.5]
    slow.forget("a")
    assert "a" not in slow
    assert slow.tenths("a", 100.0) == STEPS


def test_no_duration_is_no_slow_start() -> None:
    slow: SlowStarts[str] = SlowStarts()
    slow.begin("a", 100.0, 0.0)
    assert "a" not in slow


def shares(tenths: dict[int, int], weights: tuple[int, int, int] = (1, 1, 1)) -> list[float]:
    addresses = [ip_address(f"10.0.0.{n}") for n in range(3)]
    service = Service(
        "web",
        (ip_address("203.0.113.1"),),
        (Port(80, Protocol.TCP),),
        backends=tuple(Backend(a, 0, w) for a, w in zip(addresses, weights, strict=True)),
    )
    conditions = {
        Endpoint(a, 0): Condition(tenths=tenths.get(n, STEPS)) for n, a in enumerate(addresses)
    }
    made = targets([service], lambda _, endpoint: conditions[endpoint])["web/tcp"]
    table = owners(made, {endpoint: n for n, endpoint in enumerate(conditions)})
    return [float(np.mean(table == n)) for n in range(3)]


def test_a_starting_backend_has_a_share_of_its_share() -> None:
    assert shares({0: 1}) == pytest.approx([1 / 21, 10 / 21, 10 / 21], abs=0.005)
    assert shares({0: 5}, (4, 1, 1)) == pytest.approx([0.5, 0.25, 0.25], abs=0.005)


def test_where_all_start_alike_nothing_changes() -> None:
    assert shares({0: 3, 1: 3, 2: 3}) == shares({})
