# SPDX-License-Identifier: Apache-2.0
"""Files and services of the API together, and what is kept of the latter."""

import os
from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from shunt.agent.sources import file
from shunt.agent.sources.document import read_text
from shunt.agent.sources.file import ConfigErrors, FileSource
from shunt.agent.sources.merge import Loaded
from shunt.agent.sources.problems import Problems
from shunt.agent.sources.store import State, Store
from shunt.agent.sources.tree import TooDeep, node_of
from shunt.ipam.pools import Request
from shunt.lb.errors import ShuntError
from shunt.lb.model import IPAddress


def service(name: str, vip: str = "203.0.113.1", port: int = 80, **more: Any) -> dict[str, Any]:
    return {"name": name, "vip": vip, "ports": [port], **more}


def merged(
    place: Path, *api: dict[str, Any], node: str = "", must: tuple[str, ...] = (), **files: str
) -> Loaded:
    (place / "shunt.yaml").write_text(f"interfaces: [eth0]\n{node}")
    (place / "services.d").mkdir(exist_ok=True)
    for name, text in files.items():
        (place / "services.d" / f"{name}.yaml").write_text(f"name: {name}\n{text}")
    state = State({entry["name"]: entry for entry in api})
    return FileSource(place / "shunt.yaml", place / "services.d").merged(state, must)


def names(loaded: Loaded) -> list[str]:
    return [service.name for service in loaded.configuration.services]


def test_both_are_in_force_sorted_by_name(tmp_path: Path) -> None:
    found = merged(tmp_path, service("a"), web="vip: 203.0.113.2\nports: 80\n")
    assert names(found) == ["a", "web"]
    assert found.origins == {"a": "api", "web": f"{tmp_path}/services.d/web.yaml:1"}
    assert found.aside == {}


def test_the_older_of_two_of_the_api_stays(tmp_path: Path) -> None:
    found = merged(tmp_path, service("new"), service("a"), service("other", port=81))
    assert names(found) == ["new", "other"]
    assert "frontend 203.0.113.1:80/tcp is taken" in str(found.aside["a"][0])


def test_what_was_in_force_is_not_dropped_for_errors_of_its_own(tmp_path: Path) -> None:
    """shunt.yaml's mode changes, and a service of the API no longer fits it."""
    both = service("both", backends=["2001:db8::1"])
    assert names(merged(tmp_path, both)) == ["both"]
    with pytest.raises(ConfigErrors, match="service both of the API: backend"):
        merged(tmp_path, both, node="mode: local\n", must=("both",))
    # At a start there is nothing in force: the rest starts, and it is told.
    found = merged(tmp_path, both, service("a", port=81), node="mode: local\n")
    assert names(found) == ["a"]
    assert "is not of its VIP's family" in str(found.aside["both"][0])
    assert not found.overruled


def test_a_file_counts_more_also_than_what_is_in_force(tmp_path: Path) -> None:
    found = merged(
        tmp_path, service("web"), service("a", port=81), must=("web", "a"),
        web="vip: 203.0.113.1\nports: [81]\n",
    )  # fmt: skip
    assert names(found) == ["web"]
    assert found.overruled == {"web", "a"}


def test_errors_of_files_are_errors_whatever_the_api_has(tmp_path: Path) -> None:
    with pytest.raises(ConfigErrors, match=r"web.yaml:2"):
        merged(tmp_path, service("a"), web="vip: x\nports: 80\n")


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    store = Store(tmp_path / "a" / "b")
    assert store.read() == State()
    state = State(
        {"z/1": service("z/1"), "a": service("a", backends=["10.0.0.1", {"address": "::1"}])},
        {Request("a", "p"): ip_address("10.0.0.1"), Request("a", "q"): ip_address("2001:db8::1")},
    )
    store.write(state)
    again = Store(tmp_path / "a" / "b").read()
    assert again == state
    assert list(again.services) == ["z/1", "a"]  # the oldest first
    assert [path.name for path in store.directory.iterdir()] == ["state.json"]


def test_a_write_that_stops_half_way_leaves_the_old(tmp_path: Path) -> None:
    """As after kill -9: in a process of its own that ends in the middle of the write."""
    store = Store(tmp_path)
    store.write(State({"a": service("a")}))
    for stop in ("fsync", "rename"):
        child = os.fork()
        if not child:
            try:
                if stop == "fsync":
                    os.fsync = lambda _fd: os._exit(7)  # type: ignore[assignment]
                else:
                    Path.rename = lambda *_: os._exit(7)  # type: ignore[method-assign]
                store.write(State({"b": service("b")}))
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        assert list(store.read().services) == ["a"]
    store.write(State({"c": service("c")}))  # over what was left
    assert list(store.read().services) == ["c"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{half",
        "[]",
        '{"version": 2, "services": {}, "vips": {}}',
        '{"version": 1, "services": {}, "vips": {"a": {"p": "10.0.0.300"}}}',
    ],
)
def test_what_is_not_ours_is_left_alone(tmp_path: Path, text: str) -> None:
    store = Store(tmp_path)
    store.path.write_text(text)
    with pytest.raises(ShuntError, match="is not what shuntd wrote"):
        store.read()
    assert store.path.read_text() == text


def test_json_is_read_as_a_file_is(tmp_path: Path) -> None:
    entry = service("no", vip="203.0.113.9", health="none", udp_window=2.5, slots_per_backend=7)
    found = merged(tmp_path, entry).configuration.services[0]
    assert (found.name, found.health, found.udp_window_s) == ("no", None, 2.5)
    wrong = [
        {**service("a"), "ports": [True]},
        {**service("a"), "ports": None},
        {**service("a"), "slots_per_backend": "7"},
        {**service("a"), "vip": {"": 1}},
        {**service("a"), "udp_window": 1e400},
        {**service("a"), "\n": []},
    ]
    for entry in wrong:
        assert merged(tmp_path, entry).aside["a"], entry
    deep: Any = 1
    for _ in range(40):
        deep = [deep]
    with pytest.raises(TooDeep):
        node_of(deep)


def test_a_change_of_the_api_reads_no_file_that_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not the files of services that ask pools, unless they get other addresses."""
    read: list[str] = []

    def reading(path: Path, problems: Problems) -> str | None:
        read.append(path.stem)
        return read_text(path, problems)

    monkeypatch.setattr(file, "read_text", reading)
    monkeypatch.setattr(file, "SURE_NS", 0)
    pools = "interfaces: [eth0]\npools: {public: %s}\n"
    (tmp_path / "shunt.yaml").write_text(pools % "203.0.113.64/30")
    folder = tmp_path / "services.d"
    folder.mkdir()
    (folder / "plain.yaml").write_text("name: plain\nvip: 203.0.113.1\nports: 80\n")
    (folder / "asks.yaml").write_text("name: asks\nvip: pool/public\nports: 80\n")
    source = FileSource(tmp_path / "shunt.yaml", folder)

    given: Mapping[Request, IPAddress] = {}

    def again(*api: str) -> Loaded:
        read.clear()
        entries = {name: service(name, f"203.0.113.{9 + at}") for at, name in enumerate(api)}
        return source.merged(State(entries, given))

    before = again()
    assert sorted(read) == ["asks", "plain"]
    given = before.vips
    found = again("a")
    assert (read, names(found)) == ([], ["a", "asks", "plain"])
    assert found.vips == before.vips
    assert found == FileSource(tmp_path / "shunt.yaml", folder).merged(
        State({"a": service("a", "203.0.113.9")}, given)
    )
    (folder / "plain.yaml").write_text("name: plain\nvip: 203.0.113.2\nports: 80\n")
    again("a", "b")
    assert read == ["plain"]
    # The pool is another one, and forgot what it gave: who asks it gets another address.
    (tmp_path / "shunt.yaml").write_text(pools % "203.0.113.128/30")
    with pytest.raises(ConfigErrors, match="pool public no longer has"):
        again("a", "b")
    given = {}
    found = again("a", "b")
    assert "plain" not in read
    (moved,) = found.vips.values()
    assert moved in ip_network("203.0.113.128/30")
    assert [s.vips for s in found.configuration.services if s.name == "asks"] == [(moved,)]
    (folder / "asks.yaml").write_text("name: asks\nvip: pool/none\nports: 80\n")
    for _ in range(2):  # what is wrong is told each time
        with pytest.raises(ConfigErrors, match="pool"):
            again("a", "b")
