# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' harness and the packet benchmark's lines: no kernel, no timing."""

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from perf import harness, packet, rivals, scale, tc
from perf.cases import TARGETS, outcomes, subjects
from perf.driver import frame_is_sound
from perf.harness import Spread
from perf.ways import KINDS


def test_a_spread_is_the_median_and_the_extremes() -> None:
    assert Spread.of([5, 1, 100, 2, 3]) == Spread(3, 1, 100, 5)
    with pytest.raises(ValueError, match="needs samples"):
        Spread.of([])


def test_every_round_runs_every_case_once_in_an_order_of_its_own() -> None:
    ran: list[str] = []
    names = list("abcdef")

    def run(name: str) -> float:
        ran.append(name)
        return len(ran)

    cases = {name: partial(run, name) for name in names}
    told: list[int] = []
    measured = harness.measure(cases, 20, progress=told.append)
    rounds = [ran[i : i + 6] for i in range(0, len(ran), 6)]
    assert [sorted(r) for r in rounds] == [names] * 20
    assert len({tuple(r) for r in rounds}) > 10
    assert told == list(range(1, 21))
    for name in names:
        when = [i + 1 for i, n in enumerate(ran) if n == name]
        assert (measured[name].low, measured[name].high) == (when[0], when[-1])
        assert measured[name].rounds == 20


def test_a_case_that_fails_ends_the_measurement() -> None:
    def broken() -> float:
        raise RuntimeError("no packets")

    with pytest.raises(RuntimeError, match="no packets"):
        harness.measure({"broken": broken}, 3)


def test_pinning_ends_with_its_block_also_on_failure() -> None:
    before = os.sched_getaffinity(0)
    with harness.pinned() as cpu:
        assert os.sched_getaffinity(0) == {cpu}
    with pytest.raises(ZeroDivisionError), harness.pinned(min(before)):
        assert 1 / 0
    assert os.sched_getaffinity(0) == before


def test_the_machine_says_what_numbers_depend_on() -> None:
    facts = harness.machine()
    assert {"kernel", "processors", "memory_mb", "load_1min"} <= set(facts)
    assert json.loads(json.dumps(facts)) == facts
    assert None not in facts.values()


def test_results_are_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    rows = [{"case": "a", "median_ns": 1.5}, {"case": "b", "median_ns": 2}]
    harness.write_json(path, rows)
    assert json.loads(path.read_text()) == rows
    assert len(path.read_text().splitlines()) == 2 + len(rows)
    with pytest.raises(TypeError):
        harness.write_json(path, [object()])
    assert json.loads(path.read_text()) == rows
    assert list(path.parent.iterdir()) == [path]


def test_a_table_lines_up_numbers_to_the_right() -> None:
    lines = harness.table(("case", "ns"), [("one", 5.0), ("another", 123.456)]).splitlines()
    assert lines == [
        "| case    |    ns |",
        "|---------|------:|",
        "| one     |   5.0 |",
        "| another | 123.5 |",
    ]
    assert harness.table(("case", "ns"), []).splitlines() == ["| case | ns |", "|------|----|"]


# What the wrapper makes of its first flow.
IPV4 = (
    "0200000000010200000000020800450000320000400040066ab30a00"
    "0000c6130000800000500000000100000000501004005b6600000000"
    "0000000000000000"
)
IPV6 = (
    "02000000000102000000000286dd60000000001e0640200100020000"
    "00010000000000000000200100020000000200000000000000008000"
    "0050000000010000000050100400eb70000000000000000000000000"
)


@pytest.mark.parametrize("frame", [bytes.fromhex(IPV4), bytes.fromhex(IPV6)], ids=[4, 6])
def test_a_broken_frame_is_seen(frame: bytes) -> None:
    assert frame_is_sound(frame)
    assert not frame_is_sound(frame + b"\0")
    for at in range(34, len(frame)):
        broken = bytearray(frame)
        broken[at] ^= 1
        assert not frame_is_sound(bytes(broken))


def test_the_benchmark_has_the_lines_that_were_asked_for() -> None:
    lines = {(s.mode, s.state, s.stream.flows, s.stream.services) for s in subjects()}
    for flows in (1, 1 << 16, 1 << 20):
        assert {("dsr-ipip", state, flows, 1) for state in ("settled", "moving")} <= lines
        assert ("nat", "existing", flows, 1) in lines
    for state in ("settled", "moving"):
        assert ("dsr-ipip", state, 1 << 20, 10_000) in lines
    assert {(s.mode, s.stream.ipv6) for s in subjects()} >= {
        (mode, ipv6) for mode in ("dsr-ipip", "nat") for ipv6 in (False, True)
    }
    cases = {s.case for s in subjects()}
    assert {s.wrapper for s in subjects()} <= cases
    assert {t.case for t in TARGETS} | {t.than for t in TARGETS if t.than} <= cases


def test_targets_can_be_met_and_missed() -> None:
    cheap = {s.case: 30.0 if s.program == "nothing" else 100.0 for s in subjects()}
    by_claim = {o.target.claim: o for o in outcomes(cheap)}
    assert len(by_claim) == len(TARGETS)
    one = by_claim["settled, one flow: 45 net"]
    assert (one.measured, one.limit, one.met) == (70, 45, False)
    fifth = by_claim["settled, 1Mi: 1/5 x the LRU, net"]
    assert (fifth.measured, fifth.limit, fifth.met) == (70, 14, False)
    assert by_claim["moving, 1Mi: the LRU"].met
    assert by_claim["nat, one existing flow: 150 gross"].met


def test_targets_of_cases_that_were_left_out_are_left_out() -> None:
    assert outcomes({"ipip-settled-1": 1.0}) == []
    some = dict.fromkeys(("ipip-settled-1", "nothing"), 1.0)
    assert [o.target.claim for o in outcomes(some)] == ["settled, one flow: 45 net"]


def test_the_document_shows_the_recorded_results() -> None:
    rows = json.loads((harness.RESULTS / "packet.json").read_text())
    assert [r["case"] for r in rows] == [s.case for s in subjects()]
    document = harness.DOCUMENT.read_text()
    assert harness.put_in(document, packet.report(rows), "packet") == document
    rows[0]["median_ns"] += 1
    assert harness.put_in(document, packet.report(rows), "packet") != document
    with pytest.raises(ValueError, match="begin"):
        harness.put_in("no marks", "", "packet")


def test_the_scale_benchmark_has_the_sizes_that_were_asked_for_and_the_document_shows_them() -> (
    None
):
    rows = json.loads((harness.RESULTS / "scale.json").read_text())
    assert [(r["services"], r["backends"]) for r in rows] == [
        (n, 10 * n) for n in (100, 1000, 10000)
    ]
    asked = {"first_apply_s", "change_ms", "rss_anon_mb", "map_mb"}
    assert all(asked <= r.keys() and min(r[name] for name in asked) > 0 for r in rows)
    document = harness.DOCUMENT.read_text()
    assert harness.put_in(document, scale.report(rows), "scale") == document
    rows[0]["change_ms"] += 1
    assert harness.put_in(document, scale.report(rows), "scale") != document


def test_scale_records_medians_and_the_targets_can_be_missed() -> None:
    names = [key for key, _ in scale.COLUMNS if key != "services"]
    samples = {10_000: [dict.fromkeys(names, float(n)) for n in (1, 2, 200)]}
    (row,) = scale.records([10_000], samples)
    assert (row["services"], row["backends"], row["change_ms"]) == (10_000, 100_000, 2)
    assert (row["change_max_ms"], row["stall_ms"]) == (200, 200)
    assert "missed" not in scale.report([row])
    assert scale.report([{**row, "map_mb": 151.0}]).count("missed") == 1
    assert "missed" not in scale.report([{**row, "services": 1000, "map_mb": 151.0}])


def test_ways_take_turns_in_each_case_in_an_order_of_its_own() -> None:
    ways, said = list("abcdefgh"), []

    def case(name: str, way: str) -> dict[str, float]:
        said.append((name, way))
        return {name: ord(way)}

    cases = [partial(case, name) for name in ("rate", "bulk")]
    found = harness.by_turns(ways, cases, random.Random(1))
    assert found == {way: {"rate": ord(way), "bulk": ord(way)} for way in ways}
    assert [name for name, _ in said] == ["rate"] * len(ways) + ["bulk"] * len(ways)
    rate, bulk = ([way for name, way in said if name == which] for which in ("rate", "bulk"))
    assert sorted(rate) == sorted(bulk) == ways
    assert len({*map(tuple, (rate, bulk, ways))}) == 3


def test_in_each_round_the_ways_of_a_size_are_together() -> None:
    @dataclass(frozen=True)
    class Some:
        kind: str
        services: int

    ways = [Some(kind, services) for services in (10, 1) for kind in "ab"]
    groups: list[list[Some]] = []

    def one_round(group: Sequence[Some], order: random.Random) -> dict[Some, dict[str, float]]:
        groups.append(list(group))
        return {way: {"rate": len(groups) * way.services} for way in group}

    found = harness.by_rounds(ways, 2, one_round)
    assert groups == [ways[2:], ways[:2]] * 2
    assert list(found) == [("a", 10), ("b", 10), ("a", 1), ("b", 1)]
    assert found["b", 10] == [{"rate": 20}, {"rate": 40}]


def test_a_ratio_is_of_what_was_measured_in_the_same_round() -> None:
    taken, than = ([{"rate": value} for value in rates] for rates in ((1, 20, 3), (2, 40, 60)))
    # The medians alone would say 3 of 40.
    assert harness.ratio_of("rate", taken, than) == 0.5
    with pytest.raises(ValueError):
        harness.ratio_of("rate", taken, than[:2])


def test_the_tc_benchmark_has_the_ways_that_were_asked_for_and_the_document_shows_them() -> None:
    rows = json.loads((harness.RESULTS / "tc.json").read_text())
    assert [(r["services"], r["way"]) for r in rows] == [(n, k) for n in tc.SIZES for k in KINDS]
    assert all(r[name] > 0 for r in rows for name in tc.MEASURED)
    document = harness.DOCUMENT.read_text()
    assert harness.put_in(document, tc.report(rows), "tc") == document
    rows[0]["cpu_us"] += 1
    assert harness.put_in(document, tc.report(rows), "tc") != document


def test_tc_targets_can_be_met_and_missed() -> None:
    def rows(rate: float, cpu: float) -> list[dict[str, object]]:
        of = dict.fromkeys(KINDS, (rate, cpu))
        of |= {"direct": (100.0, 10.0), "nftables": (50.0, 15.0)}
        samples = {
            (kind, 10_000): [dict(zip(tc.MEASURED, (*both, 1.0), strict=True))]
            for kind, both in of.items()
        }
        return tc.records(samples)

    ours = len(tc.OURS)
    assert tc.report(rows(65, 11.5)).count("| met") == 2 * ours
    assert tc.report(rows(64.9, 11.5)).count("missed") == ours
    assert tc.report(rows(65, 11.6)).count("missed") == ours
    assert "measured" not in tc.report(rows(65, 11)[:2])


def test_rivals_have_a_chain_for_each_service_and_backend() -> None:
    services = [
        rivals.Published(n, f"198.19.0.{n}", 80, [f"10.0.{n}.{b}" for b in range(3)])
        for n in range(5)
    ]
    nft, ipt = rivals.nftables(services), rivals.iptables(services)
    assert nft.count("goto service-") == 5
    assert nft.count(" dnat to ") == ipt.count("-j DNAT") == 15
    assert nft.count("numgen random mod 3") == ipt.count("--probability 0.3333333333") == 5
    assert ipt.count("-A KUBE-SERVICES") == 5 + 1
