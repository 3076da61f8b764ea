# SPDX-License-Identifier: Apache-2.0
"""Rates of `shunt top`, from two readings."""

from typing import Any

from shunt.cli.rates import Reading, rate, rates, reading
from shunt.cli.top import rows

KEY = ("web", "")


def service(name: str, packets: int) -> dict[str, Any]:
    return {"name": name, "packets": packets, "bytes": 100 * packets, "slots": {"moving": 3}}


def backend(of: str, name: str, packets: int) -> dict[str, Any]:
    return {
        "service": of,
        "backend": name,
        "state": "up",
        "packets": packets,
        "bytes": 100 * packets,
    }


def test_a_rate_is_the_difference_by_the_time() -> None:
    before, after = Reading(10.0, {KEY: (100, 1000)}), Reading(12.0, {KEY: (300, 2000)})
    assert rate(before, after, KEY) == (100.0, 4000.0)


def test_a_counter_that_began_again_is_not_negative() -> None:
    before, after = Reading(10.0, {KEY: (100, 1000)}), Reading(11.0, {KEY: (40, 400)})
    assert rate(before, after, KEY) == (40.0, 3200.0)


def test_what_is_new_or_gone_has_no_rate() -> None:
    full, empty = Reading(10.0, {KEY: (100, 1000)}), Reading(11.0, {})
    assert rate(full, empty, KEY) == (0.0, 0.0)
    assert rate(Reading(9.0, {}), full, KEY) == (0.0, 0.0)
    assert rate(full, full, KEY) == (0.0, 0.0)


def test_the_busiest_stand_first() -> None:
    quiet, busy = service("a", 0), service("web", 50)
    backends = [backend("web", "10.0.0.1", 10), backend("web", "10.0.0.2", 40)]
    before = reading(0.0, [quiet, service("web", 0)], [{**b, "packets": 0} for b in backends])
    after = reading(2.0, [quiet, busy], backends)
    found = rates(before, after, [quiet, busy], backends)
    assert [(s["service"], s["packets_per_s"]) for s in found] == [("web", 25.0), ("a", 0.0)]
    assert [b["backend"] for b in found[0]["backends"]] == ["10.0.0.2", "10.0.0.1"]
    assert found[0]["backends"][0]["packets_per_s"] == 20.0
    assert rows(found)[0] == ("web", "", "", "25", "20.0 kbit", "3")
    assert [line[1] for line in rows(found)] == ["", "10.0.0.2", "10.0.0.1", ""]
