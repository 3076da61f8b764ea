# SPDX-License-Identifier: Apache-2.0
"""What sockperf's log says of requests that were due at a constant rate; pure.

sockperf sends by the clock, to some tenths of a microsecond, and does not wait for answers. Two
things are made good here. It measures from when it really sent; a latency shall begin when the
request was due, so that its being held up counts. And it leaves answers out of its log: those that
it does not wait for at its end ("dropped", which TCP does not do), and, of several connections,
those that another's have overtaken. They are slow ones, and count as the slowest there is.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from shunt.lb.errors import ShuntError

ON_TIME = 0.02  # of an interval
BINS = 100


def due_s(sent_s: Sequence[float], interval_s: float) -> list[float]:
    """When each of these was due, which were sent in this order, one an interval, or caught up.

    Most have to be on time. From the last to the first: a request was due at the last tick before
    it was sent, or, of those that were caught up together, one tick before the one after it.
    """
    phases = [(sent - sent_s[0]) % interval_s for sent in sent_s]
    bins = Counter(int(phase / interval_s * BINS) % BINS for phase in phases)
    fullest = bins.most_common(1)[0][0]
    # The least late of those that are on time.
    phase = min(p for p in phases if int(p / interval_s * BINS) % BINS == fullest)
    first = sent_s[0] + phase - interval_s
    due, tick = [0.0] * len(sent_s), 1 << 62
    for i in reversed(range(len(sent_s))):
        tick = min(tick - 1, math.floor((sent_s[i] - first) / interval_s + ON_TIME))
        due[i] = first + tick * interval_s
    return due


def latencies_us(log: str, said: str, rate: float) -> list[float]:
    """Of every request, in ascending order, from sockperf's `--full-log` and what it printed.

    Raises: ShuntError if it measured nothing, or an answer came twice.
    """
    counts = re.search(
        r"dropped messages = (\d+); # duplicated messages = (\d+); # out-of-order messages = (\d+)",
        said,
    )
    rows = [line.split(", ") for line in log.splitlines() if line[:1].isdigit()]
    if not counts or not rows:
        raise ShuntError("sockperf measured nothing", said[-500:], "see its server's log")
    unwaited, doubled, overtaken = map(int, counts.groups())
    if doubled:
        raise ShuntError("sockperf: answers came twice", f"{doubled} did", "see perf/")
    sent = [float(row[1]) for row in rows]
    due = due_s(sent, 1 / rate)
    took = [(float(row[2]) - was) * 1e6 for row, was in zip(rows, due, strict=True)]
    return sorted(took + [max(took)] * (overtaken + unwaited))


def quantile(ascending: Sequence[float], part: float) -> float:
    """As perf/socket_client.h has it."""
    return ascending[min(int(part * len(ascending)), len(ascending) - 1)]
