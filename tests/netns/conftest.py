# SPDX-License-Identifier: Apache-2.0
"""Hosts that several test modules share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from shunt.lab.netns import Namespace
from shunt.xdp import decap
from tests.netns.decap_pair import DEVICE, backend_and_balancer
from tests.netns.own_vips import named
from tests.netns.shunt_host import ABSENT, Host, a_host
from tests.netns.stream_forms import Plain, plain


def pytest_make_parametrize_id(val: object) -> str | None:
    """VIPs of this run alone have the same names in every process."""
    return named(val) if isinstance(val, str) and named(val) != val else None


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


@pytest.fixture
def bpffs() -> Iterator[Path]:
    """A pin directory of decap's."""
    path = Path(f"/sys/fs/bpf/shunt-test-{os.getpid()}")
    yield path
    if path.exists():
        decap.cleanup(path)
        path.rmdir()


@pytest.fixture
def pair() -> Iterator[tuple[Namespace, Namespace]]:
    """(balancer, backend)"""
    with backend_and_balancer() as both:
        yield both


@pytest.fixture
def attach(pair: tuple[Namespace, Namespace], bpffs: Path) -> Callable[..., decap.Decap]:
    """Decap on the backend of the pair."""

    def attach(sources: Sequence[str] = (), mode: str = "auto") -> decap.Decap:
        with pair[1].inside():
            return decap.attach(DEVICE, sources, mode, bpffs)

    return attach


@pytest.fixture(scope="module")
def bare() -> Iterator[Plain]:
    """Streams that are redirected without a guard."""
    with plain() as form:
        yield form
