# SPDX-License-Identifier: Apache-2.0
"""Service files that are written slowly, in place: read when their writer has closed them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import yaml

from shunt.agent.daemon import WRITING_MAX_S
from tests.netns.shunt_host import BACKENDS, Host, a_host

FIRST = {"name": "first", "vip": "203.0.113.81", "ports": [80], "backends": [], "health": "none"}
# Valid after each line, and another configuration each time.
LINES = [
    "- {name: slow, vip: 203.0.113.80, ports: [80], health: none}\n",
    f"- {{name: other, vip: 203.0.113.82, ports: [80], backends: [{BACKENDS[0]}], health: none}}\n",
    "- {name: third, vip: 203.0.113.83, ports: [80], health: none}\n",
]
ALL = {"first", "slow", "other", "third"}


@pytest.fixture
def host() -> Iterator[Host]:
    with a_host("place") as host:
        for path in host.services.iterdir():
            path.unlink()
        host.write("first", FIRST)
        host.start()
        yield host


def names(host: Host) -> set[str]:
    return {row["name"] for row in host.json("service", "list")}


def generation(host: Host) -> int:
    return int(host.shunt("status", "-o", "json").json["generation"])


@pytest.mark.parametrize("new", [True, False], ids=["new", "over-another"])
def test_a_slow_writer_is_waited_for(host: Host, new: bool) -> None:
    path = host.services / "slow.yaml"
    if not new:
        path.write_text("".join(LINES))
        host.until(lambda: names(host) == ALL, "has the first form")
    before, seen = generation(host), {frozenset(names(host))}
    with path.open("w", buffering=1) as writer:
        for line in LINES:
            writer.write(line)
            for _ in range(8):  # longer than changes are gathered
                time.sleep(0.05)
                seen.add(frozenset(names(host)))
        assert generation(host) == before
        assert seen == {frozenset({"first"} if new else ALL)}
        writer.write(LINES[0].replace("slow", "last").replace(".80", ".84"))
    host.until(lambda: names(host) == ALL | {"last"}, "has all of it")
    assert generation(host) == before + 1


def test_other_changes_wait_with_it(host: Host) -> None:
    """One that is asked for through the API, too: it would have the file read."""
    path = host.services / "slow.yaml"
    add = [sys.executable, "-m", "shunt.cli.main", "--socket", str(host.sock), "service", "add"]
    with path.open("w", buffering=1) as writer:
        writer.write(LINES[0])
        host.write("more", {**FIRST, "name": "more", "vip": "203.0.113.85"})
        adding = subprocess.Popen([*add, "api", "--vip", "203.0.113.86", "--port", "53/udp"])
        time.sleep(2)
        assert names(host) == {"first"}
        assert adding.poll() is None
        writer.write(LINES[1] + LINES[2])
    assert adding.wait(60) == 0
    host.until(lambda: names(host) == ALL | {"more", "api"}, "has all three")


def test_a_writer_that_never_closes_is_not_waited_for_for_ever(host: Host) -> None:
    path = host.services / "slow.yaml"
    with path.open("w", buffering=1) as writer:
        began = time.monotonic()
        writer.write(LINES[0])
        host.until(lambda: names(host) == {"first", "slow"}, "reads it as it is")
        assert time.monotonic() - began >= WRITING_MAX_S
        assert f"slow.yaml: not closed by its writer for {WRITING_MAX_S:g} s" in (
            host.log.read_text()
        )
        writer.write(LINES[1] + LINES[2])
    host.until(lambda: names(host) == ALL, "has the rest when it is closed")


def test_a_half_written_file_does_no_harm_when_it_is_refused(host: Host) -> None:
    path = host.services / "slow.yaml"
    with path.open("w", buffering=1) as writer:
        writer.write("- {name: slow, vip: 203.0.113.80, po")
        time.sleep(0.5)
        assert host.shunt("status", "-o", "json").json["config_ok"]
        writer.write("rts: [80], health: none}\n")
    host.until(lambda: names(host) == {"first", "slow"}, "has it")
    assert yaml.safe_load(path.read_text())[0]["ports"] == [80]
    assert "refused" not in host.log.read_text()
