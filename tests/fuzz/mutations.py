# SPDX-License-Identifier: Apache-2.0
"""Frames without end: whole ones, and what becomes of them."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from tests.fuzz.target import LONGEST, Step

TELLING = (0, 1, 4, 5, 6, 17, 41, 43, 44, 58, 60, 64, 127, 132, 255)  # protocols, headers, hops
WORDS = (b"\0\0", b"\xff\xff", b"\x20\0", b"\0\1", b"\0\x14")
FIELDS = (12, 14, 16, 20, 23, 26, 30, 34, 36, 47, 54, 56)  # that look-ups go by
ELSEWHERE = 0.05  # how often a frame meets another hook than it was made for


def mutations(rnd: random.Random, corpus: Sequence[Step], hooks: int = 1) -> Iterator[Step]:
    """From the corpus as it is then, so it may grow meanwhile."""
    while True:
        hook, whole = rnd.choice(corpus)
        frame = bytearray(whole)
        for _ in range(rnd.choice((0, 1, 1, 1, 2, 4))):
            mutate(rnd, frame, corpus)
        if hooks > 1 and rnd.random() < ELSEWHERE:
            hook = rnd.randrange(hooks)
        yield hook, bytes(frame[:LONGEST]).ljust(14, b"\0")


def mutate(rnd: random.Random, frame: bytearray, corpus: Sequence[Step]) -> None:
    """Change one thing."""
    kind, size = rnd.randrange(9), len(frame)
    at = rnd.randrange(size) if size else 0
    if kind == 0:
        frame[at : at + 1] = bytes((frame[at] ^ 1 << rnd.randrange(8),)) if size else b""
    elif kind == 1:
        frame[at : at + 1] = bytes((rnd.choice(TELLING),))
    elif kind == 2:
        del frame[max(14, at) :]
    elif kind == 3:
        frame += rnd.randbytes(rnd.randrange(1, 64))
    elif kind == 4:
        frame[at : at + 2] = rnd.choice(WORDS)
    elif kind == 5:  # the head of one, the tail of another
        frame[at:] = rnd.choice(corpus)[1][at:]
    elif kind == 6:  # bytes taken out in the middle
        del frame[at : at + rnd.randrange(1, 9)]
    elif kind == 7:  # or put in
        frame[at:at] = rnd.randbytes(rnd.randrange(1, 9))
    else:
        where = rnd.choice(FIELDS)
        frame[where : where + 2] = rnd.randbytes(2)
