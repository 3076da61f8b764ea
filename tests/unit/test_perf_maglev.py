# SPDX-License-Identifier: Apache-2.0
"""docs/performance.md has what perf/results/maglev_paper.json has."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOUND = json.loads((ROOT / "perf/results/maglev_paper.json").read_text())
TEXT = (ROOT / "docs/performance.md").read_text()


def test_the_table_is_the_files() -> None:
    for case in FOUND["paper"]:
        changed = {row["failures"]: row["mean"] for row in case["changed"]}
        parts = " | ".join(f"{changed[failures]:.2%}" for failures in (1, 10, 50)).replace(
            "%", " %"
        )
        off = f"{case['most_above_mean']:+.2%}, {case['most_below_mean']:+.2%}".replace("%", " %")
        assert f"| {case['slots']:,} | {case['rule']} | {off} | {parts} |" in TEXT


def test_what_is_said_beside_it_is_the_files() -> None:
    ours = [row for row in FOUND["removal"] if row["variant"].startswith("try")]
    assert f"at most {max(row['mean_beyond'] for row in ours):.1%}".replace("%", " %") in TEXT
    plain, weighted = (row["median_s"] for row in FOUND["time"])
    assert f"take {plain:.2f} s, weighted {weighted:.2f} s" in TEXT
