# SPDX-License-Identifier: Apache-2.0
"""Packets that are kept: for each reason the fewest that come to it, in corpus/TARGET/REASON.txt.

A line is a packet, `HOOK HEX`. They are sent one after the other to a small target that remembers
nothing so far; the last one comes to the reason. `make fuzz-packets ARGS=--keep` writes files that
are missing, so to make one anew is to delete it first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from tests.fuzz.target import Step, Target

CORPUS = Path(__file__).parent / "corpus"
LICENCE = "# SPDX-License-Identifier: Apache-2.0\n"


def files(name: str) -> Iterator[Path]:
    """Of a target."""
    yield from sorted((CORPUS / name).glob("*.txt"))


def load(path: Path, hooks: tuple[str, ...]) -> list[Step]:
    """The packets of one file."""
    lines = [line.split() for line in path.read_text().splitlines() if line[:1] != "#"]
    return [(hooks.index(hook), bytes.fromhex(frame)) for hook, frame in lines]


def load_all(name: str, hooks: tuple[str, ...]) -> list[Step]:
    """Those of every file."""
    return list(chain.from_iterable(load(path, hooks) for path in files(name)))


def reason_of(target: Target, steps: list[Step]) -> set[str]:
    """What the last of some packets comes to.

    Raises: Broken.
    """
    target.reset()
    target.send(steps[:-1])
    reasons, _ = target.send(steps[-1:])
    return {target.reasons(r).name.lower() for r in reasons}


def keep(name: str, target: Target, history: list[Step], reason: str) -> bool:
    """Write down the fewest of these that come to the reason. False: they do not when repeated."""

    def comes(steps: list[Step]) -> bool:
        return reason_of(target, steps) == {reason}

    if not comes(history):
        return False
    steps = history[-1:] if comes(history[-1:]) else fewest(history, comes)
    path = CORPUS / name / f"{reason}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (f"{target.hooks[hook]} {frame.hex()}\n" for hook, frame in steps)
    path.write_text("".join((LICENCE, *lines)))
    return True


def fewest(steps: list[Step], comes: Callable[[list[Step]], bool]) -> list[Step]:
    """With packets left out that make no difference, first many at once; the last one stays."""
    size = max(1, len(steps) // 2)
    while True:
        at = 0
        while at < len(steps) - 1:
            rest = steps[:at] + steps[min(at + size, len(steps) - 1) :]
            if comes(rest):
                steps = rest
            else:
                at += size
        if size == 1:
            return steps
        size //= 2


def is_known(name: str, reason: str) -> bool:
    """Whether there is a file for it."""
    return (CORPUS / name / f"{reason}.txt").exists()
