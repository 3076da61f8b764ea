# SPDX-License-Identifier: Apache-2.0
"""`make test-kernels` turns red for whatever should turn it red."""

import pytest

from tests.kernels.run import judge

PASSED = '<testcase name="a"/>'
FAILED = '<testcase name="b"><failure message="x"/></testcase>'
BROKEN = '<testcase name="c"><error message="x"/></testcase>'
SKIPPED = '<testcase name="d"><skipped message="needs tcx: links came with 6.6"/></testcase>'


def report(*cases: str) -> bytes:
    return f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>".encode()


def test_green() -> None:
    verdict = judge(report(PASSED, PASSED, SKIPPED), 0, ["tcx"])
    assert verdict.counts == {"passed": 2, "skipped": 1}
    assert verdict.complaints == []


@pytest.mark.parametrize(
    ("junit", "status", "lacking"),
    [
        (report(PASSED, FAILED), 1, []),
        (report(PASSED, BROKEN), 1, []),
        (report(), 5, []),
        (report(), 0, []),
        (report(SKIPPED), 0, ["tcx"]),
        (report(PASSED), 0, ["tcx"]),
        (report(PASSED), 3, []),
    ],
)
def test_red(junit: bytes, status: int, lacking: list[str]) -> None:
    assert judge(junit, status, lacking).complaints


def test_failures_and_errors_are_counted() -> None:
    assert judge(report(PASSED, FAILED, BROKEN), 1, []).counts == {"passed": 1, "failed": 2}
