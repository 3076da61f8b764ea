# SPDX-License-Identifier: Apache-2.0
"""Probes, shown hosts that lack things."""

from collections.abc import Callable
from pathlib import Path

import pytest

from shunt.kern import cgroup, features
from shunt.kern.bpffs import kind_of
from shunt.kern.features import Feature

STATUS = "Name:\tshuntd\nCapPrm:\t{0:016x}\nCapEff:\t{0:016x}\nCapBnd:\t000001ffffffffff\n"
MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:21 / /sys rw,nosuid - sysfs sysfs rw
{bpf}25 22 0:30 / /mnt/two\\040words rw - tmpfs tmpfs rw
"""
BPF = "24 23 0:28 / /sys/fs/bpf rw,nosuid - bpf bpf rw,mode=700\n"


def assert_absent(feature: Feature, *, needed: bool) -> None:
    assert not feature.present
    assert feature.needed == needed
    error = feature.error()
    assert error.what
    assert error.why
    assert error.fix


@pytest.mark.parametrize(
    ("release", "present"),
    [
        ("6.1.0-37-amd64", True),
        ("6.12.9", True),
        ("10.0", True),
        ("5.15.0-1", False),
        ("6.0.12", False),
        ("?", False),
    ],
)
def test_kernel(release: str, present: bool) -> None:
    feature = features.kernel(release)
    assert feature.present == present
    if not present:
        assert_absent(feature, needed=True)
        assert release in feature.error().what


@pytest.mark.parametrize(
    ("held", "missing"),
    [
        ([12, 38, 39], []),
        ([12, 21], []),  # CAP_SYS_ADMIN includes BPF
        ([12, 39], ["CAP_PERFMON"]),
        ([21], ["CAP_NET_ADMIN"]),
        ([], ["CAP_NET_ADMIN", "CAP_PERFMON", "CAP_BPF"]),
    ],
)
def test_privileges(tmp_path: Path, held: list[int], missing: list[str]) -> None:
    status = tmp_path / "status"
    status.write_text(STATUS.format(sum(1 << bit for bit in held)))
    feature = features.privileges(status)
    assert feature.present == (not missing)
    if missing:
        assert_absent(feature, needed=True)
        assert feature.why == f"this process lacks {', '.join(missing)}"


def test_btf(tmp_path: Path) -> None:
    vmlinux = tmp_path / "vmlinux"
    assert_absent(features.btf(vmlinux), needed=True)
    vmlinux.write_bytes(b"\x9f\xeb")
    assert features.btf(vmlinux).present


def test_tcx(tmp_path: Path) -> None:
    vmlinux = tmp_path / "vmlinux"
    assert_absent(features.tcx(vmlinux), needed=False)
    vmlinux.write_bytes(b"\0bpf_tcx_link\0")
    assert_absent(features.tcx(vmlinux), needed=False)
    vmlinux.write_bytes(b"\0tcx_link\0")
    assert features.tcx(vmlinux).present


def test_xdp_tracepoints(tmp_path: Path) -> None:
    vmlinux = tmp_path / "vmlinux"
    assert_absent(features.xdp_tracepoints(vmlinux), needed=False)
    names = ["xdp_exception", "xdp_bulk_tx", "xdp_redirect_err", "xdp_devmap_xmit"]
    vmlinux.write_bytes(b"\0".join([b"\x9f\xeb", *(f"btf_trace_{n}".encode() for n in names), b""]))
    assert features.xdp_tracepoints(vmlinux).present
    vmlinux.write_bytes(b"\0btf_trace_xdp_exception\0btf_trace_xdp_redirect_error\0")
    found = features.xdp_tracepoints(vmlinux)
    assert_absent(found, needed=False)
    assert "has no xdp_bulk_tx, xdp_redirect_err, xdp_devmap_xmit" in found.why


CGROUPS = {
    "version 2 alone": ("/sys/fs/cgroup", ["/ /sys/fs/cgroup rw - cgroup2 cgroup2 rw"]),
    "hybrid": (
        "/sys/fs/cgroup/unified",
        [
            "/ /sys/fs/cgroup rw - tmpfs tmpfs rw",
            "/ /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
            "/ /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu",
        ],
    ),
    "a part of it elsewhere": (
        "/sys/fs/cgroup",
        [
            "/a/container /mnt rw - cgroup2 cgroup2 rw",
            "/ /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
        ],
    ),
    "hidden": (
        "/run/cgroup2",
        [
            "/ /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw",
            "/ /run/cgroup2 rw - cgroup2 cgroup2 rw",
            "/ /sys/fs/cgroup rw - tmpfs tmpfs rw",
        ],
    ),
}


@pytest.mark.parametrize(("where", "lines"), CGROUPS.values(), ids=CGROUPS)
def test_where_control_groups_are(tmp_path: Path, where: str, lines: list[str]) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text("".join(f"{n} 1 0:{n} {line}\n" for n, line in enumerate(lines, 30)))
    assert cgroup.root(mountinfo) == Path(where)
    assert features.cgroup2(mountinfo).present


def test_no_control_groups_of_version_2(tmp_path: Path) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text("30 1 0:30 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n")
    feature = features.cgroup2(mountinfo)
    assert_absent(feature, needed=False)
    assert "mount -t cgroup2" in feature.fix


@pytest.mark.parametrize(
    ("probe", "symbol", "other"),
    [
        (features.socket_maps, "sk_psock", "sk_psock_link"),
        (
            features.socket_hooks,
            "__cgroup_bpf_run_filter_sock_addr",
            "__cgroup_bpf_run_filter_sock_ops",
        ),
        (features.mptcp, "mptcp_sock", "mptcp_sock_ops"),
        (features.sock_destroy, "bpf_sock_destroy", "bpf_sock_destroy_all"),
    ],
)
def test_what_the_kernels_types_tell(
    tmp_path: Path, probe: Callable[[Path], Feature], symbol: str, other: str
) -> None:
    vmlinux = tmp_path / "vmlinux"
    assert_absent(probe(vmlinux), needed=False)
    vmlinux.write_bytes(b"\0%s\0" % symbol.encode())
    assert probe(vmlinux).present
    vmlinux.write_bytes(b"\0%s\0" % other.encode())
    assert_absent(probe(vmlinux), needed=False)


def test_diag_destroy() -> None:
    assert_absent(features.diag_destroy(lambda: "it refuses: Not supported"), needed=False)
    assert features.diag_destroy(lambda: "").present


def test_the_file_system_of_a_path(tmp_path: Path) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(MOUNTS.format(bpf=BPF))
    for path, kind in {
        "/sys/fs/bpf/shunt": "bpf",
        "/sys/fs/bpf": "bpf",
        "/sys/fs/bpfish": "sysfs",
        "/mnt/two words/x": "tmpfs",
        "/etc": "ext4",
    }.items():
        assert kind_of(Path(path), mountinfo) == kind
    # What is mounted last lies on top.
    mountinfo.write_text(MOUNTS.format(bpf=BPF) + "26 24 0:31 / /sys/fs/bpf rw - tmpfs x rw\n")
    assert kind_of(Path("/sys/fs/bpf"), mountinfo) == "tmpfs"


def test_bpffs(tmp_path: Path) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.write_text(MOUNTS.format(bpf=BPF))
    assert features.bpffs(mountinfo=mountinfo).present
    mountinfo.write_text(MOUNTS.format(bpf=""))
    feature = features.bpffs(Path("/sys/fs/bpf/shunt"), mountinfo)
    assert_absent(feature, needed=False)
    assert feature.fix == "mount -t bpf bpf /sys/fs/bpf"


def test_jit(tmp_path: Path) -> None:
    enabled = tmp_path / "bpf_jit_enable"
    assert features.jit(enabled).present  # not to be seen from a network namespace
    enabled.write_text("1\n")
    assert features.jit(enabled).present
    enabled.write_text("0\n")
    assert_absent(features.jit(enabled), needed=False)


@pytest.mark.parametrize("index", ["modules.dep", "modules.builtin"])
def test_ipip(tmp_path: Path, index: str) -> None:
    assert_absent(features.ipip(tmp_path, "6.1.0"), needed=False)
    (tmp_path / "6.1.0").mkdir()
    (tmp_path / "6.1.0" / index).write_text("kernel/net/ipv4/xipip.ko: kernel/net/x.ko\n")
    assert not features.ipip(tmp_path, "6.1.0").present
    (tmp_path / "6.1.0" / index).write_text("kernel/a.ko:\nkernel/net/ipv4/ipip.ko.xz: b.ko\n")
    assert features.ipip(tmp_path, "6.1.0").present


def test_what_compiles_hooks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BCC_KERNEL_SOURCE", raising=False)
    packages, modules, archive = (tmp_path / name for name in ("packages", "modules", "archive"))
    both = features.hook_compiler(packages, modules, archive, "6.1.0")
    assert_absent(both, needed=False)
    assert both.fix == "apt-get install python3-bpfcc linux-headers-6.1.0"
    (packages / "bcc").mkdir(parents=True)
    headers = features.hook_compiler(packages, modules, archive, "6.1.0")
    assert_absent(headers, needed=False)
    assert headers.fix == "apt-get install linux-headers-6.1.0"
    (modules / "6.1.0" / "build").mkdir(parents=True)
    assert features.hook_compiler(packages, modules, archive, "6.1.0").present
    assert not features.hook_compiler(packages, modules, archive, "6.2.0").present
    archive.write_bytes(b"")
    assert features.hook_compiler(packages, modules, archive, "6.2.0").present
    archive.unlink()
    monkeypatch.setenv("BCC_KERNEL_SOURCE", str(tmp_path))
    assert features.hook_compiler(packages, modules, archive, "6.2.0").present


def test_names_are_distinct() -> None:
    names = [feature.name for feature in features.probe_all()]
    assert len(set(names)) == len(names) == len(features.PROBES)


@pytest.mark.parametrize(
    ("name", "module"), [("vlan", "8021q"), ("bonding", "bonding"), ("sctp", "sctp")]
)
def test_devices_by_their_module(name: str, module: str, tmp_path: Path) -> None:
    probe = getattr(features, name)
    assert_absent(probe(tmp_path, "6.1.0"), needed=False)
    (tmp_path / "6.1.0").mkdir()
    (tmp_path / "6.1.0/modules.dep").write_text(f"kernel/net/x/{module}.ko.xz: b.ko\n")
    assert probe(tmp_path, "6.1.0").present
