# SPDX-License-Identifier: Apache-2.0
"""docs/metrics.md lists every family as it is declared; the text format holds for large ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from shunt.agent import metric_families
from shunt.agent.metric_families import Family
from shunt.agent.metrics import BY_DETAIL

DOCUMENT = Path(__file__).parents[2] / "docs" / "metrics.md"
NODE: Any = None  # these families do not look at it
# Of prometheus-client itself, and the one histogram.
LIBRARY = {
    "shunt_apply_duration_seconds": ("histogram", ()),
    "process_virtual_memory_bytes": ("gauge", ()),
    "process_resident_memory_bytes": ("gauge", ()),
    "process_start_time_seconds": ("gauge", ()),
    "process_cpu_seconds_total": ("counter", ()),
    "process_open_fds": ("gauge", ()),
    "process_max_fds": ("gauge", ()),
}
Told = dict[str, tuple[str, tuple[str, ...]]]


def documented() -> Told:
    """Kind and labels of each metric in the document's tables."""
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| ([^|]*) \|", DOCUMENT.read_text(), re.MULTILINE)
    assert len(rows) == len({name for name, _, _ in rows})
    return {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def test_the_document_lists_what_there_is() -> None:
    declared: Told = {f.name: (f.kind, f.labels) for f in BY_DETAIL["backends"]}
    assert documented() == declared | LIBRARY


def test_detail_only_adds() -> None:
    assert BY_DETAIL["backends"][: len(BY_DETAIL["services"])] == BY_DETAIL["services"]
    assert BY_DETAIL["services"][: len(BY_DETAIL["node"])] == BY_DETAIL["node"]
    labels = {label for family in BY_DETAIL["node"] for label in family.labels}
    assert not labels & {"service", "backend"}


@pytest.mark.parametrize("samples", [0, 1, metric_families.BATCH, 2 * metric_families.BATCH + 1])
def test_a_family_in_batches_reads_as_one(samples: int) -> None:
    family = Family(
        "shunt_test_total",
        "counter",
        ("name",),
        "A test.",
        lambda _: [((f'"{i}"\\',), i) for i in range(samples)],
    )
    chunks = list(family.chunks(NODE))
    assert len(chunks) == max(1, -(-samples // metric_families.BATCH))
    text = b"".join(chunks).decode()
    assert text.count("# TYPE") == text.count("# HELP") == 1
    (found,) = text_string_to_metric_families(text)
    assert [(s.labels["name"], s.value) for s in found.samples] == [
        (f'"{i}"\\', i) for i in range(samples)
    ]


def test_a_counter_is_called_one() -> None:
    with pytest.raises(AssertionError):
        Family("shunt_test", "counter", (), "A test.", lambda _: [])
