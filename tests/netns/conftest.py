# SPDX-License-Identifier: Apache-2.0
"""Hosts that several test modules share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.netns.shunt_host import ABSENT, Host, a_host


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """One daemon for the tests that leave it as it was."""
    with a_host("api") as host:
        host.start()
        host.until(lambda: host.backend("half", ABSENT)["state"] == "failing", "sees who is absent")
        yield host


@pytest.fixture
def own() -> Iterator[Host]:
    """A host for one test, its daemon not started."""
    with a_host("own") as host:
        host.bpffs = host.bpffs.with_name(f"{host.bpffs.name}-own")
        yield host
