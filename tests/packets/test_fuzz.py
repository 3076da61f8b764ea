# SPDX-License-Identifier: Apache-2.0
"""A little of `make fuzz-packets`: what was found before, and some thousand mutations."""

from __future__ import annotations

import random
from itertools import islice

import pytest

from tests.fuzz import packets
from tests.packets.balancer import BACKEND_MAC, mac


def test_the_corpus_and_mutations_of_it() -> None:
    reasons = packets.fuzz(seed=1, packets=20_000, keep=False)
    assert len(reasons) >= 13, reasons


def test_what_is_kept_reaches_what_it_is_named_after() -> None:
    assert len(list(packets.CORPUS.glob("*.bin"))) >= 12


def test_mutations_are_frames() -> None:
    corpus = packets.corpus_frames()
    for frame in islice(packets.mutations(random.Random(2), corpus), 2000):
        assert 14 <= len(frame) <= packets.LONGEST


def test_that_check_can_fail() -> None:
    target = packets.Target()
    try:
        plain = (f for f in packets.corpus_frames() if f[12:14] == b"\x08\x00")
        frame = next(f for f in plain if target.send([f])[1])
        stray = mac(BACKEND_MAC).tobytes() + frame[6:]
        address = stray[:30] + bytes((9, 9, 9, 9)) + stray[34:]
        assert target._astray(frame, bytes(6) + frame[6:])
        assert target._astray(frame, address)
        target.before[0] -= 1
        with pytest.raises(packets.Broken, match="1 reasons PASS_ were counted for 0 packets"):
            target.send([frame])
    finally:
        target.close()
