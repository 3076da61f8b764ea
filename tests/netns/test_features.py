# SPDX-License-Identifier: Apache-2.0
"""What the probes say of the running host, with and without its privileges and its bpffs.

Mounts happen in a mount namespace of the child's own.
"""

import os
import subprocess
import sys
from pathlib import Path

from shunt.kern import bpffs, features

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, *before: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": f"{ROOT}/build/py", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_this_host_will_do() -> None:
    features.check_host()


def test_without_privileges_the_error_says_which() -> None:
    # Anybody else may not even be able to enter the checkout.
    owner = str(ROOT.stat().st_uid)
    done = python(
        "from shunt.kern import features; features.check_host()",
        "setpriv", "--reuid", owner, "--clear-groups", "--bounding-set", "-all",
    )  # fmt: skip
    assert done.returncode == 1
    assert "Shunt is not allowed to load BPF programs" in done.stderr
    assert "why: this process lacks CAP_NET_ADMIN, CAP_PERFMON, CAP_BPF" in done.stderr
    assert "fix: run it as root" in done.stderr


_ENSURE = """
from pathlib import Path
from shunt.kern import bpffs
from shunt.lb.errors import ShuntError
path = Path({path!r})
for _ in range(2):
    try:
        print(bpffs.ensure_bpffs(path), bpffs.kind_of(path), path.is_dir())
    except ShuntError as error:
        print(error)
"""


def test_bpffs_is_mounted_where_it_is_missing(tmp_path: Path) -> None:
    path = f"/sys/fs/bpf/shunt-{os.getpid()}/pins"
    code = (
        "import subprocess; subprocess.run(['umount', '-l', '/sys/fs/bpf'], check=False)"
        + _ENSURE.format(path=path)
    )
    done = python(code, "unshare", "--mount", "--propagation", "private")
    assert done.stdout == "True bpf True\nFalse bpf True\n", done.stderr
    assert not Path(path).exists()
    elsewhere = tmp_path / "bpf" / "shunt"
    code = _ENSURE.format(path=str(elsewhere))
    done = python(code, "unshare", "--mount", "--propagation", "private")
    assert done.stdout == "True bpf True\nFalse bpf True\n", done.stderr


def test_bpffs_that_cannot_be_mounted(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    code = _ENSURE.format(path=str(tmp_path / "bpf"))
    done = python(code, "setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-all")
    assert f"no BPF file system at {tmp_path}/bpf, and none can be mounted" in done.stdout
    assert "why: Operation not permitted" in done.stdout
    assert f"fix: mount -t bpf bpf {tmp_path}/bpf" in done.stdout
    assert bpffs.kind_of(tmp_path / "bpf") != "bpf"


def test_no_directory_for_pins() -> None:
    done = python(_ENSURE.format(path="/sys/fs/bpf/shunt.d"))
    assert "cannot make the directory /sys/fs/bpf/shunt.d for pins" in done.stdout
