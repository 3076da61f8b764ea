# SPDX-License-Identifier: Apache-2.0
"""The guard over skips: it allows what the list names, and nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import unexpected_skips

ROOT = Path(__file__).resolve().parents[2]
LACKING = {"6.1": ["tcx"], "6.12": []}


@pytest.mark.parametrize(
    ("reason", "release", "allowed"),
    [
        ("needs tcx", "6.1.0-37-amd64", True),
        ("needs tcx: links came with 6.6", "6.1.0-37-amd64", True),
        ("needs tcx", "6.12.9-amd64", False),
        ("needs netkit", "6.1.0-37-amd64", False),
        ("needs tcx", "6.18.1", False),
        ("flaky on Tuesdays", "6.1.0-37-amd64", False),
        ("tcx", "6.1.0-37-amd64", False),
    ],
)
def test_only_listed_features_may_be_skipped(reason: str, release: str, allowed: bool) -> None:
    wrong = unexpected_skips({"test_it": reason}, release, LACKING)
    assert wrong == ([] if allowed else [f"test_it: {reason}"])


@pytest.mark.parametrize(
    ("body", "status"),
    [("pass", 0), ("pytest.skip('it rains')", 1), ("pytest.skip('needs weather')", 1)],
)
def test_a_run_with_an_unexpected_skip_fails(tmp_path: Path, body: str, status: int) -> None:
    test = tmp_path / "test_weather.py"
    test.write_text(f"import pytest\n\ndef test_weather():\n    {body}\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "tests.conftest", test],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/build/py", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == status, run.stdout + run.stderr
    assert ("skips that were not expected" in run.stdout) == bool(status)
