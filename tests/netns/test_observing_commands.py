# SPDX-License-Identifier: Apache-2.0
"""Commands that only look, on a real shuntd: maglev, bpf, top."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from tests.netns.shunt_host import BACKENDS, CLIENT, NAT, SERVICES, WEB, Host, refused


def table(found: Any, protocol: str) -> Any:
    return next(t for t in found["tables"] if t["protocol"] == protocol)


def test_maglev_show(host: Host) -> None:
    found = host.json("maglev", "show", "web")
    assert [t["protocol"] for t in found["tables"]] == ["tcp", "udp"]
    shown = table(found, "tcp")
    assert (shown["slots"], sum(shown["states"].values())) == (256, 256)
    assert {b["backend"]: (b["slots"], b["due"], b["weight"]) for b in shown["backends"]} == {
        "10.9.0.2": (64, 64, 1),
        "10.9.0.3": (192, 192, 3),
    }
    assert (shown["most_above"], shown["most_below"]) == (0, 0)
    done = host.shunt("maglev", "show", "web")
    assert done.lines("web/udp: 256 slots from ")
    assert done.lines("10.9.0.3")[0].split() == ["10.9.0.3", "up", "3", "192", "75.0", "%", "192.0"]
    refused(host.shunt("maglev", "show", "wob"), "no service wob")


def test_a_simulation_foretells_what_moves(own: Host) -> None:
    own.start()
    told = table(own.json("maglev", "simulate", "web", "--weight", "10.9.0.2=3"), "tcp")
    assert own.json("service", "show", "web")["slots"]["moving"] == 0  # nothing has changed
    assert own.json("backend", "weight", "web", "10.9.0.2", "3")
    shown = table(own.json("maglev", "show", "web"), "tcp")
    assert shown["states"]["moving"] == told["moved"] > 0
    assert {b["backend"]: b["slots"] for b in shown["backends"]} == {
        b["backend"]: b["after"] for b in told["backends"]
    }
    told = table(own.json("maglev", "simulate", "web", "--drain", "10.9.0.3"), "tcp")
    own.json("backend", "drain", "web", "10.9.0.3")
    shown = table(own.json("maglev", "show", "web"), "tcp")
    assert {b["backend"]: b["slots"] for b in shown["backends"]} == {
        b["backend"]: b["after"] for b in told["backends"]
    }


def test_simulations_as_people_see_them(host: Host) -> None:
    done = host.shunt("maglev", "simulate", "web", "--add", "10.9.0.4=4", "--remove", "10.9.0.2")
    assert (done.code, done.err) == (0, "")
    first = done.out.splitlines()[0]
    assert first.startswith("web/tcp (256 slots): ")
    assert "of 256 would move" in first
    assert done.lines("10.9.0.4")[0].split()[:3] == ["10.9.0.4", "0", "146"]
    assert done.lines("10.9.0.2")[0].split()[:4] == ["10.9.0.2", "64", "0", "+0"]
    ask = ("maglev", "simulate", "web")
    refused(host.shunt(*ask, "--remove", "10.9.9.9"), "has no backend 10.9.9.9", "10.9.0.2")
    refused(host.shunt(*ask, "--add", "10.9.0.2"), "has a backend 10.9.0.2 already")
    refused(host.shunt(*ask, "--add", "10.9.0.300"), "backend 10.9.0.300 is not an address")
    refused(host.shunt(*ask, "--weight", "10.9.0.2=0"), "weight 0 of backend 10.9.0.2")
    assert host.shunt(*ask).code == 2
    assert host.shunt(*ask, "--weight", "10.9.0.2").code == 2


@pytest.mark.parametrize(
    "body",
    [{"add": []}, {"add": ["x"]}, {"remove": "x"}, {"drain": [1]}, {"weights": {"10.9.0.2": True}},
     {"weights": {"10.9.0.2": "3"}}, {"nothing": []}],
)  # fmt: skip
def test_a_body_that_makes_no_sense(host: Host, body: Any) -> None:
    from shunt.cli.client import Client, Refused

    ask = ("services", "web", "maglev", "simulate")
    if body == {"add": []}:  # empty is empty
        assert Client(host.sock).post(*ask, body=body)["tables"][0]["moved"] == 0
        return
    with pytest.raises(Refused) as caught:
        Client(host.sock).post(*ask, body=body)
    assert caught.value.status == 422
    assert caught.value.fix


def test_bpf_lb_list(host: Host) -> None:
    rows = {row["frontend"]: row for row in host.json("bpf", "lb", "list")}
    assert len(rows) == sum(len(list(_frontends(s))) for s in SERVICES.values())
    web = rows[f"{WEB}:80/tcp"]
    assert (web["name"], web["mode"], web["log2_slots"]) == ("web/tcp", "dsr-ipip", 8)
    assert web["idle_ns"] == 8000 * 10**9
    assert rows["[2001:db8::10]:80/tcp"]["svc"] == web["svc"]
    assert rows[f"{WEB}:53/udp"]["svc"] != web["svc"]
    assert rows[f"{NAT}:80/tcp"]["mode"] == "nat"
    done = host.shunt("bpf", "lb", "list", "web", "--limit", "3")
    assert len(done.lines("web/")) == 3
    assert "there are more than 3" in done.err
    assert len(host.json("bpf", "lb", "list", "translated")) == 1
    refused(host.shunt("bpf", "lb", "list", "wob"), "no service wob")


def _frontends(service: Any) -> Any:
    vips = service["vip"] if isinstance(service["vip"], list) else [service["vip"]]
    return ((vip, port) for vip in vips for port in service["ports"])


def test_bpf_flow_list(own: Host) -> None:
    own.start()
    assert own.json("bpf", "flow", "list") == []
    own.json("backend", "drain", "web", "10.9.0.2")
    client = own.connect(WEB)
    with client:
        for _ in range(40):  # not every slot has moved
            own.connect(WEB).close()
        own.until(lambda: bool(own.json("bpf", "flow", "list", "web")), "a flow is remembered")
        rows = own.json("bpf", "flow", "list", "web")
    row = rows[0]
    assert (row["source"], row["destination"], row["protocol"]) == (CLIENT, WEB, "tcp")
    assert row["destination_port"] == 80
    svc = own.json("bpf", "lb", "list", "web")
    assert row["svc"] == next(r["svc"] for r in svc if r["frontend"] == f"{WEB}:80/tcp")
    assert int(row["word"], 16) & (1 << 24) - 1 == row["backend_id"]
    assert own.shunt("bpf", "flow", "list").lines(row["word"])
    assert own.json("bpf", "flow", "list", "translated") == []


def test_top_shows_the_rate_of_what_is_sent(host: Host) -> None:
    stop = threading.Event()

    def send() -> None:
        while not stop.is_set():
            host.datagram(WEB)
            time.sleep(0.01)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        found = host.json("top", "--once")
        table = host.shunt("top", "web", "--once")
    finally:
        stop.set()
        sender.join()
    assert {service["service"] for service in found} == set(SERVICES)
    web = found[0]
    assert web["service"] == "web"
    assert 0 < web["packets_per_s"] <= 200
    assert web["bits_per_s"] >= 8 * 36 * web["packets_per_s"]
    assert sorted(b["backend"] for b in web["backends"]) == sorted(BACKENDS)
    assert table.out.splitlines()[0].split() == [
        *("SERVICE", "BACKEND", "STATE", "PACKETS/S", "BITS/S", "MOVING")
    ]
    assert len(table.out.splitlines()) == 4


def test_top_goes_on_until_it_is_interrupted(host: Host) -> None:
    argv = [sys.executable, "-m", "shunt.cli.main", "--socket", str(host.sock)]
    argv += ["top", "--interval", "0.1", "-o", "json"]
    watcher = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert watcher.stdout is not None
        for _ in range(2):
            assert len(json.loads(watcher.stdout.readline())) == len(SERVICES)
        watcher.send_signal(signal.SIGINT)
        _, err = watcher.communicate(timeout=30)
    finally:
        watcher.kill()
        watcher.communicate()
    assert (watcher.returncode, err) == (0, "")


def test_top_on_a_terminal_draws_until_it_is_interrupted(host: Host) -> None:
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-m", "shunt.cli.main", "--socket", str(host.sock), "top"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    watcher = subprocess.Popen(argv, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    try:
        seen = b""
        while b"translated" not in seen:
            seen += os.read(ours, 65536)  # an OSError if it has ended
        assert b"PACKETS/S" in seen
        watcher.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # EIO: nobody has the other end any more
            while os.read(ours, 65536):
                pass
        assert watcher.wait(30) == 0
    finally:
        watcher.kill()
        watcher.wait()
        os.close(ours)
