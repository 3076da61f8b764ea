# SPDX-License-Identifier: Apache-2.0
"""What a real shuntd makes of health: panic, slow start, its own outages; the hosts are in
shunt_host."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from shunt.kern.carrier import Carrier
from tests.netns.shunt_host import ABSENT, BACKENDS, EMPTY, Host, refused

CLOSED, OURS = 9, 8099  # ports: nobody listens; a test does
FAST: dict[str, Any] = {"interval": "300ms", "timeout": "250ms", "rise": 1, "fall": 2}
ROW_KEYS = {
    *("service", "backend", "type", "state", "removed", "panic", "weight_share", "since"),
    *("checks", "failures", "last_ok", "last_at", "latency_ms", "reason"),
}


@pytest.fixture
def alone(own: Host) -> Host:
    """A host whose services each test writes itself."""
    for path in own.services.iterdir():
        path.unlink()
    return own


def service(host: Host, backends: list[str], **health: Any) -> None:
    check: dict[str, Any] = FAST | health
    host.write("app", {"name": "app", "vip": EMPTY, "ports": [80], "backends": backends,
                       "health": check})  # fmt: skip


def rows(host: Host) -> dict[str, Any]:
    return {row["backend"]: row for row in host.json("health", "list")["health"]}


def state(host: Host, backend: str) -> str:
    return str(host.backend("app", backend)["state"])


def troubles(host: Host, name: str) -> int:
    return int(host.shunt("status", "-o", "json").json["checks"]["troubles"].get(name, 0))


@contextlib.contextmanager
def listening(host: Host, address: str) -> Iterator[None]:
    with host.outside.inside(), socket.create_server((address, OURS), backlog=4096):
        yield


def reach(host: Host) -> bool:
    """Whether the packets of a new connection are sent to a backend, or refused."""

    def packets() -> int:
        return sum(int(host.backend("app", backend)["packets"]) for backend in BACKENDS)

    def refused() -> int:
        found = host.shunt("status", "-o", "json").json["reasons"]
        return int(found.get("SENT_RST_NO_BACKEND", {"packets": 0})["packets"])

    before = packets(), refused()
    with host.connect(EMPTY):
        host.until(lambda: (packets(), refused()) != before, "takes the packet")
    return packets() > before[0]


def test_where_all_fail_all_are_treated_as_up(alone: Host) -> None:
    service(alone, list(BACKENDS), port=CLOSED)
    alone.start()
    alone.until(lambda: bool(alone.json("health", "list")["panic"]), "panics")
    assert alone.json("health", "list", "app")["panic"] == [
        {"service": "app", "up": 0, "backends": 2}
    ]
    for backend in BACKENDS:
        row = rows(alone)[backend]
        assert (row["state"], row["panic"], row["last_ok"]) == ("failing", True, False)
        assert row["reason"] == f"port {CLOSED}: connection refused"
        assert state(alone, backend) == "up"
        reason = alone.backend("app", backend)["reason"]
        assert reason == f"treated as up (panic): port {CLOSED}: connection refused"
    assert reach(alone)
    assert "service app panics: 0 of 2 backends are up" in alone.log.read_text()
    shown = alone.shunt("status")
    assert shown.code == 1
    problem = "problem: service app: every backend is failing; all are treated as up (panic)"
    assert problem in shown.out

    # A check that some pass ends it.
    with listening(alone, BACKENDS[0]):
        service(alone, list(BACKENDS), port=OURS)
        alone.json("config", "reload")
        alone.until(lambda: not alone.json("health", "list")["panic"], "panics no more")
        alone.until(lambda: state(alone, BACKENDS[1]) == "failing", "leaves who fails out")
        assert state(alone, BACKENDS[0]) == "up"
    assert "service app panics no more" in alone.log.read_text()


def test_a_panic_does_not_end_before_others_had_their_turn(alone: Host) -> None:
    """Who is found well first would get the connections of all that are well too."""
    service(alone, list(BACKENDS), port=OURS, interval="1s", timeout="500ms", rise=2)
    alone.start()
    alone.until(lambda: bool(alone.json("health", "list")["panic"]), "panics", 30)
    with listening(alone, BACKENDS[0]), listening(alone, BACKENDS[1]):
        alone.until(lambda: not alone.json("health", "list")["panic"], "panics no more", 30)
    log = alone.log.read_text()
    ups = [log.index(f"backend {backend} of service app is up") for backend in BACKENDS]
    assert max(ups) < log.index("service app panics no more")


def test_without_panic_all_that_fail_get_nothing(alone: Host) -> None:
    service(alone, list(BACKENDS), port=CLOSED, panic_threshold="0%")
    alone.start()
    alone.until(lambda: {state(alone, b) for b in BACKENDS} == {"failing"}, "sees all fail")
    assert alone.json("health", "list")["panic"] == []
    assert not reach(alone)
    assert "problem: service app: every backend is failing\n" in alone.shunt("status").out


def test_a_share_of_backends_is_enough_to_panic(alone: Host) -> None:
    service(alone, [BACKENDS[0], ABSENT], panic_threshold="51%")
    alone.start()
    alone.until(lambda: bool(alone.json("health", "list")["panic"]), "panics")
    assert alone.json("health", "list")["panic"] == [{"service": "app", "up": 1, "backends": 2}]
    assert state(alone, ABSENT) == "up"
    problem = "service app: only 1 of 2 backends are up; all are treated as up (panic)"
    assert alone.shunt("status", "-o", "json").json["problems"] == [problem]
    service(alone, [BACKENDS[0], ABSENT], panic_threshold="50%")
    alone.json("config", "reload")
    alone.until(lambda: state(alone, ABSENT) == "failing", "does not panic at half")


def test_a_lost_carrier_is_seen_at_once(alone: Host) -> None:
    with alone.here.inside():
        with contextlib.closing(Carrier()) as carrier:
            assert carrier.present("eth0")
        alone.outside.ip("link set dev eth0 down")
        with contextlib.closing(Carrier()) as carrier:
            assert not carrier.present("eth0")
            assert not carrier.present("eth9")


def test_a_link_without_carrier_fails_no_backend(alone: Host) -> None:
    service(alone, list(BACKENDS), panic_threshold="0%")
    alone.start()
    alone.until(lambda: all(row["last_ok"] for row in rows(alone).values()), "finds all well")
    alone.outside.ip("link set dev eth0 down")
    # Many times what it takes to fail both.
    alone.until(lambda: troubles(alone, "no-carrier") > 20, "sees the carrier gone", 30)
    assert {row["state"] for row in rows(alone).values()} == {"up"}
    assert {state(alone, b) for b in BACKENDS} == {"up"}
    # The backends' fault, with the link there: that counts.
    alone.outside.ip("link set dev eth0 up")
    alone.outside.ip("addr flush dev eth0")
    alone.until(lambda: {state(alone, b) for b in BACKENDS} == {"failing"}, "sees them fail", 30)


def test_no_route_fails_no_backend_and_the_way_back_is_in_use_at_once(alone: Host) -> None:
    service(alone, list(BACKENDS), panic_threshold="0%")
    alone.start()
    alone.until(lambda: all(row["last_ok"] for row in rows(alone).values()), "finds all well")
    alone.here.ip("addr del 10.9.0.1/24 dev eth0")
    alone.until(
        lambda: (
            alone.shunt("status", "-o", "json").json["checks"]["troubles"].get("no-route", 0) > 10
        ),
        "sees that there is no route",
        timeout_s=30,
    )
    assert {row["state"] for row in rows(alone).values()} == {"up"}
    assert {state(alone, b) for b in BACKENDS} == {"failing"}
    alone.here.ip("addr add 10.9.0.1/24 dev eth0")
    alone.until(lambda: {state(alone, b) for b in BACKENDS} == {"up"}, "uses them again")


def test_panic_treats_nobody_as_up_to_whom_there_is_no_way(alone: Host) -> None:
    nowhere = "10.99.0.1"
    service(alone, [BACKENDS[0], nowhere], port=CLOSED)
    alone.start()
    alone.until(lambda: bool(alone.json("health", "list")["panic"]), "panics")
    # It does not count among the backends either: it says nothing about the checks.
    assert alone.json("health", "list")["panic"] == [{"service": "app", "up": 0, "backends": 1}]
    assert (state(alone, BACKENDS[0]), state(alone, nowhere)) == ("up", "failing")
    assert alone.backend("app", BACKENDS[0])["share"] == 1
    assert alone.backend("app", nowhere)["share"] == 0
    assert "no route to 10.99.0.1" in alone.backend("app", nowhere)["reason"]
    # With a way to it, it is one of those that fail.
    alone.here.ip(f"route add {nowhere}/32 via {BACKENDS[1]}")
    alone.until(lambda: state(alone, nowhere) == "up", "treats it as up")


def test_who_comes_up_gets_its_share_in_steps(alone: Host) -> None:
    def share() -> float:
        return float(alone.backend("app", BACKENDS[1])["share"])

    with listening(alone, BACKENDS[0]):
        service(alone, list(BACKENDS), port=OURS, slow_start="30s")
        alone.start()
        alone.until(lambda: state(alone, BACKENDS[1]) == "failing", "sees who does not listen")
        assert share() == 0
        with listening(alone, BACKENDS[1]):
            alone.until(lambda: state(alone, BACKENDS[1]) == "up", "sees it up")
            first = share()
            assert 0 < first < 0.4
            assert rows(alone)[BACKENDS[1]]["weight_share"] < 1
            assert rows(alone)[BACKENDS[0]]["weight_share"] == 1
            assert " of its weight" in alone.shunt("health", "list").lines(BACKENDS[1])[0]
            alone.until(lambda: share() > first, "gives it more", timeout_s=30)
            # Who takes the slow start away has no use for the rest of it.
            service(alone, list(BACKENDS), port=OURS)
            alone.json("config", "reload")
            assert share() == 0.5


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_a_slow_start_goes_on_over_a_restart(alone: Host, end: str) -> None:
    """Of shuntd: from where it is by then, and no connection's slot moves for the restart."""

    def weight() -> float:
        return float(rows(alone)[BACKENDS[1]]["weight_share"])

    with listening(alone, BACKENDS[0]):
        service(alone, list(BACKENDS), port=OURS, slow_start="60s")
        alone.start()
        alone.until(lambda: state(alone, BACKENDS[1]) == "failing", "sees who does not listen")
        with listening(alone, BACKENDS[1]):
            alone.until(lambda: state(alone, BACKENDS[1]) == "up", "sees it up")
            began = time.monotonic()
            alone.until(lambda: weight() >= 0.2, "gives it more")
            alone.until((alone.state / "starts.json").exists, "keeps when it began")
            process = alone.process
            assert process is not None
            process.stop() if end == "stopped" else process.kill()
            alone.start()
            least = weight()
            # Not the whole, not from the beginning: what its time makes it.
            assert 0.2 <= least <= 0.1 * (2 + (time.monotonic() - began) / 6)
            assert rows(alone)[BACKENDS[0]]["weight_share"] == 1
            alone.until(lambda: weight() > least, "goes on")
            service(alone, list(BACKENDS), port=OURS)
            alone.json("config", "reload")
            assert weight() == 1
            alone.until(lambda: not (alone.state / "starts.json").exists(), "forgets it")


def test_slow_start_ends_by_itself(alone: Host) -> None:
    service(alone, [BACKENDS[0]], slow_start="1s")
    alone.start()
    # Added to a service in force: it starts slowly too.
    service(alone, list(BACKENDS), slow_start="1s")
    alone.json("config", "reload")
    alone.until(lambda: alone.backend("app", BACKENDS[1])["share"] == 0.5, "has all of its share")
    assert {row["weight_share"] for row in rows(alone).values()} == {1}


def test_health_list(host: Host) -> None:
    found = host.json("health", "list")
    assert found["panic"] == []
    assert all(set(row) == ROW_KEYS for row in found["health"])
    assert [row["backend"] for row in found["health"] if row["service"] == "half"] == [
        *(BACKENDS[0], ABSENT),
    ]
    assert {row["service"] for row in found["health"]} == {"web", "translated", "half"}
    host.until(lambda: host.json("health", "list", "web")["health"][0]["last_ok"], "checks")
    done = host.shunt("health", "list", "half")
    columns = ["SERVICE", "BACKEND", "TYPE", "STATE", "SINCE", "LAST", "LATENCY", "REASON"]
    assert done.out.splitlines()[0].split() == columns
    words = done.lines(ABSENT)[0].split()
    assert words[:4] == ["half", ABSENT, "tcp", "failing"]
    assert words[-9:] == ["failed", "-", "port", "80:", "no", "answer", "within", "0.2", "s"]
    refused(host.shunt("health", "list", "wob"), "no service wob")
