# SPDX-License-Identifier: Apache-2.0
"""Real programs that talk to VIPs from the node and from its neighbour's namespace, while shuntd
runs, while it does not, and after it has come again.

socket_node.py draws the node; socket_programs.py runs the programs. Each moment follows from the
one before, and the proxies live through all of them.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from shunt.lab.netns import Namespace
from shunt.lb.errors import ShuntError
from tests.netns.socket_node import NOWHERE
from tests.netns.socket_programs import PROGRAMS
from tests.netns.socket_stage import MOMENTS, Stage, a_stage

ROUNDS = 12  # of two backends both are seen, but for one time in two thousand


@pytest.fixture(scope="module", params=["host", "all", "redirected"])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    with a_stage(f"programs-{request.param}", request.param) as found:
        found.serve()
        yield found


def answer_of(space: Namespace, program: str, ip: int) -> set[str] | str:
    """Who answered it, or what went wrong."""
    try:
        return PROGRAMS[program](space, ip)
    except (ShuntError, AssertionError, subprocess.TimeoutExpired) as e:
        return f"{type(e).__name__}: {e}"


@pytest.mark.parametrize("moment", MOMENTS)
def test_programs(stage: Stage, moment: str) -> None:
    stage.go_to(moment)
    asked = [(program, ip) for program in PROGRAMS for ip in (4, 6)]
    with ThreadPoolExecutor(4) as pool:
        answers = pool.map(lambda one: answer_of(stage.space, *one), asked)
        found = dict(zip(asked, answers, strict=True))
    assert {one: said for one, said in found.items() if isinstance(said, str)} == {}
    assert set().union(*found.values()) == {"be1", "be2"}
    # By splice(): it has pipes, and lets go of them.
    free = int(stage.proxies.haproxy("show info")["PipesFree"])
    assert (free > 0) != stage.redirected
    if stage.redirected and stage.moment in ("running", "started again"):
        events = stage.events()
        assert events["PAIRED"] > 0
        assert events["REDIRECTED"] > 0
    for program in ("curl", "dig"):
        seen = set[str]()
        for _ in range(ROUNDS):
            seen |= PROGRAMS[program](stage.space, 4)
        assert seen == {"be1", "be2"}


def test_this_file_can_fail(stage: Stage) -> None:
    """Where they are not covered, none of the VIPs is to be had."""
    stage.go_to(MOMENTS[-1])
    stage.uncover()
    done = stage.space.run("curl", "-sS", "-m", "2", f"http://{NOWHERE}/", check=False)
    assert done.returncode in {7, 28}
