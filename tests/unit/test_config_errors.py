# SPDX-License-Identifier: Apache-2.0
"""Errors between services and with the node's limits, unreadable files, and all errors at once."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from shunt.agent.sources import document, problems
from shunt.agent.sources.file import ConfigErrors, load
from shunt.lb.errors import ShuntError
from tests.unit.config_files import SERVICE, SETTINGS, errors, load_errors, three


def test_the_form_of_an_error(tmp_path: Path) -> None:
    entry = "- name: s{0}\n  vip: 203.0.113.{0}\n  ports: [80]\n"
    text = entry.format(1) + entry.format(2) + entry.format(3) + "  backends:\n  - 10.0.0.300:80\n"
    assert errors(tmp_path, web=text) == [
        three(
            "web.yaml:11: backend 10.0.0.300:80 is not an address",
            "services[2].backends[0] wants HOST:PORT with an IPv4 or [IPv6] host",
            "correct the line",
        )
    ]


def test_what_is_still_in_force_is_said_by_who_knows(tmp_path: Path) -> None:
    (tmp_path / "shunt.yaml").write_text("interfaces: [eth0]\nxdp: nativ\n")
    (tmp_path / "services.d").mkdir()
    with pytest.raises(ConfigErrors) as raised:
        load(tmp_path / "shunt.yaml", tmp_path / "services.d")
    assert isinstance(raised.value, ShuntError)
    assert (raised.value.errors[0].file, raised.value.errors[0].line) == (
        str(tmp_path / "shunt.yaml"),
        2,
    )
    in_force = "the running configuration (generation 41) is still in force"
    assert raised.value.text(in_force) == three(
        f"{tmp_path}/shunt.yaml:2: xdp nativ is not accepted",
        "xdp wants auto, native, generic or off",
        f'perhaps "native" is meant; {in_force}',
    )


def test_two_services_of_one_name(tmp_path: Path) -> None:
    text = (
        "- {name: web, vip: 203.0.113.1, ports: 80}\n- {name: web, vip: 203.0.113.2, ports: 80}\n"
    )
    assert errors(tmp_path, a=text, b="{name: web, vip: 203.0.113.3, ports: 80}") == [
        three(
            'a.yaml:2: two services have the name "web"',
            "the first one is at a.yaml:1",
            "rename or remove one of the two",
        ),
        three(
            'b.yaml:1: two services have the name "web"',
            "the first one is at a.yaml:1",
            "rename or remove one of the two",
        ),
    ]


def test_a_frontend_of_two_services(tmp_path: Path) -> None:
    a = "name: a\nvip:\n- 203.0.113.1\n- 2001:db8::1\nports: [80, 53/udp]\n"
    b = "name: b\nports: [53/udp, 53]\nvip:\n- 203.0.113.2\n- 2001:db8::1\n"
    c = "name: c\nvip: [203.0.113.1, 2001:db8::1]\nports: [80]\n"
    fix = "give each service a VIP, port or protocol of its own"
    assert errors(tmp_path, a=a, b=b, c=c) == [
        three(
            "b.yaml:5: frontend [2001:db8::1]:53/udp is taken",
            "a has the same frontend at a.yaml:4",
            fix,
        ),
        three(
            "c.yaml:2: frontend 203.0.113.1:80/tcp (and 1 more) is taken",
            "a has the same frontend at a.yaml:3",
            fix,
        ),
    ]


LIMIT_CASES = {
    "frontends": (
        "frontends: 16",
        "{name: a, vip: 203.0.113.1, ports: [" + ", ".join(map(str, range(80, 97))) + "]}",
        "shunt.yaml:3: 17 frontends are configured, and 16 fit",
        "limits.frontends is 16; each VIP, port and protocol takes one",
        "raise limits.frontends to 17 or more",
    ),
    # Id 0 stands for none; TCP and UDP of a service count twice.
    "services": (
        "services: 16",
        "\n".join(
            f"- {{name: s{at}, vip: 203.0.113.{at}, ports: [80, 80/udp]}}" for at in range(8)
        ),
        "shunt.yaml:3: 16 services are configured, and 15 fit",
        "limits.services is 16; each service and protocol takes one",
        "raise limits.services to 17 or more",
    ),
    "backends": (
        "backends: 16",
        "{name: a, vip: 203.0.113.1, ports: 80, backends: ["
        + ", ".join(f"10.0.0.{at}" for at in range(16))
        + "]}",
        "shunt.yaml:3: 16 backends are configured, and 15 fit",
        "limits.backends is 16; each backend, service and protocol takes one",
        "raise limits.backends to 17 or more",
    ),
    "slots": (
        "slots: 1024",
        (
            "- {name: a, vip: 203.0.113.1, ports: [80, 80/udp], backends: [10.0.0.1, 10.0.0.2]}\n"
            "- {name: b, vip: 203.0.113.2, ports: 80, slots_per_backend: 513, backends: 10.0.0.1}"
        ),
        "shunt.yaml:3: the services need 1536 slots, and the table has 1024",
        "the largest is b (web.yaml:2) with 1024",
        "raise limits.slots to 2048, or lower slots_per_backend",
    ),
    "slots of one": (
        "slots: 1024",
        (
            "- {name: a, vip: 203.0.113.1, ports: 80, backends: 10.0.0.1}\n"
            "- {name: b, vip: 203.0.113.2, ports: 80, slots_per_backend: 1025, backends: 10.0.0.1}"
        ),
        "web.yaml:2: b needs 2048 slots, and the table has 1024",
        (
            "1 backends of 1025 slots are rounded up to a power of two; "
            "limits.slots is set at shunt.yaml:3"
        ),
        "raise limits.slots to 2048 or more, or lower slots_per_backend",
    ),
}


@pytest.mark.parametrize("case", LIMIT_CASES)
def test_limits(tmp_path: Path, case: str) -> None:
    limit, services, what, why, fix = LIMIT_CASES[case]
    settings = SETTINGS + f"limits:\n  {limit}\n"
    assert errors(tmp_path, settings, web=services) == [three(what, why, fix)]


@pytest.mark.parametrize("case", ["frontends", "services", "backends", "slots"])
def test_what_just_fits(tmp_path: Path, case: str) -> None:
    """One less than in the case above, or what its message says to write, is no error."""
    limit, services, _, _, fix = LIMIT_CASES[case]
    number = next(word.rstrip(",") for word in fix.split() if word.rstrip(",").isdecimal())
    settings = SETTINGS + f"limits:\n  {limit.split(':')[0]}: {number}\n"
    assert errors(tmp_path, settings, web=services) == []


def test_limits_that_cannot_be_known_are_not_held_against_services(tmp_path: Path) -> None:
    backends = ", ".join(f"10.0.0.{at}" for at in range(16))
    text = f"{{name: a, vip: 203.0.113.1, ports: 80, backends: [{backends}]}}"
    (only,) = errors(tmp_path, SETTINGS + "limits: {backends: 16, slots: 1023}\n", web=text)
    assert "slots 1023 is out of range" in only


def test_a_mode_that_cannot_be_known_is_not_held_against_services(tmp_path: Path) -> None:
    text = SERVICE + "backends: ['10.0.0.1:8080']\n"
    (only,) = errors(tmp_path, SETTINGS + "mode: nta\n", web=text)
    assert "mode nta is not accepted" in only


def test_files_that_are_not_there(tmp_path: Path) -> None:
    assert load_errors(tmp_path) == [
        three(
            "services.d: the directory cannot be listed",
            "No such file or directory",
            "create the directory (it may be empty), or name another one with --services",
        ),
        three(
            "shunt.yaml: cannot be read",
            "No such file or directory",
            "let shuntd read this file, or remove it",
        ),
    ]


@pytest.mark.parametrize(
    ("make", "what", "why"),
    [
        (lambda path: path.mkdir(), "cannot be read", "Is a directory"),
        (os.mkfifo, "not a regular file", "a configuration is read from regular files"),
        (lambda path: path.symlink_to("nowhere"), "cannot be read", "No such file or directory"),
        (lambda path: path.symlink_to(path), "cannot be read", "Too many levels"),
        (
            lambda path: path.write_bytes(b"# a\n# \xff\n"),
            "not UTF-8 text",
            "byte 0xff at offset 6",
        ),
        (
            lambda path: path.write_bytes(b"#" * (document.MOST_BYTES + 1)),
            "too large",
            "a file may have 16 MiB",
        ),
    ],
)
def test_files_that_cannot_be_read(
    tmp_path: Path, make: Callable[[Path], object], what: str, why: str
) -> None:
    (tmp_path / "shunt.yaml").write_text(SETTINGS)
    (tmp_path / "services.d").mkdir()
    make(tmp_path / "services.d" / "web.yaml")
    (only,) = load_errors(tmp_path)
    line = ":2" if "UTF-8" in what else ""
    assert only.startswith(f"web.yaml{line}: {what}\n  why: {why}")


def test_a_name_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "shunt.yaml").write_text(SETTINGS)
    (tmp_path / "services.d").mkdir()
    (tmp_path / "services.d" / os.fsdecode(b"\xff.yaml")).write_text("x")
    (only,) = load_errors(tmp_path)
    assert only.startswith("\\xff.yaml:1: the file is the single value x")
    only.encode()


def test_aliases_that_multiply_are_stopped(tmp_path: Path) -> None:
    """Ten levels of ten aliases each would be 10^10 values."""
    levels = ["- &a0 [x, x, x, x, x, x, x, x, x, x]"]
    for at in range(9):
        levels.append(f"- &a{at + 1} [{', '.join([f'*a{at}'] * 10)}]")
    (only,) = errors(tmp_path, web="\n".join(levels))
    assert "more than 2000000 values" in only


WRONG_SETTINGS = """
interfaces:
  - eth0
  - eth0       #!
xdp: fast      #!
colour: red    #!
hash_seed: -1  #!
ipip:
  source4: x   #!
  source6: y   #!
nat:
  ports: 1-2   #!
budgets:
  inserts: -1  #!
  inserst: 1   #!
"""
WRONG_SERVICES = """
- name: UPPER              #!
  vip:
  - 203.0.113.1
  - 203.0.113.256          #!
  ports:
  - 80
  - http                   #!
  - 80                     #!
  backends:
  - 10.0.0.300             #!
  - {address: 10.0.0.1, weight: 0}     #!
  - {address: 10.0.0.2, wieght: 1}     #!
  - {address: 10.0.0.2}    #!
  - 10.0.0.3:81            #!
  - 203.0.113.1            #!
  - [10.0.0.4]             #!
- vip: 203.0.113.1         #!
  name: b
  ports: 80
  health:
    rise: 0                #!
    interval: 1s
    timeout: 2s            #!
  idle:
    tcp: long              #!
- name: b                  #!
  vip: 203.0.113.3
  ports: 80
  mode: local
  backends:
  - 2001:db8::1            #!
- {name: c, vip: 203.0.113.4}          #!
- d                        #!
"""


def test_all_errors_are_told_at_once(tmp_path: Path) -> None:
    """Each line marked #! has one error, and no other line has any."""
    settings, services = WRONG_SETTINGS, WRONG_SERVICES
    found = errors(tmp_path, settings, web=services)
    wrong = {
        f"{file}:{line}"
        for file, text in (("shunt.yaml", settings), ("web.yaml", services))
        for line, content in enumerate(text.splitlines(), 1)
        if "#!" in content
    }
    places = [error.partition(": ")[0] for error in found]
    assert set(places) == wrong
    assert len(places) == len(wrong) == 28
    # By file, and there by line.
    assert places == sorted(places, key=lambda place: (place[0] == "s", int(place.split(":")[1])))


def test_very_many_errors_are_counted(tmp_path: Path) -> None:
    found = errors(tmp_path, web=SERVICE + "backends:\n" + "- x\n" * 1500)
    assert len(found) == problems.MOST_ERRORS + 1
    assert found[-1].startswith("web.yaml:1: 500 more errors are not listed")
