# SPDX-License-Identifier: Apache-2.0
"""The socket benchmark's comparisons, targets and readers: no kernel, no timing."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from perf import generators, harness, rivals, socket_rounds, socket_targets, sockets, sockperf
from perf.socket_ways import Way
from shunt.lb.errors import ShuntError

SOCKET_NAMES = socket_targets.SPEEDS + socket_targets.DELAYS


def socket_rows(**translated: float) -> list[dict[str, Any]]:
    """Of one round in which everything is alike, but for what is said."""
    plain = dict.fromkeys((*socket_rounds.MEASURED, *socket_rounds.BESIDES), 10.0)
    samples = {(kind, 1000): [plain] for kind in ("direct", "nftables")}
    return sockets.records({**samples, ("translated", 1000): [plain | translated]})


def test_sockets_are_compared_with_direct_within_each_round() -> None:
    every = (*socket_rounds.MEASURED, *socket_rounds.BESIDES)
    quiet, loud = (dict.fromkeys(every, value) for value in (10.0, 100.0))
    samples = {
        ("direct", 1000): [quiet, loud, quiet],
        ("translated", 1000): [quiet, dict.fromkeys(loud, 110.0), dict.fromkeys(quiet, 11.0)],
    }
    direct, translated = sockets.records(samples)
    # The medians alone would say 1.1 of two rounds in which one of both was disturbed.
    assert translated["of_direct"] == dict.fromkeys(socket_rounds.MEASURED, 1.1)
    assert set(direct["of_direct"].values()) == set(translated["of_translated"].values()) == {1.0}
    assert (translated["connect_us"], translated["connect_us_max"]) == (11.0, 110.0)
    assert translated["connect_more_us"] == 1.0
    assert direct["connect_more_us"] == 0


def test_targets_of_translation_can_be_met_and_missed() -> None:
    assert sockets.report(socket_rows()).count("| met") == 3
    assert sockets.report(socket_rows(requests_1_cpu_us=10.2)).count("| met") == 3
    assert sockets.report(socket_rows(requests_1_cpu_us=10.3)).count("missed") == 1
    assert sockets.report(socket_rows(requests_32_cpu_us=10.3)).count("missed") == 1
    assert sockets.report(socket_rows(connect_us=20.0)).count("| met") == 3
    assert sockets.report(socket_rows(connect_us=20.1)).count("missed") == 1
    assert "limit" not in sockets.report(socket_rows()[:2])


def test_targets_of_redirection_can_be_met_and_missed() -> None:
    good = {"requests_32_per_s": 14.0, "requests_32_cpu_us": 7.0}

    def missed(**more: float) -> int:
        (row,) = (r for r in socket_rows(**good, **more) if r["way"] == "translated")
        return sockets.report([{**row, "way": "redirected"}]).count("missed")

    assert missed() == 0
    good["requests_32_per_s"] = 13.9
    assert missed() == 1
    good |= {"requests_32_per_s": 14.0, "requests_32_cpu_us": 7.1}
    assert missed() == 1
    good["requests_32_cpu_us"] = 7.0
    # Slower than direct in any one case: where more is better, and where less is.
    for name in set(SOCKET_NAMES) - {"requests_32_per_s"}:
        assert missed(**{name: 9.5 if name in socket_targets.SPEEDS else 10.5}) == 1, name
        assert missed(**{name: 10.5 if name in socket_targets.SPEEDS else 9.5}) == 0, name


@pytest.mark.parametrize(
    ("case", "speed"),
    [("connections", "connections_per_s"), ("bulk_64k", "bulk_64k_gbit_per_s")],
)
def test_what_the_guard_leaves_to_tcp_is_compared_with_translation(case: str, speed: str) -> None:
    def missed(share: float, of_direct: float, of_translated: float) -> int:
        (row,) = (r for r in socket_rows() if r["way"] == "translated")
        row |= {"way": "redirected", f"{case}_redirected": share}
        row["of_direct"] |= {"requests_32_per_s": 2, "requests_32_cpu_us": 0.5}
        for than, ratio in (("of_direct", of_direct), ("of_translated", of_translated)):
            row[than] |= {speed: ratio}
        return sockets.report([row]).count("missed")

    assert missed(0.01, 0.9, 0.98) == 0
    assert missed(0.01, 1.1, 0.9) == 1
    assert missed(0.9, 0.9, 0.98) == 1
    assert missed(0.9, 1.1, 0.9) == 0


def test_of_several_sizes_the_worst_counts() -> None:
    rows = socket_rows()
    (row,) = (r for r in rows if r["way"] == "translated")
    worse = {**row, "services": 10_000, "of_direct": {**row["of_direct"], "requests_1_cpu_us": 2}}
    assert sockets.report([*rows, worse]).count("missed") == 1


def test_the_socket_benchmark_has_the_ways_asked_for_and_the_document_shows_them() -> None:
    rows = json.loads((harness.RESULTS / "sockets.json").read_text())
    kinds = ["direct", "translated", "nftables", "iptables"]
    for size in sockets.SIZES:
        found = [r["way"] for r in rows if r["services"] == size and r["way"] != "redirected"]
        assert found == kinds
    assert all(r[name] > 0 for r in rows for name in socket_rounds.MEASURED)
    document = harness.DOCUMENT.read_text()
    assert harness.put_in(document, sockets.report(rows), "sockets") == document
    rows[0]["connect_us"] += 1
    assert harness.put_in(document, sockets.report(rows), "sockets") != document


@pytest.mark.parametrize(
    ("kind", "messages", "well"),
    [
        ("redirected", 200, True),
        ("redirected", 99, False),
        ("translated", 0, True),
        ("translated", 200, False),
    ],
)
def test_a_way_that_is_not_what_it_says_ends_the_measurement(
    kind: str, messages: int, well: bool
) -> None:
    way = Way.__new__(Way)  # without its namespaces
    way.kind, way.services = kind, 1000
    with contextlib.nullcontext() if well else pytest.raises(ShuntError, match="another way"):
        socket_rounds.check_redirected(way, messages, 100)


WRK2_SAYS = """\
Running 12s test @ http://198.19.1.244:80/
  1 threads and 32 connections
  Thread calibration: mean lat.: 1.106ms, rate sampling interval: 10ms
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     1.11ms  479.57us   3.10ms   64.06%
    Req/Sec     2.11k   153.53     2.67k    81.31%
  Latency Distribution (HdrHistogram - Recorded Latency)
 50.000%  847.00us
 75.000%    1.46ms
 90.000%    1.75ms
 99.000%    2.19ms
 99.900%    1.02s
 99.990%    3.05s
100.000%    3.10s

  Detailed Percentile spectrum:
       Value   Percentile   TotalCount 1/(1-Percentile)
       0.038     0.000000            1         1.00
  24001 requests in 12.00s, 3.85MB read
Requests/sec:   2000.01
Transfer/sec:    328.50KB
"""


def test_what_wrk2_says_is_read_with_its_units() -> None:
    assert generators.wrk2_latency(WRK2_SAYS) == generators.Latency(847.0, 2190.0, 1.02e6)
    for said in (
        "  Non-2xx or 3xx responses: 1\n",
        "  Socket errors: connect 0, read 0, write 0, timeout 2\n",
    ):
        with pytest.raises(ShuntError, match="requests failed"):
            generators.wrk2_latency(WRK2_SAYS + said)
    # wrk has other percentiles, and does not correct them.
    with pytest.raises(ShuntError, match="not wrk"):
        generators.wrk2_latency(WRK2_SAYS.replace("99.900%", "99.000%"))


def test_a_wrk2_that_is_no_program_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WRK2", raising=False)
    assert generators.OWN in generators.chosen().name
    for path in (tmp_path, tmp_path / "absent", Path(__file__)):
        monkeypatch.setenv("WRK2", str(path))
        with pytest.raises(ShuntError, match="is no program"):
            generators.chosen()
    monkeypatch.setenv("WRK2", sys.executable)
    assert generators.chosen().name == generators.WRK2


def test_rules_in_parts_are_the_same_rules() -> None:
    services = [
        rivals.Published(n, f"198.19.0.{n}", 80, [f"10.0.{n}.{b}" for b in range(3)])
        for n in range(5)
    ]
    head, *parts = rivals.nftables_in_parts(services, 2)
    assert len(parts) == 3
    whole = rivals.nftables(services)
    assert whole.startswith(head)
    for word in (" dnat to ", "numgen random mod 3", ": goto service-", "chain endpoint-"):
        assert sum(part.count(word) for part in parts) == whole.count(word) > 0


def sockperf_log(sent_s: list[float], took_s: float) -> str:
    rows = [f"{i}, {s:.9f}, {s + took_s:.9f}, {took_s * 1e6:.3f}" for i, s in enumerate(sent_s)]
    return "\n".join(["-----", "packet, txTime(sec), rxTime(sec), rtt(usec)", *rows, "-----"])


def sockperf_said(dropped: int = 0, doubled: int = 0, overtaken: int = 0) -> str:
    return (
        f"sockperf: # dropped messages = {dropped}; # duplicated messages = {doubled};"
        f" # out-of-order messages = {overtaken}"
    )


def test_requests_that_sockperf_sends_late_were_due_before() -> None:
    rate, late = 10_000, 500
    on_time = [7.00003 + n / rate for n in range(5000)]
    found = sockperf.latencies_us(sockperf_log(on_time, 20e-6), sockperf_said(), rate)
    assert max(found) == pytest.approx(20, abs=0.5)
    # Held up for 50 ms in the midst, and what was due meanwhile is sent at once afterwards.
    held = list(on_time)
    for n in range(1000, 1000 + late):
        held[n] = on_time[1000 + late] + (n - 1000 - late) * 1e-8
    found = sockperf.latencies_us(sockperf_log(held, 20e-6), sockperf_said(), rate)
    assert sum(us > 1000 for us in found) == pytest.approx(late, abs=late / 40)
    assert sockperf.quantile(found, 0.999) == pytest.approx(50_000, rel=0.02)
    assert sockperf.quantile(found, 0.5) == pytest.approx(20, abs=0.5)


def test_answers_that_sockperf_leaves_out_are_the_slowest_and_make_no_other_late() -> None:
    rate = 10_000
    sent = [n / rate for n in range(1000) if n % 100]
    log = sockperf_log(sent, 20e-6)
    found = sockperf.latencies_us(log, sockperf_said(dropped=4, overtaken=6), rate)
    assert len(found) == 1000
    assert max(found) == pytest.approx(20, abs=0.5)
    slow = log.splitlines()
    row = slow[500].split(", ")
    slow[500] = f"{row[0]}, {row[1]}, {float(row[1]) + 0.03:.9f}, 30000.000"
    found = sockperf.latencies_us("\n".join(slow), sockperf_said(overtaken=10), rate)
    assert sum(us > 1000 for us in found) == 11
    assert sockperf.quantile(found, 0.99) > 1000 > sockperf.quantile(found, 0.98)


def test_what_sockperf_cannot_have_measured_ends_the_measurement() -> None:
    log = sockperf_log([n / 1000 for n in range(50)], 20e-6)
    with pytest.raises(ShuntError, match="twice"):
        sockperf.latencies_us(log, sockperf_said(doubled=1), 1000)
    for log_, said in (("", sockperf_said()), (log, "")):
        with pytest.raises(ShuntError, match="nothing"):
            sockperf.latencies_us(log_, said, 1000)
