# SPDX-License-Identifier: Apache-2.0
"""The API, and how a daemon starts, ends and takes new files; the hosts are in shunt_host."""

from __future__ import annotations

import json
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from shunt.cli.client import Client
from shunt.lab.topology import remove_tree
from tests.netns.shunt_host import (
    BACKENDS,
    SETTINGS,
    Host,
    refused,
    watching,
)

# The API itself --------------------------------------------------------------------------------


def curl(path: Path, method: str, url: str, body: str | None = None) -> tuple[int, Any]:
    data = [] if body is None else ["-d", body]
    shown = subprocess.run(
        ["curl", "-s", "-X", method, "-w", "\n%{http_code}", "--unix-socket", str(path), *data,
         f"http://localhost{url}"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    answer, _, code = shown.rpartition("\n")
    return int(code), json.loads(answer)


@pytest.mark.parametrize(
    ("method", "url", "body", "status"),
    [
        ("GET", "/v1/nothing", None, 404),
        ("POST", "/v1/status", None, 405),
        ("GET", "/v1/services/wob", None, 404),
        ("GET", "/v1/backends?service=wob", None, 404),
        ("GET", "/v1/backends?services=web", None, 400),
        ("GET", "/v1/health?service=wob", None, 404),
        ("GET", "/v1/health?limit=3", None, 400),
        ("GET", "/v1/flows?limit=0", None, 400),
        ("GET", "/v1/flows?limit=many", None, 400),
        ("GET", "/v1/nat?limit=-1", None, 400),
        ("GET", "/v1/monitor?type=pass", None, 400),
        ("POST", "/v1/services/wob/backends/10.9.0.2/drain", None, 404),
        ("POST", "/v1/services/web/backends/10.9.0.8/drain", None, 404),
        ("PUT", "/v1/services/web/backends/10.9.0.2/weight", None, 400),
        ("PUT", "/v1/services/web/backends/10.9.0.2/weight", "{}", 400),
        ("PUT", "/v1/services/web/backends/10.9.0.2/weight", "not json", 400),
        ("PUT", "/v1/services/web/backends/10.9.0.2/weight", "[3]", 400),
        ("PUT", "/v1/services/web/backends/10.9.0.2/weight", '{"weight": true}', 400),
        ("PUT", "/v1/services/web/backends/10.9.0.2/weight", '{"weight": "3"}', 400),
        ("PUT", "/v1/services/web/backends/10.9.0.2/weight", '{"weight": -1}', 422),
        ("PUT", "/v1/services/web/backends/10.9.0.2/weight", '{"weight": 65536}', 422),
        ("POST", "/v1/flows/flush", '{"service": "wob"}', 404),
        ("POST", "/v1/flows/flush", '{"service": 7}', 404),
    ],
)
def test_what_is_wrong_is_answered_in_three_parts(
    host: Host, method: str, url: str, body: str | None, status: int
) -> None:
    code, answer = curl(host.sock, method, url, body)
    assert code == status
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"what", "why", "fix"}
    assert answer["error"]["what"]
    assert answer["error"]["fix"]


def test_a_body_without_end_is_refused(host: Host, tmp_path: Path) -> None:
    large = tmp_path / "large.json"
    large.write_text('{"weight": 1, "more": "' + "x" * 100_000 + '"}')
    url = "/v1/services/web/backends/10.9.0.2/weight"
    code, answer = curl(host.sock, "PUT", url, f"@{large}")
    assert (code, set(answer)) == (413, {"error"})


def test_the_socket_is_for_root_and_its_group_alone(host: Host) -> None:
    mode = host.sock.stat().st_mode
    assert (stat.S_ISSOCK(mode), stat.S_IMODE(mode), host.sock.stat().st_uid) == (True, 0o660, 0)
    connect = (
        "import socket, sys\n"
        "with socket.socket(socket.AF_UNIX) as s:\n"
        "    try: s.connect(sys.argv[1])\n"
        "    except PermissionError: sys.exit(13)\n"
    )
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "/usr/bin/python3"]
    command = [*nobody, "-c", connect, str(host.sock)]
    before = stat.S_IMODE(host.run.stat().st_mode)
    host.run.chmod(0o755)  # so that it is the socket that refuses
    try:
        assert subprocess.run(command, check=False).returncode == 13
        host.sock.chmod(0o666)  # and it is the mode by which it does
        assert subprocess.run(command, check=False).returncode == 0
    finally:
        host.sock.chmod(0o660)
        host.run.chmod(before)


# New files -----------------------------------------------------------------------------------


def test_reload_refuses_what_is_wrong_and_goes_on(host: Host) -> None:
    generation = host.json("status")["generation"]
    host.write("bad", {"nme": "bad", "vip": "203.0.113.300", "ports": [80]})
    try:
        done = host.shunt("config", "reload")
        refused(done, "bad.yaml:", 'unknown key "nme"', "203.0.113.300")
        assert f"generation {generation} is still in force" in done.err
        done = host.shunt("status", "-o", "json")
        assert done.code == 1
        shown = done.json
        assert shown["config_ok"] is False
        assert shown["generation"] == generation
        assert any("bad.yaml:" in error["what"] and error["fix"] for error in shown["errors"])
        assert "refused" in shown["problems"][0]
        done = host.shunt("status")
        assert done.code == 1
        assert 'unknown key "nme"' in done.out
        assert Client(host.sock).get("errors")["errors"] == shown["errors"]
        assert host.backend("web", "10.9.0.2")["state"] == "up"
    finally:
        (host.services / "bad.yaml").unlink()
    assert host.shunt("config", "reload").code == 0
    assert host.shunt("status").code == 0


def test_a_file_that_is_right_comes_into_force(host: Host) -> None:
    generation = host.json("status")["generation"]
    host.write("new", {"name": "new", "vip": "203.0.113.20", "ports": [443], "backends": BACKENDS})
    try:
        assert host.json("config", "reload")["generation"] == generation + 1
        assert len(host.json("backend", "list", "new")) == 2
    finally:
        (host.services / "new.yaml").unlink()
    assert host.json("config", "reload")["generation"] == generation + 2
    refused(host.shunt("backend", "list", "new"), "no service new")


def test_settings_that_cannot_be_applied_change_nothing(own: Host) -> None:
    own.start()
    before = own.json("status")
    own.config.write_text(yaml.safe_dump({**SETTINGS, "interfaces": ["eth0", "eth7"]}))
    own.write("new", {"name": "new", "vip": "203.0.113.20", "ports": [443], "backends": BACKENDS})
    for _ in range(2):  # it is as wrong the second time
        refused(own.shunt("config", "reload"), "eth7 does not exist", "is still in force")
        shown = own.shunt("status", "-o", "json").json
        assert shown["generation"] == before["generation"]
        assert [i["name"] for i in shown["interfaces"]] == ["eth0"]
        assert shown["interfaces"][0]["attached"] is True
        assert shown["services"] == before["services"]
        refused(own.shunt("service", "show", "new"), "no service new")
    own.config.write_text(yaml.safe_dump(SETTINGS))
    assert own.json("config", "reload")["generation"] == before["generation"] + 1
    assert own.json("service", "show", "new")["vips"] == ["203.0.113.20"]


# Starting and ending ---------------------------------------------------------------------------


def start_in_vain(host: Host, *more: str) -> str:
    """Start a daemon that must not come up; what it says."""
    done = host.here.run(*host.argv(*more), check=False, timeout_s=20)
    assert done.returncode == 1
    return done.stderr


def test_a_second_daemon_is_refused(host: Host, tmp_path: Path) -> None:
    said = start_in_vain(host, "--run", str(tmp_path / "other"))
    assert f"another shuntd is running on {host.bpffs}" in said
    assert "fix: " in said
    other = host.bpffs.with_name(f"{host.bpffs.name}-second")
    try:
        # Its own pins, but the same socket.
        said = start_in_vain(host, "--bpffs", str(other))
        assert f"another daemon listens on {host.sock}" in said
        assert not (other / "links").exists()
    finally:
        remove_tree(other)
    assert host.shunt("status").code == 0


def test_a_restart_keeps_what_was_asked_for(own: Host) -> None:
    own.start()
    own.json("backend", "drain", "web", "10.9.0.2")
    own.json("backend", "weight", "web", "10.9.0.3", "7")
    generation = own.json("status")["generation"]
    assert own.process is not None
    own.process.kill()
    assert own.sock.exists()
    done = own.shunt("status")
    assert (done.code, done.out) == (3, "")
    assert "nobody listens" in done.err
    assert own.attached()
    own.start()  # on the socket that was left
    assert own.backend("web", "10.9.0.2")["state"] == "draining"
    assert own.backend("web", "10.9.0.3")["weight"] == 7
    assert own.json("status")["generation"] >= generation


def test_a_file_in_the_sockets_place(own: Host) -> None:
    own.run.mkdir()
    own.sock.write_text("somebody's")
    assert f"{own.sock} is in the way" in start_in_vain(own)
    assert own.sock.read_text() == "somebody's"


def test_a_watcher_does_not_keep_the_daemon_from_ending(own: Host) -> None:
    own.start()
    with watching(own) as watcher:
        time.sleep(1)  # connected by now, or it says that nobody is there: both end it
        assert own.process is not None
        began = time.monotonic()
        assert own.process.stop() == 0
        assert time.monotonic() - began < 4
        _, err = watcher.communicate(timeout=10)
    assert watcher.returncode == 3
    assert "the stream has ended" in err
    assert not own.sock.exists()
