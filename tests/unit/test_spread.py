# SPDX-License-Identifier: Apache-2.0
"""Which cases of a test run where all of them would take too long."""

import pytest

from tests.conftest import spread


@pytest.mark.parametrize(
    ("total", "wanted", "taken"),
    [
        (1, 2, {0}),
        (2, 2, {0, 1}),
        (5, 2, {0, 4}),
        (5, 3, {0, 2, 4}),
        (4, 1, {0}),
    ],
)
def test_the_first_and_the_last_are_among_them(total: int, wanted: int, taken: set[int]) -> None:
    assert spread(total, wanted) == taken
