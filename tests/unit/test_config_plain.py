# SPDX-License-Identifier: Apache-2.0
"""The fast way to read services gives what the slow one gives, or leaves the file to it."""

import os
import time
from pathlib import Path

import pytest

from shunt.agent.sources import file, plain
from shunt.agent.sources.document import compose, read_text
from shunt.agent.sources.file import FileSource
from shunt.agent.sources.pools import NO_POOLS
from shunt.agent.sources.problems import ConfigErrors, Problems
from shunt.agent.sources.services import Written
from shunt.lb.model import Mode

PLAIN = {
    "one": "name: web\nvip: 203.0.113.10\nports: 80\nbackends: 10.0.0.1\n",
    "no backends": "name: web\nvip: 203.0.113.10\nports: [80]\n",
    "of all kinds": """
# A comment.
- name: shop/web
  vip: [203.0.113.10,
        "2001:db8::10"]
  ports: [80, "443", 53/udp]
  backends:
    - 10.0.0.1
    - {address: 10.0.0.2, weight: 3}
    - '2001:db8:1::1'
  health: {type: tcp, port: 8080, interval: 5s, timeout: 0.5, rise: 3, fall: 2}
  idle: {udp: 30, tcp: 2h}
- vip: 203.0.113.11
  name: "no"
  ports:
  - 53
  mode: nat
  backends: ["10.0.1.1:5353", {port: 5353, address: 10.0.1.2}]
  slots_per_backend: 7
  udp_window: 1.5
- {name: yes, vip: 203.0.113.12, ports: 80, health: none}
""",
}
SLOW = {
    "an anchor": "name: web\nvip: &a 203.0.113.10\nports: 80\n",
    "an alias": "- &a {name: web, vip: 203.0.113.10, ports: 80}\n- {<<: *a, name: b, ports: 81}\n",
    "a tag": "name: !!str web\nvip: 203.0.113.10\nports: 80\n",
    "a key twice": "name: web\nvip: 203.0.113.10\nports: 80\nports: 81\n",
    "hexadecimal": "name: web\nvip: 203.0.113.10\nports: 80\nslots_per_backend: 0x10\n",
    "null": "name: web\nvip: 203.0.113.10\nports: 80\nbackends: ~\n",
    "unknown": "name: web\nvip: 203.0.113.10\nports: 80\nbackend: 10.0.0.1\n",
    "an address": "name: web\nvip: 203.0.113.10\nports: 80\nbackends: [10.0.0.300]\n",
    "a vip twice": "name: web\nvip: [203.0.113.10, 203.0.113.10]\nports: 80\n",
    "a timeout": "name: a\nvip: 203.0.113.1\nports: 80\nhealth: {timeout: 9s}\n",
    "two documents": "name: a\n---\nname: b\n",
    "a list as key": "[a, b]: c\n",
    "not YAML": "name: [web\n",
    "a word": "web\n",
    "a pool": "name: web\nvip: pool/public\nports: 80\n",
    "nothing": "",
    "deep": "[" * 40 + "]" * 40,
}


def slowly(text: str) -> tuple[list[Written], list[str]]:
    problems = Problems()
    document = compose("web.yaml", text, problems)
    drafts = file.load_services(document, Mode.DSR_IPIP, problems) if document else []
    written = [draft.build(Mode.DSR_IPIP, NO_POOLS) for draft in drafts]
    try:
        problems.raise_any()
    except ConfigErrors as errors:
        return [], [str(error) for error in errors.errors]
    return written, []


@pytest.mark.parametrize("case", PLAIN)
def test_both_ways_give_the_same(case: str) -> None:
    fast = plain.read_services("web.yaml", PLAIN[case], Mode.DSR_IPIP)
    assert (fast, []) == slowly(PLAIN[case])
    assert fast


@pytest.mark.parametrize("case", SLOW)
def test_what_is_not_plain_is_left_to_the_slow_way(case: str) -> None:
    with pytest.raises(plain.NotPlain):
        plain.read_services("web.yaml", SLOW[case], Mode.DSR_IPIP)


def write(path: Path, name: str, vip: int) -> None:
    path.write_text(f"name: {name}\nvip: 203.0.113.{vip}\nports: 80\n")


def aged(path: Path) -> None:
    """Wait until a change of this file would show."""
    while time.time_ns() - path.stat().st_ctime_ns <= file.SURE_NS:
        time.sleep(0.05)


def test_only_files_that_changed_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def reading(path: Path, problems: Problems) -> str | None:
        read.append(path.name)
        return read_text(path, problems)

    monkeypatch.setattr(file, "read_text", reading)
    config, services = tmp_path / "shunt.yaml", tmp_path / "services.d"
    config.write_text("interfaces: [eth0]\n")
    services.mkdir()
    for n, name in enumerate(("a", "b"), 1):
        write(services / f"{name}.yaml", name, n)
    source = FileSource(config, services)
    aged(services / "b.yaml")
    first = source.load()
    assert (read, source.load()) == (["a.yaml", "b.yaml"], first)
    assert len(read) == 2

    # Of the same size, and dated back: the inode's own time still tells.
    write(services / "b.yaml", "b", 9)
    os.utime(services / "b.yaml", (1, 1))
    second = source.load()
    assert read[2:] == ["b.yaml"]
    assert second.services[0] is first.services[0]
    assert str(second.services[1].vips[0]) == "203.0.113.9"

    # Written just now, so it may change again unseen: it is read each time, and at last no more.
    source.load()
    assert read[3:] == ["b.yaml"]
    aged(services / "b.yaml")
    source.load()
    source.load()
    assert read[4:] == ["b.yaml"]

    # Another default for the mode holds for all.
    config.write_text("interfaces: [eth0]\nmode: nat\n")
    assert {service.mode for service in source.load().services} == {Mode.NAT}
    (services / "a.yaml").unlink()
    assert [service.name for service in source.load().services] == ["b"]


def test_a_file_with_an_error_is_read_and_reported_each_time(tmp_path: Path) -> None:
    config, services = tmp_path / "shunt.yaml", tmp_path / "services.d"
    config.write_text("interfaces: [eth0]\n")
    services.mkdir()
    write(services / "a.yaml", "A", 1)
    source = FileSource(config, services)
    aged(services / "a.yaml")
    for _ in range(2):
        with pytest.raises(ConfigErrors, match="name A is not accepted"):
            source.load()
