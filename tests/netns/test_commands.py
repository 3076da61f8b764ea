# SPDX-License-Identifier: Apache-2.0
"""What an operator looks at and steers, on a real shuntd; the hosts are in shunt_host."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from tests.netns.shunt_host import (
    ABSENT,
    BACKEND_KEYS,
    BACKENDS,
    CLIENT,
    DIRECT,
    EMPTY,
    FAST,
    FLOW_KEYS,
    HALF,
    NAT,
    SERVICES,
    WEB,
    Host,
    refused,
    watching,
)


def panicking(host: Host) -> list[str]:
    return [row["service"] for row in host.shunt("status", "-o", "json").json["panic"]]


# Looking ---------------------------------------------------------------------------------------


def test_status_is_well_and_says_how(host: Host) -> None:
    shown = host.json("status")
    assert shown["config_ok"] is True
    assert shown["errors"] == shown["problems"] == []
    assert shown["generation"] >= 1
    assert shown["services"] == len(SERVICES)
    assert shown["backends"] == {"up": 5, "failing": 1, "draining": 0, "removed": 0}
    assert shown["slots"]["total"] == 65536
    assert (shown["flows"]["limit"], shown["nat"]["limit"]) == (6144, 4096)
    (interface,) = shown["interfaces"]
    with host.here.inside():
        assert interface["ifindex"] == socket.if_nametoindex("eth0")
    assert (interface["name"], interface["mode"], interface["attached"]) == ("eth0", "native", True)
    assert ABSENT in [problem["address"] for problem in shown["nexthop_problems"]]
    done = host.shunt("status")
    assert done.code == 0
    assert done.lines("interface eth0") == [
        f"interface eth0  native, program {interface['program_id']}"
    ]
    assert done.lines("backends  ") == ["backends        5 up, 1 failing, 0 draining, 0 removed"]


def test_reasons_and_counters_count_what_was_sent(host: Host) -> None:
    before, service = host.json("status")["reasons"], host.json("service", "show", "web")
    for _ in range(5):
        host.datagram(WEB)
    host.datagram(EMPTY)

    def packets(name: str, reasons: Any) -> int:
        return int(reasons.get(name, {"packets": 0})["packets"])

    def arrived() -> bool:
        after = host.json("status")["reasons"]
        return packets("SENT_TO_BACKEND", after) >= packets("SENT_TO_BACKEND", before) + 5

    host.until(arrived, "the packets are counted")
    after = host.json("status")["reasons"]
    assert packets("SENT_UNREACHABLE", after) == packets("SENT_UNREACHABLE", before) + 1
    shown = host.json("service", "show", "web")
    assert shown["packets"] == service["packets"] + 5
    assert shown["bytes"] > service["bytes"]
    assert sum(b["packets"] for b in shown["backends"]) == shown["packets"]
    assert "sent-unreachable" in host.shunt("status").out


def test_service_list(host: Host) -> None:
    shown = {service["name"]: service for service in host.json("service", "list")}
    assert set(shown) == set(SERVICES)
    web = shown["web"]
    assert web["vips"] == [WEB, "2001:db8::10"]
    assert web["ports"] == ["80/tcp", "53/udp"]
    assert (web["protocols"], web["mode"]) == (["tcp", "udp"], "dsr-ipip")
    assert web["slots"]["total"] == 2 * 256
    assert shown["half"]["backend_states"] == {"up": 1, "failing": 1, "draining": 0, "removed": 0}
    done = host.shunt("service", "list")
    assert done.out.splitlines()[0].split() == [
        *("NAME", "VIPS", "PORTS", "MODE", "UP", "MOVING", "PACKETS", "BYTES")
    ]
    assert done.lines("half")[0].split()[:5] == ["half", HALF, "80/tcp", "dsr-ipip", "1/2"]


def test_service_show(host: Host) -> None:
    shown = host.json("service", "show", "web")
    assert [b["backend"] for b in shown["backends"]] == list(BACKENDS)
    assert shown["health"]["interval_s"] == pytest.approx(0.3)
    assert shown["idle_s"] == {"tcp": 8000, "udp": 60}
    out = host.shunt("service", "show", "web").out
    assert "dsr-ipip" in out
    assert "10.9.0.3" in out
    refused(
        host.shunt("service", "show", "wob"),
        "no service wob",
        "direct, empty, half, translated, web",
    )
    assert host.shunt("service", "show").code == 2


def test_backend_list(host: Host) -> None:
    rows = host.json("backend", "list")
    assert {(row["service"], row["backend"]) for row in rows} == {
        *(("web", backend) for backend in BACKENDS),
        ("direct", "10.9.0.3"),
        ("translated", "10.9.0.2:8080"),
        ("half", "10.9.0.2"),
        ("half", ABSENT),
    }
    assert all(set(row) == BACKEND_KEYS for row in rows)
    light, heavy = host.json("backend", "list", "web")
    assert (light["weight"], heavy["weight"], heavy["configured_weight"]) == (1, 3, 3)
    assert (light["share"], heavy["share"]) == (0.25, 0.75)
    assert light["nexthop"]["device"] == "eth0"
    shown = json.loads(host.outside.run("ip", "-j", "link", "show", "dev", "eth0").stdout)
    assert light["nexthop"]["mac"] == shown[0]["address"]
    assert host.backend("translated", "10.9.0.2:8080")["port"] == 8080
    absent = host.backend("half", ABSENT)
    assert (absent["state"], absent["slots"]) == ("failing", 0)
    assert "port 80" in absent["reason"]
    done = host.shunt("backend", "list", "half")
    assert done.lines(ABSENT)[0].split()[:3] == ["half", ABSENT, "failing"]
    assert absent["reason"] in done.out
    refused(host.shunt("backend", "list", "wob"), "no service wob")


# Steering --------------------------------------------------------------------------------------


def test_drain_and_undrain(host: Host) -> None:
    done = host.shunt("backend", "drain", "web", "10.9.0.2")
    assert (done.code, done.err) == (0, "")
    assert done.out == "10.9.0.2 of service web: draining, weight 1, 0.0 % of the slots\n"
    row = host.backend("web", "10.9.0.2")
    assert (row["state"], row["drained"], row["slots"]) == ("draining", True, 0)
    assert host.backend("half", "10.9.0.2")["state"] == "up"
    assert host.json("status")["slots"]["moving"] > 0
    (row,) = host.json("backend", "undrain", "web", "10.9.0.2")
    assert (row["state"], row["share"]) == ("up", 0.25)


def test_drain_in_every_service(host: Host) -> None:
    rows = host.json("backend", "drain", "10.9.0.2")
    assert {(row["service"], row["state"]) for row in rows} == {
        (service, "draining") for service in ("web", "translated", "half")
    }
    rows = host.json("backend", "undrain", "10.9.0.2")
    assert {row["state"] for row in rows} == {"up"}
    assert {row["state"] for row in host.json("backend", "list", "web")} == {"up"}
    host.until(lambda: panicking(host) == [], "calms, for half's other backend is absent")


@pytest.mark.parametrize("verb", ["drain", "undrain"])
def test_drain_of_nobody(host: Host, verb: str) -> None:
    refused(host.shunt("backend", verb, "web", "10.9.0.8"), "no backend 10.9.0.8", *BACKENDS)
    refused(host.shunt("backend", verb, "wob", "10.9.0.2"), "no service wob")
    refused(host.shunt("backend", verb, "10.9.0.8"), "no service has a backend 10.9.0.8")
    refused(host.shunt("backend", verb, "web", "no/such backend"), "no/such backend")
    assert host.shunt("backend", verb).code == 2
    assert host.shunt("backend", verb, "web", "10.9.0.2", "more").code == 2


def test_weight(host: Host) -> None:
    (row,) = host.json("backend", "weight", "web", "10.9.0.2", "9")
    assert (row["weight"], row["configured_weight"], row["share"]) == (9, 1, 0.75)
    assert "9 (configured 1)" in host.shunt("backend", "list", "web").out
    done = host.shunt("backend", "weight", "web", "10.9.0.2", "--reset")
    assert done.out == "10.9.0.2 of service web: up, weight 1, 25.0 % of the slots\n"
    for low in ("0", "-1"):
        refused(host.shunt("backend", "weight", "web", "10.9.0.2", low), "shunt backend drain web")
    refused(host.shunt("backend", "weight", "web", "10.9.0.2", "65536"), "from 1 to 65535")
    refused(host.shunt("backend", "weight", "web", "10.9.0.8", "2"), "no backend 10.9.0.8")
    for wrong in ("many", "1.5", ""):
        assert host.shunt("backend", "weight", "web", "10.9.0.2", wrong).code == 2
    assert host.shunt("backend", "weight", "web", "10.9.0.2").code == 2
    assert host.shunt("backend", "weight", "web", "10.9.0.2", "3", "--reset").code == 2
    assert host.backend("web", "10.9.0.2")["weight"] == 1


def test_flows_are_listed_and_flushed(host: Host) -> None:
    host.json("backend", "drain", "web", "10.9.0.2")  # its slots move: new flows are remembered
    try:
        clients = [host.connect(WEB) for _ in range(40)]
        ports = {client.getsockname()[1] for client in clients}
        host.until(lambda: bool(host.json("flow", "list", "web")), "remembers a flow")
        flows = host.json("flow", "list")
        assert flows
        assert all(set(flow) == FLOW_KEYS for flow in flows)
        for flow in flows:
            assert flow["client_port"] in ports
            assert (flow["service"], flow["protocol"], flow["state"]) == ("web", "tcp", "opening")
            assert (flow["client"], flow["vip"], flow["vip_port"]) == (CLIENT, WEB, 80)
            assert flow["backend"] == "10.9.0.3"
            assert 0 <= flow["idle_s"] < 15
        assert host.json("flow", "list", "half") == []
        out = host.shunt("flow", "list", "web").out
        assert f"{CLIENT}:{flows[0]['client_port']}" in out
        few = host.shunt("flow", "list", "--limit", "1")
        assert len(few.out.splitlines()) == 2
        assert "more than 1" in few.err
        assert host.json("flow", "flush", "half", "--yes") == {"deleted": 0}
        assert host.json("flow", "flush", "web", "--yes")["deleted"] >= len(flows)
        for client in clients:
            client.close()
    finally:
        host.json("backend", "undrain", "web", "10.9.0.2")


def test_flow_arguments(host: Host) -> None:
    refused(host.shunt("flow", "list", "wob"), "no service wob")
    refused(host.shunt("flow", "flush", "wob", "--yes"), "no service wob")
    asked = host.shunt("flow", "flush")
    assert asked.code == 2
    assert "give --yes" in asked.err
    for limit in ("0", "-1", "x", "100001"):
        assert host.shunt("flow", "list", "--limit", limit).code == 2
        assert host.shunt("nat", "list", "--limit", limit).code == 2


def test_nat_list(host: Host) -> None:
    host.json("flow", "flush", "translated", "--yes")
    assert host.json("nat", "list") == []
    client = host.connect(NAT)
    host.until(lambda: bool(host.json("nat", "list")), "translates a flow")
    (flow,) = host.json("nat", "list", "translated")
    assert set(flow) == FLOW_KEYS | {"own", "own_port", "backend_port"}
    assert (flow["client"], flow["client_port"]) == client.getsockname()
    assert (flow["own"], flow["backend"]) == ("10.9.0.1", "10.9.0.2:8080")
    assert 10000 <= flow["own_port"] <= 29999
    line = host.shunt("nat", "list").lines(NAT)[0]
    assert f"10.9.0.1:{flow['own_port']}" in line
    assert host.json("nat", "list", "web") == []
    refused(host.shunt("nat", "list", "wob"), "no service wob")
    client.close()
    assert host.json("flow", "flush", "translated", "--yes") == {"deleted": 1}
    assert host.json("nat", "list") == []


def test_program_swap(host: Host) -> None:
    before = host.json("status")["interfaces"][0]["program_id"]
    host.json("backend", "drain", "web", "10.9.0.3")
    (after,) = host.json("program", "swap")
    assert after["program_id"] not in (0, before)
    assert after["attached"] is True
    # The daemon lives on with the same maps: it writes them, and its scan reads them.
    assert host.json("backend", "undrain", "web", "10.9.0.3")[0]["share"] == 0.75
    scanned = time.monotonic()
    host.until(
        lambda: host.json("status")["scan"]["ago_s"] < time.monotonic() - scanned, "scans again"
    )
    done = host.shunt("program", "swap")
    assert done.code == 0
    assert done.out.startswith("eth0: program ")


def test_a_service_whose_backends_all_fail_is_a_problem(host: Host) -> None:
    host.write("dead", {"name": "dead", "vip": HALF, "ports": [81], "backends": [ABSENT],
                        "health": FAST})  # fmt: skip
    try:
        host.json("config", "reload")
        host.until(lambda: panicking(host) == ["dead"], "panics")
        done = host.shunt("status")
        assert done.code == 1
        assert "problem: service dead: every backend is failing; all are treated as up" in done.out
        row = host.backend("dead", ABSENT)
        # Once ARP has given up there is no route to the host.
        assert (row["state"], row["reason"]) in {
            ("up", f"treated as up (panic): port 81: {why}")
            for why in ("no answer within 0.2 s", "no route to host")
        }
    finally:
        (host.services / "dead.yaml").unlink()
    host.json("config", "reload")
    assert host.shunt("status").code == 0


@pytest.mark.parametrize("output", ["json", "table"])
def test_monitor_shows_a_drop(host: Host, output: str) -> None:
    ports = set()

    def ended() -> bool:
        ports.add(host.datagram(DIRECT, ttl=1))
        return watcher.poll() is not None

    with watching(host, "--count", "2", "-o", output) as watcher:
        host.until(ended, "samples two drops")
        out, err = watcher.communicate()
    lines = out.splitlines()
    assert (watcher.returncode, len(lines), err) == (0, 2, "")
    if output == "table":
        assert " drop-ttl-expired eth0 udp 10.9.0.9:" in lines[0]
        assert f" > {DIRECT}:53 50 bytes service direct" in lines[0]
        return
    sample = json.loads(lines[0])
    assert sample.pop("source_port") in ports
    assert abs(sample.pop("time") - time.time()) < 30
    assert sample == {
        "reason": "DROP_TTL_EXPIRED",
        "interface": "eth0",
        "service": "direct",
        "backend": "10.9.0.3",
        "bytes": 14 + 20 + 8 + len(b"question"),
        "source": CLIENT,
        "destination": DIRECT,
        "ttl": 1,
        "protocol": "udp",
        "destination_port": 53,
    }


def test_monitor_arguments(host: Host) -> None:
    assert host.shunt("monitor", "--type", "pass").code == 2
    assert host.shunt("monitor", "--count", "0").code == 2


def test_ctrl_c_ends_the_monitor_well(host: Host) -> None:
    def has_asked() -> bool:
        """It has a socket: before that Python itself is being started."""
        files = Path(f"/proc/{watcher.pid}/fd")
        return any(str(path.readlink()).startswith("socket:") for path in files.iterdir())

    with watching(host) as watcher:
        host.until(has_asked, "the monitor asks")
        watcher.send_signal(signal.SIGINT)
        assert watcher.communicate(timeout=10) == ("", "")
    assert watcher.returncode == 0
