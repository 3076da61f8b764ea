# SPDX-License-Identifier: Apache-2.0
"""Services added through the API, and pools, on a real shuntd; the hosts are in shunt_host."""

from __future__ import annotations

import io
import json
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from shunt.cli.client import Client, Refused, Unreachable
from tests.netns.shunt_host import SERVICES, SETTINGS, WEB, Host, refused

EXTRA = "203.0.113.40"
POOLS = {"public": ["203.0.113.64/30"], "public6": ["2001:db8:f::/126"]}


def names(host: Host) -> set[str]:
    return {service["name"] for service in host.json("service", "list")}


def add(host: Host, name: str, *more: str, vip: str = EXTRA) -> Any:
    return host.json(
        *("service", "add", name, "--vip", vip, "--port", "80", "--backend", "10.9.0.2"), *more
    )


def answers(host: Host, vip: str, port: int = 53) -> bool:
    """Whether a VIP of a UDP service without backends says so: then the data path has it."""
    host.outside.run("ethtool", "-K", "eth0", "gro", "on")  # with NAPI a veth takes what XDP sends
    with host.outside.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(2)
        client.connect((vip, port))
        client.send(b"question")
        try:
            client.recv(100)
        except ConnectionRefusedError:
            return True
        except TimeoutError:
            return False
    return False


def test_a_service_of_the_api_serves_at_once_and_after_a_kill(own: Host) -> None:
    own.start()
    assert not answers(own, EXTRA)
    shown = own.json("service", "add", "extra", "--vip", EXTRA, "--port", "53/udp")
    assert (shown["name"], shown["origin"], shown["vips"]) == ("extra", "api", [EXTRA])
    assert answers(own, EXTRA)
    kept = json.loads((own.state / "state.json").read_bytes())
    assert kept["services"] == {
        "extra": {"name": "extra", "vip": [EXTRA], "ports": ["53/udp"]},
    }
    assert (own.state / "state.json").stat().st_mode & 0o777 == 0o600
    assert own.process is not None
    own.process.kill()
    own.start()
    assert own.json("service", "show", "extra")["origin"] == "api"
    assert answers(own, EXTRA)
    # The files come and go without it.
    assert own.shunt("config", "reload").code == 0
    done = own.shunt("service", "remove", "extra")
    assert done.code == 0
    assert "service extra is removed" in done.out
    assert "extra" not in names(own)
    assert not answers(own, EXTRA)
    own.process.kill()
    own.start()
    assert "extra" not in names(own)


def test_what_was_answered_survives_a_kill_at_any_moment(own: Host) -> None:
    own.start()
    client, answered = Client(own.sock), []
    stopped = threading.Event()

    def put() -> None:
        for n in range(1000):
            body = {"name": f"many/{n}", "vip": f"198.51.100.{n % 250}", "ports": [1000 + n]}
            try:
                client.put("services", f"many/{n}", body=body)
            except Unreachable:
                break
            answered.append(f"many/{n}")
        stopped.set()

    thread = threading.Thread(target=put)
    thread.start()
    try:
        own.until(lambda: len(answered) >= 15, "has answered")
        assert own.process is not None
        own.process.kill()
    finally:
        thread.join(60)
    assert stopped.is_set()
    own.start()
    assert set(answered) <= names(own)
    assert len(names(own) - set(answered) - set(SERVICES)) <= 1  # the one that was on its way


def test_adding_from_a_file_and_from_standard_input(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "no.yaml"
    file.write_text("# `no` is a name\nname: no\nvip: 203.0.113.41\nports: 80\nhealth: none\n")
    try:
        assert host.shunt("service", "add", str(file)).code == 0
        assert host.json("service", "show", "no")["health"] is None
        refused(host.shunt("service", "add", str(file)), "there is a service no already")
        text = '{"name": "no", "vip": "203.0.113.41", "ports": [81]}'
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert host.json("service", "add", "-", "--replace")["ports"] == ["81/tcp"]
    finally:
        assert host.shunt("service", "remove", "no").code == 0


def test_all_errors_of_a_service_with_their_lines(host: Host, tmp_path: Path) -> None:
    before = host.json("status")["generation"]
    file = tmp_path / "bad.yaml"
    file.write_text("name: bad\nvip: 203.0.113.300\nports: [0]\nbackend: x\n")
    done = host.shunt("service", "add", str(file))
    refused(done, f"{file}:2: vip 203.0.113.300", f"{file}:3: ", f'{file}:4: unknown key "backend"')
    refused(
        host.shunt("service", "add", "bad", "--vip", "x", "--port", "99999"),
        "vip x is not an address",
        "port 99999",
    )
    file.write_text("name: bad\nvip: [\n")
    done = host.shunt("service", "add", str(file))
    assert (done.code, done.out) == (1, "")
    assert f"{file}:2: not valid YAML" in done.err
    assert host.json("status")["generation"] == before
    refused(host.shunt("service", "add", "nofile"), "there is no file nofile")
    refused(host.shunt("service", "remove", "wob"), "no service wob", "the API added: none")
    refused(host.shunt("service", "remove", "web"), "service web is not the API's", "web.yaml:")
    assert host.shunt("service", "add", "x", "--vip", EXTRA).code == 2


def test_a_name_or_a_frontend_of_a_file_counts_more(own: Host) -> None:
    own.start()
    refused(
        own.shunt("service", "add", "web", "--vip", EXTRA, "--port", "80", "--replace"),
        "a file has a service of the name",
        "web.yaml:",
    )
    refused(
        own.shunt("service", "add", "thief", "--vip", WEB, "--port", "80"),
        f"frontend {WEB}:80/tcp is taken",
        "web (",
    )
    add(own, "late")
    add(own, "mine", vip="203.0.113.42")
    own.write("late", {"name": "file", "vip": EXTRA, "ports": [80], "backends": ["10.9.0.3"]})
    own.write("mine", {"name": "mine", "vip": "203.0.113.43", "ports": [80]})
    assert own.shunt("config", "reload").code == 0
    shown = own.json("service", "list")
    origins = {service["name"]: service["origin"] for service in shown}
    assert "late" not in origins
    assert origins["mine"].endswith("mine.yaml:1")
    done = own.shunt("status")
    assert done.code == 1
    assert "problem: service late of the API is set aside" in done.out
    assert f"frontend {EXTRA}:80/tcp is taken" in done.out
    assert "service mine of the API: a file has a service of the name mine" in done.out
    places = ["--config", str(own.config), "--services", str(own.services)]
    done = own.shunt("config", "check", *places, "--state", str(own.state))
    assert done.code == 0
    assert f"frontend {EXTRA}:80/tcp is taken" in done.err
    # Nothing of the API's was lost: it is back as soon as the files leave room.
    (own.services / "late.yaml").unlink()
    (own.services / "mine.yaml").unlink()
    assert own.shunt("config", "reload").code == 0
    assert own.json("service", "show", "late")["vips"] == [EXTRA]
    assert own.json("service", "show", "mine")["vips"] == ["203.0.113.42"]
    assert own.json("status")["set_aside"] == []


def test_two_who_change_the_same(host: Host) -> None:
    client = Client(host.sock)
    body = {"name": "both", "vip": EXTRA, "ports": [80]}
    shown = client.put("services", "both", body=body, headers={"If-None-Match": "*"})
    assert shown["origin"] == "api"
    try:
        generation = host.json("status")["generation"]
        stale = {"If-Match": f'"{generation - 1}"'}
        with pytest.raises(Refused, match="changed meanwhile") as raised:
            client.put("services", "both", body=body, headers=stale)
        assert raised.value.status == 412
        with pytest.raises(Refused, match="changed meanwhile"):
            client.delete("services", "both", headers=stale)
        with pytest.raises(Refused, match="no generation"):
            client.delete("services", "both", headers={"If-Match": "newest"})
        with pytest.raises(Refused, match="is refused") as raised:
            client.put("services", "other", body=body)
        assert raised.value.status == 422
        fresh = {"If-Match": f'"{generation}"'}
        client.put("services", "both", body={**body, "ports": [81]}, headers=fresh)
        assert host.json("service", "show", "both")["ports"] == ["81/tcp"]
    finally:
        client.delete("services", "both")


def test_what_cannot_be_kept_is_not_in_force(own: Host) -> None:
    own.start()
    before = own.json("status")["generation"]
    own.state.write_text("somebody's")
    refused(
        own.shunt("service", "add", "extra", "--vip", EXTRA, "--port", "80"),
        "state.json cannot be written",
        "--state",
    )
    assert "extra" not in names(own)
    assert own.json("status")["generation"] == before
    own.state.unlink()
    add(own, "extra")
    assert "extra" in names(own)


def test_a_state_that_cannot_be_read_is_left_alone(own: Host) -> None:
    own.state.mkdir()
    (own.state / "state.json").write_text("{half")
    done = own.here.run(*own.argv(), check=False, timeout_s=20)
    assert done.returncode == 1
    assert "state.json is not what shuntd wrote" in done.stderr
    assert (own.state / "state.json").read_text() == "{half"


def test_pools_give_addresses_that_stay(own: Host) -> None:
    own.config.write_text(yaml.safe_dump({**SETTINGS, "pools": POOLS}))
    own.write("one", {"name": "one", "vip": ["pool/public", "pool/public6"], "ports": ["53/udp"]})
    own.start()
    one = own.json("service", "show", "one")["vips"]
    assert [":" in vip for vip in one] == [False, True]
    assert answers(own, one[0])
    two = own.json("service", "add", "two", "--vip", "pool/public", "--port", "80")["vips"]
    (pool, pool6) = own.json("pool", "list")
    assert (pool["name"], pool["networks"], pool["size"]) == ("public", POOLS["public"], "4")
    assert {g["service"]: g["vip"] for g in pool["given"]} == {"one": one[0], "two": two[0]}
    assert pool6["given"] == [{"service": "one", "vip": one[1]}]
    assert own.shunt("pool", "list").lines("public ")[0].split()[2] == "2/4"
    # Others come first in every order, and the daemon is killed: nobody's address moves.
    own.write("aaa", [{"name": f"a{n}", "vip": "pool/public", "ports": [80]} for n in range(2)])
    assert own.shunt("config", "reload").code == 0
    assert own.process is not None
    own.process.kill()
    own.start()
    assert own.json("service", "show", "one")["vips"] == one
    assert own.json("service", "show", "two")["vips"] == two
    refused(
        own.shunt("service", "add", "three", "--vip", "pool/public", "--port", "80"),
        "pool public has no free address",
        "all of its 4 are given",
    )
    refused(
        own.shunt("service", "add", "three", "--vip", "pool/privat", "--port", "80"),
        "there is no pool privat",
        "public, public6",
    )
    refused(
        own.shunt("service", "add", "three", "--vip", one[0], "--port", "81"),
        f"vip {one[0]} is given to one",
    )
    own.write("three", {"name": "three", "vip": one[0], "ports": [81]})
    refused(own.shunt("config", "reload"), "three.yaml:4: vip", f"{one[0]} is given to one")
    # A file may take what the API has, and gives it back.
    own.write("three", {"name": "three", "vip": two[0], "ports": [81]})
    assert own.shunt("config", "reload").code == 0
    assert "two" not in names(own)
    assert "is named by three" in own.shunt("status").out
    (own.services / "three.yaml").unlink()
    assert own.shunt("config", "reload").code == 0
    assert own.json("service", "show", "two")["vips"] == two
    # A pool that shrinks below what it gave changes nothing.
    own.config.write_text(yaml.safe_dump({**SETTINGS, "pools": {**POOLS, "public": "10.8.0.0/30"}}))
    refused(own.shunt("config", "reload"), f"pool public no longer has {one[0]}")
    assert answers(own, one[0])
