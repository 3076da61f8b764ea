# SPDX-License-Identifier: Apache-2.0
"""No packet of a flow whose backend is up ever reaches another backend: random histories (S76)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shunt.agent.plan import Planner
from shunt.agent.tables import Tables
from shunt.lb import slots as slot
from shunt.lb.model import Protocol
from tests.packets import defects
from tests.packets.histories import Lab, history

LB = Path(__file__).resolve().parents[2] / "xdp" / "lb.bpf.o"
SEEDS = 24
AFFINITY_S = 30  # below the idle window: clients are forgotten before their connections
CATCHING_SEEDS = 60  # a defect may hide from some histories, not from all of these
EVENTS = ("FLOW_REMEMBERED", "FLOW_TABLE_FULL", "FLOW_UNPROTECTED")
UDP: dict[str, Any] = {"protocol": Protocol.UDP, "scans": 0.2}  # its windows are short
MOVES = ("weighed", "grown", "shrunk")


def broken(path: Path, seeds: range, seen: Counter[str] | None = None, **fields: Any) -> str | None:
    """The first broken promise of these histories; `seen` counts what they came to."""
    lab = Lab(path, **fields)
    try:
        for seed in seeds:
            if said := history(lab, seed, done=seen):
                return said
            if seen is not None:
                seen.update({event: lab.times(event) for event in EVENTS})
            lab.empty()
    finally:
        lab.close()
    return None


@pytest.mark.parametrize("first", range(6, SEEDS, 6))
def test_flows_are_kept(first: int) -> None:
    assert broken(LB, range(first, first + 6)) is None


@pytest.mark.parametrize("hash_by", ["tuple", "client"])
def test_flows_are_kept_with_affinity_switched_on_and_off(hash_by: str) -> None:
    """S53, S76."""
    assert broken(LB, range(8), affinity_s=AFFINITY_S, hash_by=hash_by) is None


def test_datagrams_are_kept() -> None:
    """Flows that speak within the grace period; and these histories, too, reach what they are
    about."""
    seen = Counter[str]()
    assert broken(LB, range(4), seen, **UDP) is None
    assert all(seen[what] for what in EVENTS + MOVES), seen


def test_histories_reach_what_they_are_about() -> None:
    """The first of them fill the table, weigh, grow and shrink the region, and serve flows that
    cannot be protected."""
    seen = Counter[str]()
    assert broken(LB, range(6), seen) is None
    assert all(seen[what] for what in EVENTS + MOVES), seen


def test_a_region_that_never_shrinks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "may_shrink", lambda _words, _log2: False)
    seen = Counter[str]()
    assert broken(LB, range(3), seen) is None
    assert not seen["shrunk"]


@pytest.mark.parametrize("defect", defects.PROGRAM_DEFECTS)
def test_defects_of_the_program_are_caught(defect: str) -> None:
    assert broken(defects.object_of(defect), range(CATCHING_SEEDS)) is not None


def _prev_overwritten(words: Any, owners: Any) -> Any:
    moved = slot.cur(words) != owners
    return np.where(moved, slot.pack(owners, slot.cur(words), slot.State.MOVING), words), moved


def _settled_while_busy(words: Any, since: Any, _busy: Any, began: int) -> Any:
    return (slot.state(words) == slot.State.LINGERING) & (since < began)


def _growing_loses_prev(values: Any, log2: int, real: Callable[..., Any] = slot.resize) -> Any:
    return real(slot.pack(slot.cur(values), slot.cur(values), slot.state(values)), log2)


def _shrinking_shifts(values: Any, log2: int, real: Callable[..., Any] = slot.resize) -> Any:
    return np.roll(real(values, log2), int(log2 < len(values).bit_length() - 1))


def _shrinks_at_once(_words: Any, _log2: int) -> bool:
    return True


def _failing_forgets(self: Tables) -> Any:
    both = self.flag.known | self.flag.up
    return (self.backends["flags"] & both) == both


def _lingers_at_once(words: Any, *_: Any) -> Any:
    return slot.state(words) == slot.State.MOVING


AGENT_DEFECTS: dict[str, tuple[Any, str, Any]] = {
    "prev overwritten while moving": (slot, "retable", _prev_overwritten),
    "settled while busy": (slot, "free_of_exceptions", _settled_while_busy),
    "growing loses prev": (slot, "resize", _growing_loses_prev),
    "shrinking shifts owners": (slot, "resize", _shrinking_shifts),
    "shrinks while slots move": (slot, "may_shrink", _shrinks_at_once),
    "failing forgets": (Tables, "known", _failing_forgets),
    "lingers before its window has passed": (slot, "quiet", _lingers_at_once),
}


@pytest.mark.parametrize("defect", AGENT_DEFECTS)
def test_defects_of_the_agent_are_caught(defect: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, wrong = AGENT_DEFECTS[defect]
    monkeypatch.setattr(owner, name, wrong)
    assert broken(LB, range(CATCHING_SEEDS)) is not None


def test_a_grace_period_that_is_ignored_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot, "quiet", _lingers_at_once)
    assert broken(LB, range(CATCHING_SEEDS), **UDP) is not None


def test_datagrams_that_are_taken_for_new_ones_are_caught() -> None:
    path = defects.object_of("unknown packets go to cur")
    assert broken(path, range(CATCHING_SEEDS), **UDP) is not None


def test_affinity_switched_off_without_lingering_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def retable(_self: Planner, _target: Any, _place: Any, words: Any, table: Any) -> Any:
        return slot.retable(words, table)

    monkeypatch.setattr(Planner, "_retable", retable)
    assert broken(LB, range(CATCHING_SEEDS), affinity_s=AFFINITY_S) is not None
