# SPDX-License-Identifier: Apache-2.0
"""Metrics of a real shuntd: what is documented is exported, and what is exported is true."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from functools import partial
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from shunt.kern.features import xdp_tracepoints
from tests.netns.shunt_host import BACKENDS, FAST, SERVICES, SETTINGS, WEB, Host
from tests.unit.test_metrics import documented

LISTEN = "127.0.0.1:9961"
LOCAL = "203.0.113.15"
BY_VIP = {**FAST, "port": 80, "via": "vip"}
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def parsed(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def scraped(host: Host) -> Samples:
    done = host.shunt("metrics")
    assert (done.code, done.err) == (0, "")
    return parsed(done.out)


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def fetch(host: Host, path: str = "/metrics") -> str:
    with host.here.inside(), urllib.request.urlopen(f"http://{LISTEN}{path}", timeout=10) as got:
        assert got.headers["Content-Type"].startswith("text/plain; version=")
        return str(got.read().decode())


def status(host: Host) -> Any:
    """Also while something is wrong: exit code 1."""
    return host.shunt("status", "-o", "json").json


def configure(host: Host, **metrics: Any) -> None:
    generation = status(host)["generation"]
    host.config.write_text(yaml.safe_dump({**SETTINGS, "metrics": metrics}))
    host.until(lambda: status(host)["generation"] > generation, "the file is in force")


def test_what_is_exported_is_what_is_documented(host: Host) -> None:
    text = host.shunt("metrics").out
    told = documented()
    kinds = {
        line.split()[2]: line.split()[3] for line in text.splitlines() if line.startswith("# TYPE ")
    }
    assert kinds == {name: kind for name, (kind, _) in told.items()}
    for name, labels in parsed(text):
        family = name
        for suffix in ("_bucket", "_sum", "_count"):
            if name.removesuffix(suffix) in told:
                family = name.removesuffix(suffix)
        wanted = {"le"} if name.endswith("_bucket") else set(told[family][1])
        assert {key for key, _ in labels} == wanted, name


def test_metrics_say_what_the_status_says(host: Host) -> None:
    before = scraped(host)
    for _ in range(3):
        host.datagram(WEB)

    def sent() -> float:
        return value(scraped(host), "shunt_packets_total", reason="sent_to_backend")

    least = value(before, "shunt_packets_total", reason="sent_to_backend") + 3
    host.until(lambda: sent() >= least, "the packets are counted")
    after, shown = scraped(host), status(host)
    where = {"service": "web", "protocol": "udp"}
    name = "shunt_backend_packets_total"
    of_backends = [value(after, name, **where, backend=b) for b in BACKENDS]
    assert value(after, "shunt_service_packets_total", **where) == sum(of_backends)
    grown = sum(of_backends) - value(before, "shunt_service_packets_total", **where)
    assert grown == 3
    assert value(after, "shunt_config_generation") == shown["generation"]
    assert value(after, "shunt_config_last_reload_successful") == 1
    assert value(after, "shunt_slots", state="free") == 65536 - shown["slots"]["used"]
    assert value(after, "shunt_backends", state="failing") == 1
    half = {"service": "half", "protocol": "tcp"}
    assert value(after, "shunt_backend_up", **half, backend="10.9.0.77") == 0
    assert value(after, "shunt_backend_up", **half, backend="10.9.0.2") == 1
    assert value(after, "shunt_backend_healthy", service="web", backend="10.9.0.2") == 1
    assert value(after, "shunt_map_memory_bytes", map="slots") >= 65536 * 8
    assert value(after, "shunt_map_limit", map="slots") == 65536
    assert value(after, "shunt_apply_duration_seconds_count") >= 1
    assert value(after, "shunt_process_anonymous_memory_bytes") > 1 << 20
    assert value(after, "shunt_interface_attached", interface="eth0", mode="native") == 1
    assert value(after, "shunt_checks_total") > 0


def test_metrics_are_on_the_network_only_where_they_are_wanted(own: Host) -> None:
    own.start()
    with pytest.raises(urllib.error.URLError):
        fetch(own)
    configure(own, listen=LISTEN, detail="services")
    own.until(lambda: "metrics: http" in own.log.read_text(), "it listens")
    found = parsed(fetch(own))
    assert value(found, "shunt_services") == 5
    assert not any(name.startswith("shunt_backend_") for name, _ in found)
    with pytest.raises(urllib.error.HTTPError):
        fetch(own, "/v1/status")
    configure(own)
    with pytest.raises(urllib.error.URLError):
        fetch(own)


def test_a_taken_port_is_told_and_harms_nothing(own: Host) -> None:
    own.config.write_text(yaml.safe_dump({**SETTINGS, "metrics": {"listen": LISTEN}}))
    with own.here.inside():
        squatter = socket.create_server(("127.0.0.1", 9961))
    with squatter:
        own.start()
        done = own.shunt("status", "-o", "json")
        assert done.code == 1
        (problem,) = done.json["problems"]
        assert f"metrics.listen {LISTEN} cannot be had" in problem
        assert done.json["interfaces"][0]["attached"] is True
    own.until(lambda: own.shunt("config", "reload").code == 0, "reloads")
    assert status(own)["problems"] == []
    assert "shunt_services 5.0" in fetch(own)


def test_a_refused_file_shows_in_the_gauge(own: Host) -> None:
    own.start()
    own.config.write_text("interfaces: [eth0]\nmetrics: {listen: 127.0.0.1}\n")
    done = own.shunt("config", "reload")
    assert done.code == 1
    assert "listen 127.0.0.1 is not an address with a port" in done.err
    found = scraped(own)
    assert value(found, "shunt_config_last_reload_successful") == 0
    assert value(found, "shunt_config_refused_total") >= 1


def test_run_times_of_programs_while_they_are_wanted(own: Host) -> None:
    """XDP's; TC's, which a service of mode local wants; and that of checks by way of a VIP."""
    local = {"name": "local", "vip": LOCAL, "ports": ["53/udp"], "mode": "local"}
    own.write("local", local | {"backends": ["10.9.0.1"]})
    own.write("direct", {"name": "direct", **SERVICES["direct"], "health": BY_VIP})
    own.start()
    configure(own, program_times="on")
    for vip in (WEB, LOCAL) * 5:
        own.datagram(vip)

    def measured(program: str, least: int) -> bool:
        found, of = scraped(own), {"program": program}
        runs = value(found, "shunt_program_runs_total", **of)
        return runs >= least and value(found, "shunt_program_run_seconds_total", **of) > 0

    for program, least in (
        ("shunt_lb", 10),
        ("shunt_ingress", 5),
        ("shunt_egress", 1),  # what this node sends itself, checks among it
        ("shunt_check", 1),
    ):
        own.until(partial(measured, program, least), f"runs of {program} are counted")


def test_what_a_driver_loses_is_counted(own: Host) -> None:
    """A veth whose other end does not poll drops what XDP sends: the verdict says sent."""
    if not xdp_tracepoints().present:
        pytest.skip("needs xdp_tracepoints")
    own.start()
    assert status(own)["losses"] == []
    own.outside.run("ethtool", "-K", "eth0", "gro", "off")
    for _ in range(4):
        own.datagram(WEB)

    def lost() -> int:
        return sum(row["packets"] for row in status(own)["losses"])

    own.until(lambda: lost() >= 4, "the losses are counted")
    (row,) = status(own)["losses"]
    assert row["interface"] == "eth0"
    assert row["reason"] in ("TX", "XMIT", "REDIRECT")
    labels = {"interface": "eth0", "reason": row["reason"].lower(), "error": row["error"]}
    assert value(scraped(own), "shunt_undelivered_packets_total", **labels) >= 4
    done = own.shunt("status")
    assert done.lines("LOST")
    assert done.lines(f"{row['reason'].lower()}  ")
    sent = status(own)["reasons"]["SENT_TO_BACKEND"]
    assert sent["packets"] >= 4
