# SPDX-License-Identifier: Apache-2.0
"""The table of remembered flows: against a dictionary, over-full, cut off, and raced for."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, Self

import numpy as np
import pytest

from perf import tables
from perf.driver import SYN, Driver, Stream
from shunt.kern import _flows
from shunt.kern.flows import FlowTable, State, backends, capacity, lines_for, pack, states
from shunt.kern.objects import Object
from shunt.lb.errors import ShuntError
from shunt.lb.model import Mode
from shunt.lb.slots import State as SlotState
from tests.packets.balancer import OBJECT

DISTANCE_BITS, NEAR_BITS = 7, 12  # bpf/abi.h
BY_AGENT, CLAIMED, CLEARING = 1, 1, 2

with Object(OBJECT) as _object:
    LINE = _object.spec("flows").value
    _states: Any = _object.btf.enum("flow_state", "FLOW_")
    _writers: Any = _object.btf.enum("flow_writer", "FLOW_BY_")


def made(numbers: list[int], rnd: random.Random | None = None) -> Any:
    """Flows numbered so; with `rnd`, at home anywhere."""
    flows = np.zeros(len(numbers), LINE)
    flows["key"]["sport"], flows["key"]["dport"] = [n >> 16 for n in numbers], 80
    flows["key"]["saddr"][:, 14:] = np.array(numbers, ">u4").view(np.uint8).reshape(-1, 4)[:, 2:]
    flows["hash"] = [rnd.randrange(1 << 32) if rnd else n * 0x9E3779B1 % (1 << 32) for n in numbers]
    flows["word"] = [pack(1 + n % 1000, State.CONFIRMED, 10**9 * n) for n in numbers]
    return flows


def near(lines: Any) -> list[tuple[int, int]]:
    """(home, distance) of all that the homes say of their flows."""
    found = []
    for home in np.flatnonzero(lines["near"]).tolist():
        word = int(lines["near"][home])
        while word:
            found.append((home, (word & (1 << DISTANCE_BITS) - 1) - 1))
            word >>= NEAR_BITS
    return found


def wrong(lines: Any) -> list[str]:
    """How the table contradicts itself when nobody writes."""
    live = np.flatnonzero(lines["word"])
    problems = [f"line {i} is claimed" for i in live if states(lines["word"][i]) < State.OPENING]
    homes = [
        (int(h) & len(lines) - 1, int(i)) for h, i in zip(lines["hash"][live], live, strict=True)
    ]
    want = Counter((home, (i - home) % len(lines)) for home, i in homes)
    have = Counter(near(lines))
    if want != have:
        problems.append(f"lines without a way to them: {want - have}, ways to none: {have - want}")
    keys = Counter(key.tobytes() for key in lines["key"][live])
    return problems + [f"{n} lines have the same key" for n in keys.values() if n > 1]


def test_the_numbers_here_are_the_programs() -> None:
    assert (CLAIMED, CLEARING, BY_AGENT) == (_states.CLAIMED, _states.CLEARING, _writers.AGENT)
    assert [s.value for s in State] == [_states[s.name] for s in State]
    assert (1 << DISTANCE_BITS) - 1 == _flows.REACH
    assert LINE.itemsize == 64, "a flow to a cache line"


@pytest.mark.parametrize(("lines", "seed"), [(1, 0), (2, 1), (64, 2), (1024, 3), (1024, 4)])
def test_against_a_dictionary(lines: int, seed: int) -> None:
    rnd = random.Random(seed)
    array = np.zeros(lines, LINE)
    table = FlowTable(array)
    oracle: dict[int, int] = {}
    for step in range(3000):
        number = rnd.randrange(2 * lines)
        flow = made([number])
        if rnd.random() < 0.6:
            try:
                added = table.insert(flow)
            except ShuntError:
                assert len(oracle) >= min(lines, 0.7 * lines), "refused though there is room"
            else:
                assert added == (number not in oracle)
                oracle.setdefault(number, int(flow["word"][0]))
        elif oracle:
            gone = rnd.choice(list(oracle))
            ((index, found),) = table.batches(lines)
            mine = found["word"] == oracle[gone]
            stale = table.delete(index[mine], found["word"][mine] + np.uint64(1 << 40))
            assert not stale.any(), "it has been seen again"
            assert table.delete(index[mine], found["word"][mine]).all()
            del oracle[gone]
        if step % 100 == 0:
            assert sorted(table.flows()["word"].tolist()) == sorted(oracle.values())
            assert wrong(array) == []


def test_it_takes_as_many_as_it_is_meant_for() -> None:
    rnd = random.Random(5)
    for lines in (1 << 10, 1 << 14, 1 << 17):
        array = np.zeros(lines, LINE)
        flows = made(list(range(capacity(lines))), rnd)
        refused = len(flows) - _flows.insert(array, flows)[0]
        assert refused <= max(3, len(flows) // 1000)
        assert wrong(array) == []


@pytest.mark.parametrize("flows", [1, 16, 17, 4096, 10**6])
def test_lines_for_so_many_flows(flows: int) -> None:
    lines = lines_for(flows)
    assert lines & (lines - 1) == 0
    assert flows <= max(1, capacity(lines))
    assert lines < 3 * flows + 2


def test_full_says_how_many_found_no_room() -> None:
    table = FlowTable(np.zeros(16, LINE))
    with pytest.raises(ShuntError) as caught:
        table.insert(made(list(range(40))))
    assert "flows find no room; it is meant for 12" in caught.value.why
    assert "limits.flows" in caught.value.fix
    assert wrong(table._lines) == []


def test_one_home_holds_a_few_and_refuses_more() -> None:
    """Tuples made to collide cost whoever sends them, not the table."""
    flows = made(list(range(20)))
    flows["hash"] = 7
    array = np.zeros(1024, LINE)
    assert _flows.insert(array, flows) == (5, 15)
    assert wrong(array) == []


@pytest.mark.parametrize("state", [CLAIMED, CLEARING])
@pytest.mark.parametrize("way", [True, False], ids=["way in place", "no way"])
def test_what_a_killed_agent_left_is_mended(state: int, way: bool) -> None:
    array = np.zeros(64, LINE)
    table = FlowTable(array)
    table.insert(made([1, 2, 3]))
    (at,) = np.flatnonzero(array["word"] == made([2])["word"])
    array["word"][at] = pack(BY_AGENT, state, 0)
    if not way:
        home = int(array["hash"][at]) % 64
        array["near"][home] = 0 if array["near"][home] < 1 << NEAR_BITS else array["near"][home]
    assert wrong(array)
    assert table.mend() == 1
    assert wrong(array) == []
    assert sorted(backends(table.flows()["word"])) == [2, 4]
    assert table.mend() == 0


def test_a_program_at_work_is_left_alone() -> None:
    array = np.zeros(64, LINE)
    array["word"][5] = pack(0, CLAIMED, 0)
    assert FlowTable(array).mend() == 0
    assert len(FlowTable(array).flows()) == 0


class Race:
    """Two processors that send one stream through the real program, both at once.

    They take the next flow from one counter without a lock, so it is often the same for both.
    """

    def __init__(self) -> None:
        self.cpus = sorted(os.sched_getaffinity(os.getppid()))[:2]
        assert len(self.cpus) == 2, "this test needs two processors"
        self.driver = Driver()
        self.balancer = tables.Balancer(tables.Layout(Mode.DSR_IPIP, SlotState.MOVING))
        self.lines = self.balancer.maps["flows"].mapped()
        self.table = FlowTable(self.lines)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.balancer.close()
        self.driver.close()

    def run(self, stream: Stream, packets: int, meanwhile: Callable[[], None]) -> None:
        self.driver.aim(self.balancer.fd, stream)
        start = Barrier(2)

        def send(cpu: int) -> None:
            os.sched_setaffinity(0, {cpu})
            start.wait()
            self.driver.send(packets)

        with ThreadPoolExecutor(2) as pool:
            running = [pool.submit(send, cpu) for cpu in self.cpus]
            while not all(r.done() for r in running):
                meanwhile()
            for r in running:
                r.result()


def test_two_processors_insert_the_same_flows() -> None:
    with Race() as race:
        for n in range(1, 11):
            race.run(Stream(1 << 16, in_order=True, flags=SYN), 20_000, lambda: None)
            assert wrong(race.lines) == []
            assert race.balancer.counted("SENT_TO_BACKEND") == n * 40_000
            race.balancer.forget()
        assert race.balancer.happened("FLOW_TABLE_FULL") == 0
        assert not race.lines["word"].any()
        assert not race.lines["near"].any()


def test_the_agent_deletes_while_processors_insert() -> None:
    deleted = 0

    def delete() -> None:
        nonlocal deleted
        for index, found in race.table.batches():
            deleted += int(race.table.delete(index, found["word"]).sum())

    with Race() as race:
        race.run(Stream(1 << 10, flags=SYN), 1_000_000, delete)
        assert wrong(race.lines) == []
        remembered = race.balancer.happened("FLOW_REMEMBERED")
        assert remembered == deleted + len(race.table.flows())
        assert deleted > 1000
        assert race.balancer.happened("FLOW_TABLE_FULL") == 0
        assert race.balancer.counted("SENT_TO_BACKEND") == 2_000_000


def test_that_check_can_fail() -> None:
    array = np.zeros(64, LINE)
    FlowTable(array).insert(made([1, 2, 3]))
    assert wrong(array) == []
    for spoil in ("word", "near", "key"):
        spoilt = array.copy()
        at = np.flatnonzero(spoilt["word"] if spoil == "key" else spoilt[spoil])
        if spoil == "key":
            spoilt["key"][at] = spoilt["key"][at[0]]
        else:
            spoilt[spoil][at[0]] = 0
        assert wrong(spoilt), spoil
