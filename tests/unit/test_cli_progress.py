# SPDX-License-Identifier: Apache-2.0
"""Commands that compile, load or detach programs say what they are at, should it take long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shunt.cli import hook, host
from shunt.cli.main import run
from shunt.lb.errors import ShuntError
from shunt.xdp import decap, hooks


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said while the work is done; the work itself is refused."""
    said: list[str] = []
    at_work: list[str] = []

    @contextmanager
    def progress(doing: str) -> Iterator[Callable[[str], None]]:
        at_work.append(doing)
        try:
            yield at_work.append
        finally:
            at_work.clear()

    def refuse(*_args: object, **_options: object) -> None:
        said.extend(at_work)
        raise ShuntError("not here", "it is a test", "none")

    for module in (hook, host):
        monkeypatch.setattr(module, "progress", progress)
    monkeypatch.setattr(hooks, "load", refuse)
    for name in ("attach", "detach", "status"):
        monkeypatch.setattr(decap, name, refuse)
    return said


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["hook", "load", "x/Small.c", "--at", "pre-lb"], "compiling and loading Small.c"),
        (["hook", "load", "small.o", "--at", "post-lb"], "loading small.o"),
        (["decap", "--iface", "eth7"], "loading decap for eth7"),
        (["decap", "--iface", "eth7", "--detach"], "taking decap off eth7"),
        (["decap"], "reading what decap has counted"),
    ],
)
def test_what_takes_long_is_told(
    told: list[str],
    argv: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run([*argv, "--bpffs", str(tmp_path)]) == 1
    assert told == [words]
    assert "not here" in capsys.readouterr().err
