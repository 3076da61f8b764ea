# SPDX-License-Identifier: Apache-2.0
"""Users' hooks around the real balancer: what they see, and that they can only answer."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scapy.layers.l2 import ARP, Ether

from shunt.kern import features
from shunt.kern.libbpf import XDP_DROP, XDP_PASS, XDP_TX
from shunt.kern.program_array import ProgramArray
from shunt.kern.raw_map import RawMap
from shunt.lb.errors import ShuntError
from shunt.xdp.hook_source import Position, compile_with_bcc
from shunt.xdp.hooks import remove_tree
from tests.packets.balancer import UDP, Balancer, Reason, mapped
from tests.packets.frames import OWN_MAC, ROUTER_MAC, tcp, udp
from tests.packets.hooked import HOOKS as HERE
from tests.packets.hooked import hooked

EXAMPLES = HERE.parents[1] / "examples"
CLIENT, VIP, BACKEND = "192.0.2.1", "203.0.113.1", "10.0.0.1"
SLOT_ENTRY = 0

Load = Callable[..., Path]


@pytest.fixture
def lb() -> Iterator[Balancer]:
    with Balancer(hooks=True) as balancer:
        yield balancer


@pytest.fixture
def pins() -> Iterator[Path]:
    directory = Path(f"/sys/fs/bpf/shunt-hooks-{os.getpid()}")
    directory.mkdir()
    yield directory
    remove_tree(directory)


@pytest.fixture
def load(lb: Balancer, pins: Path) -> Iterator[Load]:
    """load(file, position): in force; the directory of its maps."""
    with ExitStack() as stack:

        def put(path: Path, position: Position = Position.PRE_LB) -> Path:
            place = pins / position
            place.mkdir()
            return stack.enter_context(hooked(lb, path, position, place))

        yield put


def answers(lb: Balancer, position: Position) -> dict[str, int]:
    """What map hook_stats has counted for a position."""
    result = lb.object.btf.enum("hook_result", "HOOK_")
    size, first = result["RESULTS"], list(Position).index(position) * result["RESULTS"]
    counts = lb.map("hook_stats").totals()["packets"][first : first + size]
    names = {0: "passed", 1: "dropped", 2: "invalid"}
    return {names.get(i, f"mark {i - 2}"): int(n) for i, n in enumerate(counts) if n}


def seen(place: Path, position: Position) -> Any:
    with RawMap(place / "seen") as m:
        _, layout = m.layouts()
        assert layout is not None
        values = [cells[0] for _, cells in m.items()]
    return np.frombuffer(values[list(Position).index(position)], layout)[0]


@pytest.mark.parametrize("position", Position)
def test_each_answer(lb: Balancer, load: Load, position: Position) -> None:
    for port in range(80, 85):
        lb.add_service(VIP, port, backends=[BACKEND])
    without = {port: lb.run(tcp(CLIENT, VIP, dport=port)) for port in range(80, 85)}
    load(HERE / "hook_answers.bpf.o", position)
    for port, before in without.items():
        out = lb.run(tcp(CLIENT, VIP, dport=port))
        if port == 81:
            assert out.said == (XDP_DROP, {Reason.DROP_HOOK: 1})
        else:
            assert (out.verdict, out.data, out.reasons) == (
                before.verdict,
                before.data,
                {Reason.SENT_TO_BACKEND: 1},
            )
    assert answers(lb, position) == {"passed": 1, "dropped": 1, "mark 7": 1, "invalid": 2}
    other = Position.POST_LB if position is Position.PRE_LB else Position.PRE_LB
    assert answers(lb, other) == {}


@pytest.mark.parametrize(("source", "vip"), [(CLIENT, VIP), ("2001:db8::1", "2001:db8::80")])
def test_what_a_hook_sees_before_balancing(lb: Balancer, load: Load, source: str, vip: str) -> None:
    place = load(HERE / "hook_answers.bpf.o")
    frame = bytes(udp(source, vip, sport=1234, dport=53, payload=b"x" * 200))
    assert lb.run(frame).said == (XDP_PASS, {Reason.PASS_NOT_OURS: 1})
    view = seen(place, Position.PRE_LB)
    assert (view["saddr"].tobytes(), view["daddr"].tobytes()) == (
        mapped(source).tobytes(),
        mapped(vip).tobytes(),
    )
    assert (view["sport"], view["dport"], view["proto"]) == (1234, 53, UDP)
    assert (view["post_lb"], view["ifindex"], view["svc"], view["backend"]) == (0, 1, 0, 0)
    assert (view["len"], view["captured"]) == (len(frame), 128)
    assert view["data"].tobytes() == frame[:128]


def test_a_short_frame_is_seen_whole(lb: Balancer, load: Load) -> None:
    place = load(HERE / "hook_answers.bpf.o")
    frame = bytes(Ether(src=ROUTER_MAC, dst=OWN_MAC) / ARP())
    assert lb.run(frame).said == (XDP_PASS, {Reason.PASS_NOT_IP: 1})
    view = seen(place, Position.PRE_LB)
    assert view["data"].tobytes()[: view["captured"]] == frame
    assert (view["proto"], view["len"], any(view["saddr"])) == (0, len(frame), False)


def test_what_a_hook_sees_after_balancing(lb: Balancer, load: Load) -> None:
    service = lb.add_service(VIP, backends=[BACKEND])
    place = load(HERE / "hook_answers.bpf.o", Position.POST_LB)
    out = lb.run(tcp(CLIENT, VIP))
    assert out.said == (XDP_TX, {Reason.SENT_TO_BACKEND: 1})
    view = seen(place, Position.POST_LB)
    assert (view["post_lb"], view["action"], view["reason"]) == (1, XDP_TX, Reason.SENT_TO_BACKEND)
    assert (view["svc"], view["backend"]) == (service.id, service.backends[0])
    assert view["data"].tobytes()[: view["captured"]] == out.data  # in its outer header
    assert view["saddr"].tobytes() == mapped(CLIENT).tobytes()  # the client's own


def test_what_is_dropped_before_balancing_changes_no_table(lb: Balancer, load: Load) -> None:
    lb.add_service(VIP, 81, backends=[BACKEND, "10.0.0.2"]).move()
    load(HERE / "hook_answers.bpf.o")
    assert lb.run(tcp(CLIENT, VIP, dport=81)).said == (XDP_DROP, {Reason.DROP_HOOK: 1})
    assert len(lb.flows()) == 0
    assert int(lb.counts("svc_stats")["packets"].sum()) == 0


def test_what_is_dropped_after_balancing_is_its_backends(lb: Balancer, load: Load) -> None:
    service = lb.add_service(VIP, 81, backends=[BACKEND])
    load(HERE / "hook_answers.bpf.o", Position.POST_LB)
    assert lb.run(tcp(CLIENT, VIP, dport=81)).said == (XDP_DROP, {Reason.DROP_HOOK: 1})
    assert int(lb.counts("backend_stats")["packets"][service.backends[0]]) == 1
    (sample,) = lb.samples()
    assert (sample["reason"], sample["backend"]) == (Reason.DROP_HOOK, service.backends[0])


def test_the_first_hooks_mark_is_shown_to_the_second(lb: Balancer, load: Load) -> None:
    load(HERE / "hook_answers.bpf.o")
    place = load(HERE / "hook_answers.bpf.o", Position.POST_LB)
    assert lb.run(tcp(CLIENT, VIP, dport=85)).said == (XDP_DROP, {Reason.DROP_HOOK: 1})
    assert seen(place, Position.POST_LB)["mark"] == 1
    assert answers(lb, Position.PRE_LB) == {"mark 1": 1}
    assert answers(lb, Position.POST_LB) == {"dropped": 1}


def test_a_dropped_packet_stays_dropped(lb: Balancer, load: Load) -> None:
    service = lb.add_service(VIP, backends=[BACKEND], nexthop=0)
    service.set_slots(service.backends)
    before = lb.run(tcp(CLIENT, VIP)).said
    assert before == (XDP_DROP, {Reason.DROP_NO_NEXTHOP: 1})
    load(HERE / "hook_answers.bpf.o")
    load(HERE / "hook_answers.bpf.o", Position.POST_LB)
    assert lb.run(tcp(CLIENT, VIP)).said == before


@pytest.mark.parametrize("position", Position)
def test_a_mark_stands_before_what_passes(lb: Balancer, load: Load, position: Position) -> None:
    frame = bytes(tcp(CLIENT, VIP, dport=82))
    load(HERE / "hook_answers.bpf.o", position)
    out = lb.run(frame)
    assert out.said == (XDP_PASS, {Reason.PASS_NOT_OURS: 1})
    assert out.data == (7).to_bytes(4, "little") + frame  # the test run shows metadata as data
    other = bytes(tcp(CLIENT, VIP, dport=80))
    assert lb.run(other).data == other


def test_without_hooks_packets_take_the_short_way(lb: Balancer, load: Load) -> None:
    lb.add_service(VIP, 81, backends=[BACKEND])
    before = lb.run(tcp(CLIENT, VIP, dport=81))
    with hooked(lb, HERE / "hook_drops.bpf.o"):
        assert lb.run(tcp(CLIENT, VIP, dport=81)).verdict == XDP_DROP
    assert lb.run(tcp(CLIENT, VIP, dport=81)) == before
    assert answers(lb, Position.PRE_LB) == {"dropped": 1}


@pytest.mark.parametrize(
    ("name", "what", "why"),
    [
        ("hook_redirects", "hook_redirects.bpf.o calls bpf_redirect", "may pass, drop or mark"),
        ("hook_strays", "the kernel refused hook_strays.bpf.o", "unbounded memory access"),
        ("hook_program", "hook_program.bpf.o is no hook", "'hook_view' and 'xdp_md'"),
        ("headroom", "headroom.bpf.o is no hook", ""),
    ],
)
def test_what_does_more_than_it_may_is_refused(
    lb: Balancer, load: Load, name: str, what: str, why: str
) -> None:
    with pytest.raises(ShuntError) as caught:
        load(HERE / f"{name}.bpf.o")
    assert what in caught.value.what
    assert why in caught.value.why
    assert caught.value.fix
    assert ProgramArray(lb.map("hooks").fd).get(SLOT_ENTRY) == 0


def need_compiler() -> None:
    if not (found := features.hook_compiler()).present:
        pytest.skip(f"needs hook_compiler: {found.why}")


def test_what_bcc_compiles_is_held_to_the_same(
    lb: Balancer, load: Load, pins: Path, tmp_path: Path
) -> None:
    need_compiler()
    for name, what in (("redirects", "calls bpf_redirect"), ("strays", "the kernel refused")):
        with pytest.raises(ShuntError, match=what):
            load(HERE / f"hook_{name}.bpf.c", Position.POST_LB)
        remove_tree(pins / "post-lb")
    wrong = tmp_path / "wrong.c"
    for text, why in (("int hook(void) { it }", r"wrong.c:\d+"), ("int other;", "hook")):
        wrong.write_text(f'#include "shunt_hook.h"\n{text}\n')
        with pytest.raises(ShuntError, match="bcc cannot compile") as caught:
            compile_with_bcc(wrong, tmp_path)
        assert re.search(why, caught.value.why)
    load(HERE / "hook_drops.bpf.c")
    assert lb.run(tcp(CLIENT, VIP)).said == (XDP_DROP, {Reason.DROP_HOOK: 1})


@pytest.mark.parametrize("suffix", [".o", ".c"])
def test_the_example_counts_by_country(lb: Balancer, load: Load, pins: Path, suffix: str) -> None:
    if suffix == ".c":
        need_compiler()
    place = load(EXAMPLES / f"country.bpf{suffix}")
    with RawMap(place / "prefixes") as prefixes, RawMap(place / "countries") as countries:
        for length, network, country in ((96 + 24, CLIENT, 5), (32, "2001:db8::", 7)):
            key = length.to_bytes(4, "little") + mapped(network).tobytes()
            prefixes.update(key, country.to_bytes(4, "little"))
        frames = [tcp(CLIENT, VIP), tcp(CLIENT, VIP, dport=1), tcp("2001:db8::5", "2001:db8::6")]
        for frame in (*frames, tcp("198.51.100.1", VIP)):
            assert lb.run(frame).said == (XDP_PASS, {Reason.PASS_NOT_OURS: 1})
        counted = {key: int.from_bytes(v[0][:8], "little") for key, v in countries.items()}
    assert {k[0]: n for k, n in counted.items() if n} == {5: 2, 7: 1}
    assert answers(lb, Position.PRE_LB) == {"passed": 4}


def test_without_bcc_the_error_says_what_to_install(pins: Path) -> None:
    with pytest.raises(ShuntError, match="bcc is not installed") as caught:
        compile_with_bcc(EXAMPLES / "country.bpf.c", pins, Path(sys.executable))
    assert "No module named 'bcc'" in caught.value.why
    assert "apt-get install python3-bpfcc" in caught.value.fix
    with pytest.raises(ShuntError, match="bcc is not installed"):
        compile_with_bcc(EXAMPLES / "country.bpf.c", pins, Path("/nowhere/python3"))
    assert not list(pins.iterdir())
