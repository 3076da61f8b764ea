# SPDX-License-Identifier: Apache-2.0
"""Watching files and directories, on real ones."""

import resource
import select
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from shunt.kern.inotify import Watch
from shunt.lb.errors import ShuntError


@pytest.fixture
def place(tmp_path: Path) -> Path:
    etc = tmp_path / "etc"
    (etc / "services.d").mkdir(parents=True)
    (etc / "shunt.yaml").write_text("interfaces: [eth0]\n")
    return etc


@pytest.fixture
def watch(place: Path) -> Iterator[Watch]:
    with Watch([place / "shunt.yaml", place / "services.d"]) as watch:
        yield watch


def seen(watch: Watch, place: Path) -> set[str]:
    """What changed, relative to `place`."""
    return {str(Path(path).relative_to(place)) for path in watch.read()}


def test_nothing_at_first(watch: Watch) -> None:
    assert not select.select([watch], [], [], 0)[0]
    assert watch.read() == set()


def test_a_file_written_replaced_and_removed(watch: Watch, place: Path) -> None:
    (place / "shunt.yaml").write_text("interfaces: [eth1]\n")
    assert select.select([watch], [], [], 1)[0]
    assert seen(watch, place) == {"shunt.yaml"}
    # As editors do it: write beside, rename over.
    (place / ".shunt.yaml.swp").write_text("x")
    assert seen(watch, place) == set()
    (place / ".shunt.yaml.swp").rename(place / "shunt.yaml")
    assert seen(watch, place) == {"shunt.yaml"}
    (place / "shunt.yaml").unlink()
    assert seen(watch, place) == {"shunt.yaml"}
    (place / "shunt.yaml").write_text("back\n")
    assert seen(watch, place) == {"shunt.yaml"}


def test_files_in_a_directory(watch: Watch, place: Path) -> None:
    services = place / "services.d"
    (services / "web.yaml").write_text("name: web\n")
    (services / "dns.yaml").write_text("name: dns\n")
    assert seen(watch, place) == {"services.d/web.yaml", "services.d/dns.yaml"}
    (services / "web.yaml").rename(services / "www.yaml")
    assert seen(watch, place) == {"services.d/web.yaml", "services.d/www.yaml"}
    (services / "www.yaml").rename(place / "www.yaml.off")
    (services / "dns.yaml").unlink()
    assert seen(watch, place) == {"services.d/www.yaml", "services.d/dns.yaml"}
    # What is only read did not change.
    (place / "shunt.yaml").read_text()
    assert seen(watch, place) == set()


@pytest.mark.parametrize("new", [True, False])
def test_a_file_counts_when_it_is_closed(watch: Watch, place: Path, new: bool) -> None:
    path = place / "services.d" / "web.yaml"
    if not new:
        path.write_text("name: old\n")
        assert seen(watch, place) == {"services.d/web.yaml"}
    with path.open("w", buffering=1) as writer:
        writer.write("name: web\n")
        assert seen(watch, place) == set()
        assert watch.writing == {str(path)}
        # Others are not held up here.
        (place / "services.d" / "dns.yaml").write_text("name: dns\n")
        assert seen(watch, place) == {"services.d/dns.yaml"}
        writer.write("vip: 203.0.113.1\n")
        assert seen(watch, place) == set()
    assert seen(watch, place) == {"services.d/web.yaml"}
    assert watch.writing == set()


def test_a_file_that_goes_while_it_is_written(watch: Watch, place: Path) -> None:
    path = place / "services.d" / "web.yaml"
    with path.open("w", buffering=1) as writer:
        writer.write("name: web\n")
        assert seen(watch, place) == set()
        path.unlink()
        assert seen(watch, place) == {"services.d/web.yaml"}
        assert watch.writing == set()


def test_links_are_there_at_once(watch: Watch, place: Path) -> None:
    """Nobody will close them."""
    (place / "web").write_text("name: web\n")
    watch.read()
    (place / "services.d" / "a.yaml").symlink_to("../web")
    (place / "services.d" / "b.yaml").hardlink_to(place / "web")
    assert seen(watch, place) == {"services.d/a.yaml", "services.d/b.yaml"}


@pytest.mark.parametrize("way", ["deleted", "renamed", "replaced"])
def test_a_directory_that_goes_and_comes_back(watch: Watch, place: Path, way: str) -> None:
    services = place / "services.d"
    new = place / "new"
    new.mkdir()
    (new / "web.yaml").write_text("name: web\n")
    watch.read()
    if way == "deleted":
        shutil.rmtree(services)
        assert seen(watch, place) == {"services.d"}
        assert seen(watch, place) == set()
    else:
        services.rename(place / "old")
        if way == "renamed":
            assert seen(watch, place) == {"services.d"}
    new.rename(services)
    assert seen(watch, place) == {"services.d"}
    (services / "dns.yaml").write_text("name: dns\n")
    assert seen(watch, place) == {"services.d/dns.yaml"}
    # The old one, under its other name, is nothing of ours any more.
    if way != "deleted":
        (place / "old" / "x.yaml").write_text("")
        assert seen(watch, place) == set()


def test_its_parent_goes_and_comes_back(watch: Watch, place: Path) -> None:
    shutil.rmtree(place)
    assert {"shunt.yaml", "services.d"} <= seen(watch, place)
    (place / "services.d").mkdir(parents=True)
    (place / "shunt.yaml").write_text("interfaces: [eth0]\n")
    (place / "services.d" / "web.yaml").write_text("name: web\n")
    assert {"shunt.yaml", "services.d"} <= seen(watch, place)
    (place / "services.d" / "web.yaml").write_text("name: www\n")
    (place / "shunt.yaml").write_text("interfaces: [eth1]\n")
    assert seen(watch, place) == {"shunt.yaml", "services.d/web.yaml"}


def test_paths_that_do_not_exist_yet(tmp_path: Path) -> None:
    far = tmp_path / "a" / "b" / "services.d"
    with Watch([far]) as watch:
        (tmp_path / "a").mkdir()
        assert watch.read() == set()
        far.mkdir(parents=True)
        assert watch.read() == {str(far)}
        (far / "web.yaml").write_text("name: web\n")
        assert watch.read() == {str(far / "web.yaml")}


def test_links_swapped_beside_a_wanted_link(tmp_path: Path) -> None:
    """A Kubernetes ConfigMap: shunt.yaml -> ..data/shunt.yaml, ..data -> ..1."""
    for version in "12":
        (tmp_path / f"..{version}").mkdir()
        (tmp_path / f"..{version}" / "shunt.yaml").write_text(version)
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "shunt.yaml").symlink_to("..data/shunt.yaml")
    with Watch([tmp_path / "shunt.yaml"]) as watch:
        (tmp_path / "..tmp").symlink_to("..2")
        (tmp_path / "..tmp").rename(tmp_path / "..data")
        assert watch.read() == {str(tmp_path / "shunt.yaml")}
        assert (tmp_path / "shunt.yaml").read_text() == "2"


def test_more_than_fits_names_everything(watch: Watch, place: Path) -> None:
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    services = place / "services.d"
    # Equal events in a row are told once; two names in turn are not equal.
    for number in range(limit + 10):
        (services / f"{number % 2}.yaml").write_text("")
    assert {"shunt.yaml", "services.d"} <= seen(watch, place)


def test_no_watch_left_says_what_to_do(place: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        with pytest.raises(ShuntError, match=r"(?s)cannot watch.*why: inotify: Too many open"):
            Watch([place])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
