# SPDX-License-Identifier: Apache-2.0
"""Health as a decision over results, with the time passed in."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shunt.lb.health import GAP_S, Health, Result, Rules, Turn

RULES = Rules(rise=2, fall=3, window_s=100.0)


def feed(health: Health[str], results: str, begin_s: float = 0.0, every_s: float = 1.0) -> str:
    """Results as + and -; what turned, as U, D, G, or . at each."""
    turned = ""
    for number, result in enumerate(results):
        at_s = begin_s + number * every_s
        turns = health.result("a", Result(result == "+", at_s, reason="refused"))
        assert len(turns) <= 1
        turned += turns[0].turn[0].upper() if turns else "."
    return turned


@pytest.fixture
def health() -> Health[str]:
    health: Health[str] = Health()
    health.watch("a", RULES, 0.0)
    return health


@pytest.mark.parametrize(
    ("results", "turned"),
    [
        ("++++", "...."),  # never checked counts as up: no turn
        ("---", "..D"),
        ("----+++", "..D..U."),
        ("--+--+--+", "........."),  # only failures in a row
        ("---+-+-++", "..D.....U"),
        ("---++---", "..D.U..D"),
    ],
)
def test_rise_and_fall(health: Health[str], results: str, turned: str) -> None:
    assert feed(health, results) == turned


def test_one_of_each_is_enough_when_told_so() -> None:
    health: Health[str] = Health()
    health.watch("a", Rules(rise=1, fall=1), 0.0)
    assert feed(health, "+-+-") == ".DUD"


def test_a_restarted_agent_goes_on_from_what_it_found() -> None:
    health: Health[str] = Health()
    health.watch("a", RULES, 0.0, up=False)
    assert not health.is_up("a")
    assert feed(health, "----") == "...."
    assert feed(health, "++") == ".U"


def test_who_is_not_watched_is_up_and_turns_nothing(health: Health[str]) -> None:
    assert health.is_up("b")
    assert health.result("b", Result(ok=False, at_s=1.0)) == []
    health.forget("a")
    assert feed(health, "-----") == "....."
    assert health.is_up("a")
    assert len(health) == 0


def test_new_rules_keep_what_is_known(health: Health[str]) -> None:
    assert feed(health, "---") == "..D"
    health.watch("a", Rules(rise=1, fall=1), 3.0, up=True)
    assert not health.is_up("a")
    assert feed(health, "+") == "U"


def test_a_transition_says_why(health: Health[str]) -> None:
    for at_s in (1.0, 2.0):
        health.result("a", Result(ok=False, at_s=at_s, reason="timed out"))
    (transition,) = health.result("a", Result(ok=False, at_s=3.0, reason="refused"))
    assert (transition.key, transition.turn, transition.reason) == ("a", Turn.DOWN, "refused")
    state = health.state("a")
    assert state is not None
    assert (state.checks, state.failures, state.since_s) == (3, 3, 3.0)


def test_a_removed_backend_is_gone_after_a_whole_window(health: Health[str]) -> None:
    health.remove("a")
    assert feed(health, "-" * 101) == "..D" + "." * 97 + "G"
    assert feed(health, "-----", begin_s=101.0) == "....."


def test_one_that_is_configured_is_never_gone(health: Health[str]) -> None:
    assert feed(health, "-" * 300) == "..D" + "." * 297
    # It has failed for a window already when it is removed.
    health.remove("a")
    assert feed(health, "-", begin_s=300.0) == "G"


def test_one_success_begins_the_window_anew(health: Health[str]) -> None:
    health.remove("a")
    assert "G" not in feed(health, "-" * 100 + "+" + "-" * 100)
    assert feed(health, "-", begin_s=201.0) == "G"


def test_time_without_checks_does_not_count_as_failing(health: Health[str]) -> None:
    health.remove("a")
    assert feed(health, "---", every_s=1.0) == "..D"
    assert feed(health, "-", begin_s=100_000.0) == "."
    state = health.state("a")
    assert state is not None
    assert state.failing_s == 2.0 + GAP_S


def test_a_removed_backend_that_comes_back_is_not_gone(health: Health[str]) -> None:
    health.remove("a")
    assert feed(health, "-" * 101).endswith("G")
    health.watch("a", RULES, 101.0)
    state = health.state("a")
    assert state is not None
    assert (state.gone, state.removed, state.up) == (False, False, False)
    assert feed(health, "++", begin_s=102.0) == ".U"


@given(st.lists(st.booleans(), max_size=60), st.integers(1, 4), st.integers(1, 4))
def test_up_is_what_the_last_long_enough_run_said(
    results: list[bool], rise: int, fall: int
) -> None:
    """Against the whole history: the last run of `rise` successes or `fall` failures decides."""
    health: Health[str] = Health()
    health.watch("a", Rules(rise, fall), 0.0)
    for number, ok in enumerate(results):
        health.result("a", Result(ok, float(number)))
    up = True
    for ok, run in itertools.groupby(results):
        if len(list(run)) >= (rise if ok else fall):
            up = ok
    assert health.is_up("a") == up


@given(st.text("+-", max_size=40), st.booleans())
def test_who_is_down_is_known_without_looking_at_all(results: str, up: bool) -> None:
    health: Health[str] = Health()
    health.watch("a", RULES, 0.0, up)
    for number, result in enumerate(results):
        health.result("a", Result(result == "+", float(number)))
        assert health.down == (set() if health.is_up("a") else {"a"})
    health.remove("a")
    health.watch("a", RULES, 99.0)
    assert health.down == (set() if health.is_up("a") else {"a"})
    health.forget("a")
    assert health.down == set()
