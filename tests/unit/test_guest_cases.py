# SPDX-License-Identifier: Apache-2.0
"""Which of a test's sets of parameters a guest runs."""

import pytest

from tests.conftest import case_of

NAMES = [f"tests/packets/test_{n}.py::test_it" for n in range(200)]


@pytest.mark.parametrize("total", [1, 2, 3, 8, 24])
def test_each_set_comes_up_somewhere_and_two_guests_have_different_ones(total: int) -> None:
    found = [[case_of(name, total, guest) for name in NAMES] for guest in (0, 1)]
    assert found == [[case_of(name, total, guest) for name in NAMES] for guest in (0, 1)]
    for cases in found:
        assert set(cases) == set(range(total))
    assert total == 1 or all(a != b for a, b in zip(*found, strict=True))
