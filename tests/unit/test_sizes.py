# SPDX-License-Identifier: Apache-2.0
"""The tables of flows by the machine's memory: the rule, and that the configuration follows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shunt.agent.doctor import check_balancer
from shunt.agent.sources import settings
from shunt.agent.sources.file import load
from shunt.kern.memory import physical_bytes
from shunt.lb.model import Limits
from shunt.lb.sizes import by_memory
from tests.unit.test_doctor import FACTS, configuration

GB = 2**30
LEAST = Limits()


@pytest.mark.parametrize(
    ("gb", "times"),
    [(0, 1), (1, 1), (16, 1), (24, 1), (29, 1), (31, 2), (48, 2), (62, 4), (125, 8), (1000, 8)],
)
def test_twice_with_each_doubling(gb: int, times: int) -> None:
    assert by_memory(gb * GB) == (LEAST.flows * times, LEAST.nat * times)


def test_lines_of_flows_stay_within_a_percent_of_memory() -> None:
    """64 bytes a line, and a third more lines than flows: nothing of it is given back."""
    for gb in range(31, 2000):
        assert by_memory(gb * GB).flows * 4 // 3 * 64 < gb * GB / 100


def test_this_machines_memory() -> None:
    (total,) = [
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal:")
    ]
    assert total == pytest.approx(physical_bytes(), rel=0.02)


def loaded(place: Path, text: str) -> Limits:
    (place / "shunt.yaml").write_text("interfaces: [eth0]\n" + text)
    return load(place / "shunt.yaml", place / "services.d").settings.limits


def test_what_is_written_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "services.d").mkdir()
    monkeypatch.setattr(settings, "physical_bytes", lambda: 62 * GB)
    assert loaded(tmp_path, "") == Limits(flows=4 * LEAST.flows, nat=4 * LEAST.nat)
    assert loaded(tmp_path, "limits: {nat: 1024}\n") == Limits(flows=4 * LEAST.flows, nat=1024)
    assert loaded(tmp_path, "limits: {flows: 64}\n") == Limits(flows=64, nat=4 * LEAST.nat)


def test_the_doctor_says_how_large_and_why() -> None:
    (told,) = [f for f in check_balancer(FACTS, configuration()) if f.check == "tables"]
    assert told.what == "room for 393,216 flows and 262,144 translations, by the memory of 24 GB"
    small = configuration()
    small = replace(small, settings=replace(small.settings, limits=Limits(nat=1024)))
    (told,) = [f for f in check_balancer(FACTS, small) if f.check == "tables"]
    assert told.what == (
        "room for 393,216 flows, by the memory of 24 GB, and 1,024 translations, as written"
    )
