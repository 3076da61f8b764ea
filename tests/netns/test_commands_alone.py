# SPDX-License-Identifier: Apache-2.0
"""Commands that need no daemon, and `shunt` as a program; the hosts are in shunt_host."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from shunt.kern import neighbours
from shunt.kern.netlink import Netlink
from tests.netns.shunt_host import (
    WEB,
    Host,
    refused,
)


def test_config_check(host: Host, tmp_path: Path) -> None:
    places = ["--config", str(host.config), "--services", str(host.services)]
    done = host.shunt("config", "check", *places)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("ok: 5 services, 8 frontends, 6 backends, ")
    assert host.json("config", "check", *places)["ok"] is True
    config, services = tmp_path / "shunt.yaml", tmp_path / "services.d"
    services.mkdir()
    config.write_text("interfaces: [eth0]\nxdp: fast\n")
    (services / "a.yaml").write_text("name: a\nvip: 10.0.0.300\nports: [80]\n")
    (services / "b.yaml").write_text("name: b\nvip: 10.0.0.1\nports: [80]\nbackends: [x]\n")
    places = ["--config", str(config), "--services", str(services)]
    done = host.shunt("config", "check", *places)
    assert (done.code, done.out) == (1, "")
    for place in (f"{config}:2: ", f"{services}/a.yaml:2: ", f"{services}/b.yaml:4: "):
        assert place in done.err
    assert done.err.endswith("\n3 errors\n")
    done = host.shunt("config", "check", *places, "-o", "json")
    assert done.code == 1
    found = done.json
    assert found["ok"] is False
    assert {(Path(e["file"]).name, e["line"]) for e in found["errors"]} == {
        ("shunt.yaml", 2), ("a.yaml", 2), ("b.yaml", 4),
    }  # fmt: skip
    assert all(e["what"] and e["why"] and e["fix"] for e in found["errors"])
    done = host.shunt("config", "check", "--config", "/nowhere/shunt.yaml", *places[2:])
    assert done.code == 1
    assert "/nowhere/shunt.yaml" in done.err


def test_doctor(host: Host, tmp_path: Path) -> None:
    places = ["--config", str(host.config), "--services", str(host.services)]
    done = host.shunt("doctor", *places, "-o", "json")
    found = done.json
    assert {"level", "check", "what", "why", "fix"} == set(found[0])
    checks = {finding["check"]: finding for finding in found}
    assert "shunt_lb is attached, native" in checks["interface eth0"]["what"] or any(
        "shunt_lb is attached, native" in finding["what"] for finding in found
    )
    wrong = [finding for finding in found if finding["level"] == "error"]
    assert done.code == bool(wrong)
    shown = host.shunt("doctor", *places)
    assert shown.code == done.code
    for finding in wrong:
        assert finding["fix"] in shown.out
    assert host.shunt("doctor").out == shown.out, "it looks where shuntd does"
    bad = tmp_path / "shunt.yaml"
    bad.write_text("interfaces: [eth0]\nxdp: fast\n")
    done = host.shunt("doctor", "--config", str(bad), *places[2:])
    assert done.code == 1
    assert f"{bad}:2: " in done.out
    assert "privileges" in done.out


def test_doctor_of_a_backend(host: Host) -> None:
    done = host.shunt("doctor", "--backend", "--vip", WEB, "-o", "json")
    assert done.code == 1
    missing = next(f for f in done.json if f["check"] == f"vip {WEB}")
    assert missing["level"] == "error"
    assert missing["fix"] == f"ip addr add {WEB}/32 dev lo"
    assert host.shunt("doctor", "--backend", "--vip", WEB, "--mode", "nat").code == 0
    assert host.shunt("doctor", "--backend", "--vip", WEB, "--iface", "eth0").code == 1
    refused(host.shunt("doctor", "--backend", "--vip", WEB, "--iface", "eth7"), "eth7", "eth0")
    assert host.shunt("doctor", "--backend").code == 2
    assert host.shunt("doctor", "--vip", WEB).code == 2
    assert host.shunt("doctor", "--backend", "--vip", "10.0.0.300").code == 2
    assert host.shunt("doctor", "--backend", "--vip", WEB, "--mode", "dsr").code == 2


def test_decap(own: Host) -> None:
    place = ["--bpffs", str(own.bpffs)]
    assert own.json("decap", *place) == []
    (shown,) = own.json("decap", "--iface", "eth0", "--source", "198.18.0.0/16", *place)
    assert (shown["interface"], shown["mode"]) == ("eth0", "native")
    assert shown["sources"] == ["198.18.0.0/16"]
    assert own.attached()
    done = own.shunt("decap", *place)
    assert (done.code, done.out.splitlines()[0]) == (0, "eth0: decap, native, from 198.18.0.0/16")
    refused(own.shunt("decap", "--iface", "eth7", *place), "eth7 does not exist", "eth0")
    refused(own.shunt("decap", "--iface", "eth0", "--source", "10.0.0.300", *place), "10.0.0.300")
    assert own.shunt("decap", "--detach").code == 2
    assert own.shunt("decap", "--iface", "eth0", "--detach", "--source", "::/0").code == 2
    done = own.shunt("decap", "--iface", "eth0", "--detach", *place)
    assert (done.code, done.out) == (0, "eth0: decap is detached\n")
    assert not own.attached()
    refused(own.shunt("decap", "--iface", "eth0", "--detach", *place), "not attached to eth0")


def test_cleanup_is_refused_while_the_daemon_runs(host: Host) -> None:
    done = host.shunt("cleanup", "--bpffs", str(host.bpffs), "--yes")
    refused(done, f"shuntd is running on {host.bpffs}", "systemctl stop")
    assert host.attached()
    assert host.shunt("cleanup", "--bpffs", str(host.bpffs)).code == 2  # nobody to ask


def test_cleanup_leaves_the_host_as_it_was_found(own: Host) -> None:
    own.start()
    own.until(lambda: bool(kept(own)), "has neighbours kept")
    assert own.process is not None
    own.process.kill()
    own.outside.run("true")
    with own.here.inside():
        links = own.here.run("ip", "link", "add", "tun9", "type", "veth", "peer", "name", "tun8")
        assert links.returncode == 0
    own.here.ip("link set tun9 up", "link set tun8 up")
    assert own.shunt("decap", "--iface", "tun9", "--bpffs", str(own.bpffs)).code == 0
    assert own.attached()
    removed = own.json("cleanup", "--bpffs", str(own.bpffs), "--yes")["removed"]
    assert str(own.bpffs / "links" / "eth0") in removed
    assert str(own.bpffs / "decap-tun9") in removed
    assert str(own.sock) in removed
    assert not own.attached()
    assert "xdp" not in own.here.run("ip", "link", "show", "dev", "tun9").stdout
    assert not own.bpffs.exists()
    assert kept(own) == []
    again = own.shunt("cleanup", "--bpffs", str(own.bpffs), "--yes")
    assert (again.code, again.out) == (0, f"there was nothing to remove in {own.bpffs}\n")


def kept(host: Host) -> Sequence[neighbours.Neighbour]:
    """Neighbours that the kernel keeps resolved for Shunt."""
    with host.here.inside(), Netlink() as netlink:
        return [n for n in neighbours.all_of(netlink) if n.ours and n.managed]


def test_the_command_as_a_program(host: Host) -> None:
    command = [sys.executable, "-m", "shunt.cli.main"]
    environment = {**os.environ, "SHUNT_SOCKET": str(host.sock)}

    def shell(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", f'set -o pipefail; shunt() {{ {" ".join(command)} "$@"; }}; {line}'],
            capture_output=True, text=True, env=environment, check=False,
        )  # fmt: skip

    done = shell("shunt -o json backend list web | head -n 1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "[\n", "")
    done = shell("shunt metrics | head -n 1")  # more than a pipe's worth is left unread
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("# HELP ")
    families = json.loads(shell("shunt metrics -o json").stdout)
    packets = next(one for one in families if one["name"] == "shunt_packets")
    assert packets["type"] == "counter"
    assert {"name", "labels", "value"} == set(packets["samples"][0])
    assert shell("shunt --socket /nowhere/shunt.sock status").returncode == 3
    assert shell("shunt stats").returncode == 2
    done = shell("shunt backend list web >/dev/full")
    assert done.returncode == 1
    assert "No space left" in done.stderr
