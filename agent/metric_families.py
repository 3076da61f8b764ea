# SPDX-License-Identifier: Apache-2.0
"""What a family of metrics is, and how a scrape writes it: batch by batch, nothing is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shunt.agent.node import Node

Sample = tuple[tuple[str, ...], float]  # label values, in the order of the labels
# What is rendered before others on the event loop get a turn: some milliseconds.
BATCH = 1000
_SUFFIX = "_total"


@dataclass(frozen=True, slots=True)
class Family:
    """One family. `read` gives its samples as the node is now; it may be left half-way."""

    name: str
    kind: Literal["counter", "gauge"]
    labels: tuple[str, ...]
    text: str
    read: Callable[[Node], Iterable[Sample]]

    def __post_init__(self) -> None:
        assert self.name.endswith(_SUFFIX) == (self.kind == "counter"), self.name

    def chunks(self, node: Node) -> Iterator[bytes]:
        """The family in the text format; the first part carries its head."""
        samples = iter(self.read(node))
        yield render(self._metric(islice(samples, BATCH)))
        while some := list(islice(samples, BATCH)):
            yield render(self._metric(some)).split(b"\n", 2)[2]

    def _metric(self, samples: Iterable[Sample]) -> Metric:
        made: CounterMetricFamily | GaugeMetricFamily
        if self.kind == "counter":
            made = CounterMetricFamily(self.name, self.text, labels=self.labels)
        else:
            made = GaugeMetricFamily(self.name, self.text, labels=self.labels)
        for values, value in samples:
            made.add_metric(values, value)
        return made


class _Collected(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def render(*metrics: Metric) -> bytes:
    """In the text format."""
    return generate_latest(_Collected(metrics))


def one(value: float) -> list[Sample]:
    """The sample of a family without labels."""
    return [((), value)]
