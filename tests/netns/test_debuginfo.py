# SPDX-License-Identifier: Apache-2.0
"""One archive for whoever helps: of a node that runs, and of one that does not."""

from __future__ import annotations

import json
import stat
import tarfile
from pathlib import Path

import pytest
import yaml

from tests.netns.shunt_host import SETTINGS, Done, Host, refused

SECRET = "5eed5ec2e7"


def made(host: Host, path: Path) -> Done:
    return host.shunt(
        *("debuginfo", "--config", str(host.config), "--services", str(host.services)),
        *("--file", str(path), "-o", "json"),
    )


def unpacked(path: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None
            top, _, name = member.name.partition("/")
            assert top.startswith("shunt-debuginfo-")
            found[name] = file.read().decode()
    return found


def test_an_archive_of_a_node(own: Host, tmp_path: Path) -> None:
    seed = int(SECRET, 16)
    own.config.write_text(
        yaml.safe_dump({**SETTINGS, "hash_seed": seed}) + f"# password: {SECRET}\n"
    )
    own.start()
    done = made(own, tmp_path / "info.tar.gz")
    assert (done.code, done.err) == (0, "")
    assert stat.S_IMODE((tmp_path / "info.tar.gz").stat().st_mode) == 0o600
    found = unpacked(tmp_path / "info.tar.gz")
    assert sorted(found) == done.json["files"]
    assert json.loads(found["status.json"])["generation"] == 1
    assert {s["name"] for s in json.loads(found["services.json"])["services"]} >= {"web", "half"}
    assert "shunt_packets_total{" in found["metrics.txt"]
    checks = {finding["check"] for finding in json.loads(found["doctor.json"])}
    assert {"kernel", "xdp_tracepoints", "interface eth0"} <= checks
    assert any(check.startswith("speed") for check in checks)
    assert "hash_seed: (hidden)" in found["config/shunt.yaml"]
    assert yaml.safe_load(found["config/services.d/web.yaml"])["name"] == "web"
    assert "10.9.0.1/24" in found["ip-address.txt"]
    for name, text in found.items():
        assert SECRET not in text, name
        assert str(seed) not in text, name


def test_doctor_in_it_looks_where_the_daemon_keeps_its_services(own: Host, tmp_path: Path) -> None:
    own.start()
    own.here.ip("route add prohibit 10.66.0.0/16")
    service = ("--vip", "203.0.113.21", "--port", "53/udp", "--backend", "10.66.0.1")
    assert own.shunt("service", "add", "nowhere", *service).code == 0
    made(own, tmp_path / "with.tar.gz")
    assert "backend 10.66.0.1" in checks_of(tmp_path / "with.tar.gz")
    assert own.process is not None
    own.process.stop()
    options = ("--config", str(own.config), "--services", str(own.services))
    path = tmp_path / "down.tar.gz"
    own.shunt("debuginfo", *options, "--file", str(path))
    assert "backend 10.66.0.1" not in checks_of(path)
    path = tmp_path / "told.tar.gz"
    own.shunt("debuginfo", *options, "--state", str(own.state), "--file", str(path))
    assert "backend 10.66.0.1" in checks_of(path)


def checks_of(path: Path) -> set[str]:
    return {finding["check"] for finding in json.loads(unpacked(path)["doctor.json"])}


def test_an_archive_while_the_daemon_is_down_and_a_file_is_wrong(own: Host, tmp_path: Path) -> None:
    own.config.write_text("interfaces: [eth0\npassword: swordfish\n")
    done = made(own, tmp_path / "info.tar.gz")
    assert (done.code, done.err) == (0, "")
    assert "there is no such socket" in done.json["missing"]["status.json"]
    found = unpacked(tmp_path / "info.tar.gz")
    assert "status.json" not in found
    assert json.loads(found["manifest.json"])["missing"] == done.json["missing"]
    assert "interfaces: (hidden)" in found["config/shunt.yaml"]
    assert any(f["check"] == "configuration" for f in json.loads(found["doctor.json"]))
    assert not any("swordfish" in text for text in found.values())


def test_nothing_is_overwritten(own: Host, tmp_path: Path) -> None:
    path = tmp_path / "info.tar.gz"
    path.write_text("mine")
    refused(made(own, path), f"{path} cannot be written", "--file")
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["web.yaml", "left.txt"])
def test_only_files_that_are_read_are_in_it(own: Host, tmp_path: Path, name: str) -> None:
    (own.services / name).write_text("name: web\n")
    made(own, tmp_path / "info.tar.gz")
    inside = f"config/services.d/{name}" in unpacked(tmp_path / "info.tar.gz")
    assert inside == name.endswith(".yaml")
