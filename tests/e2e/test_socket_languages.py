# SPDX-License-Identifier: Apache-2.0
"""Clients in Go and in Java, with their own resolvers and event loops, that talk to VIPs while
shuntd runs, while it does not, and after it has come again.

The node is that of tests/netns/socket_node.py. Go comes as a Python package, Java from Debian
(requirements/programs.txt, debian-programs.txt); `make test-programs` builds both clients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.netns.socket_node import NOWHERE, ON_LO, SIX
from tests.netns.socket_stage import MOMENTS, Stage, a_stage

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "build/programs"
VIPS = (NOWHERE, ON_LO, SIX)  # of IPv4 Java sends by sockets of IPv6
ANSWERS = {"go": 7, "java": 9}
ROUNDS = 3


JAVA = ("java", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xmx64m", "-cp", str(BUILT))
COMMANDS = {"go": (str(BUILT / "client"),), "java": (*JAVA, "Client")}


@pytest.fixture(scope="module", params=["host", "all", "redirected"])
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    with a_stage(f"languages-{request.param}", request.param) as found:
        yield found


@pytest.mark.parametrize("language", ["go", "java"])
@pytest.mark.parametrize("moment", MOMENTS)
def test_client(stage: Stage, moment: str, language: str) -> None:
    stage.go_to(moment)
    seen = Counter[str]()
    for vip in VIPS:
        if stage.scope == "all" and vip == ON_LO:
            continue  # an address of the node, not of its neighbour
        for _ in range(ROUNDS):
            answers = stage.space.run(*COMMANDS[language], vip).stdout.split()
            assert len(answers) == ANSWERS[language]
            seen.update(answers)
    assert set(seen) == {"be1", "be2"}
    if stage.redirected and moment == MOMENTS[0]:
        assert stage.events()["REDIRECTED"] > 0


@pytest.mark.parametrize("language", ["go", "java"])
def test_that_a_client_can_fail(stage: Stage, language: str) -> None:
    """It fails where its namespace is not covered, and where it sees another peer."""
    stage.uncover()
    try:
        assert stage.space.run(*COMMANDS[language], NOWHERE, check=False).returncode == 1
    finally:
        stage.node.settings(sockets=stage.scope)
