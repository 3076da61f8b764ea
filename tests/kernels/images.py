# SPDX-License-Identifier: Apache-2.0
"""What a guest is made of: Debian's kernels, a small Debian, and the checkout's Python.

Everything is fetched through the host's own package registry, built once, and kept in the
cache directory (tools/cache-dir); remove that to fetch newer kernels.
"""

import lzma
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shunt.lb.errors import ShuntError

ROOT = Path(__file__).resolve().parents[2]

# The kernel series Shunt supports, and the Debian release each one is of.
SERIES: Mapping[str, str] = {"6.1": "bookworm", "6.12": "trixie"}
PACKAGE = "linux-image-cloud-amd64"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

# The guest's programs. The kernels' features beyond XDP are there to be tried by hand.
PROGRAMS = (
    *(
        "bpftool",
        "curl",
        "ethtool",
        "iproute2",
        "iputils-ping",
        "kmod",
        "libbpf1",
        "procps",
        "python3",
    ),
    *("ipvsadm", "nftables", "nginx", "tcpdump", "wireguard-tools"),
)
# What the kernel needs to reach its root file system.
BOOT_MODULES = ("virtio_pci", "virtio_blk", "ext4", "crc32c_generic")

# Runs before the root file system is there. The disks: root, modules, Python, the job, results.
# A failing step ends it, at which the kernel panics and QEMU exits.
INIT = """#!/bin/sh
set -e
/bin/busybox mkdir -p /proc /sys /dev /root
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
for module in /boot/*.ko; do /bin/busybox insmod $module; done
while ! [ -b /dev/vde ]; do /bin/busybox usleep 10000; done
/bin/busybox mount -t ext4 /dev/vda /root
/bin/busybox mkdir -p /root/lib/modules
/bin/busybox mount -t ext4 -o ro /dev/vdb /root/lib/modules
/bin/busybox tar -xf /dev/vdd -C /root
. /root/job/checkout
/bin/busybox mkdir -p "/root$CHECKOUT/build/venv"
/bin/busybox mount -t ext4 -o ro /dev/vdc "/root$CHECKOUT/build/venv"
for tree in proc sys dev; do /bin/busybox mount --move /$tree /root/$tree; done
exec /bin/busybox switch_root /root /bin/bash /job/init
"""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel, ready to boot."""

    release: str
    image: Path
    initramfs: Path
    modules: Path


def run(argv: Sequence[str | Path], why: str, folder: Path | None = None) -> str:
    """The standard output of a command; its own words when it fails.

    Raises: ShuntError; `why` says what the command was to do.
    """
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(
        argv, check=False, capture_output=True, text=True, cwd=folder, env=environment
    )
    if done.returncode:
        raise ShuntError(
            f"could not {why}",
            why=f"{argv[0]} said: {' '.join((done.stderr or done.stdout).split())[-2000:]}",
            fix="see the command's message; `make test-kernels` installs the programs it needs",
        )
    return done.stdout


def cache() -> Path:
    """Where the images are kept."""
    folder = Path(run([ROOT / "tools/cache-dir"], "find the cache").strip()) / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _scratch() -> Iterator[Path]:
    """A folder on the cache's file system, so that what is finished moves in one step."""
    with tempfile.TemporaryDirectory(prefix="making-", dir=cache()) as folder:
        yield Path(folder)


def registry() -> tuple[str, str, str]:
    """The host's release, and where it gets Debian's packages and security updates from."""
    form = "$(CREATED_BY) $(ORIGIN) $(CODENAME) $(REPO_URI)"
    targets = run(["apt-get", "indextargets", "--format", form], "read apt's configuration")
    sites = {}
    for line in targets.splitlines():
        created_by, origin, codename, uri = line.split(" ", 3)
        if created_by == "Packages" and origin == "Debian":
            sites[codename] = uri
    system = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if line
    )
    release = system.get("VERSION_CODENAME", "")
    if release not in sites:
        raise ShuntError(
            "apt knows no Debian package registry",
            why=f"`apt-get indextargets` lists no index of {release or 'this system'} by Debian",
            fix="the kernels and the guest are Debian's: run this on Debian, after apt-get update",
        )
    security = f"{release}-security"
    return release, sites[release], sites.get(security, sites[release])


def kernel(series: str) -> Kernel:
    """The newest kernel of a series, from the cache or from Debian.

    Raises: ShuntError if the series is not one of SERIES, or can't be fetched.
    """
    if series not in SERIES:
        raise ShuntError(
            f"no kernel {series}",
            why=f"the supported series are {', '.join(SERIES)}",
            fix="choose one of them; tests/kernels/images.py maps each to its Debian release",
        )
    home = cache() / series
    if not home.exists():
        with _scratch() as scratch:
            _fetch_kernel(series, scratch)
            (scratch / "kernel").rename(home)
    return Kernel(
        (home / "release").read_text().strip(),
        home / "vmlinuz",
        home / "initramfs",
        home / "modules.ext4",
    )


def _fetch_kernel(series: str, scratch: Path) -> None:
    """Make scratch/kernel: the image, its modules as a file system, and an initramfs."""
    print(f"Fetching Debian's kernel {series} ...", flush=True)
    package = _download_kernel(SERIES[series], scratch)
    tree = scratch / "tree"
    run(["dpkg-deb", "-x", package, tree], f"unpack {package.name}")
    # Debian 13 keeps modules below /usr; both end as lib/modules.
    if not (tree / "lib").exists():
        (tree / "lib").symlink_to("usr/lib")
    (release,) = (folder.name for folder in (tree / "lib/modules").iterdir())
    run(["depmod", "-b", tree, release], "list the modules' dependencies")

    made = scratch / "kernel"
    made.mkdir()
    shutil.copy(tree / f"boot/vmlinuz-{release}", made / "vmlinuz")
    make_ext4(tree / "lib/modules", made / "modules.ext4")
    _make_initramfs(tree / "lib/modules" / release, made / "initramfs")
    (made / "release").write_text(f"{release}\n")


def _download_kernel(release: str, scratch: Path) -> Path:
    """Download the kernel package of a Debian release with an apt of its own."""
    _, main, security = registry()
    for folder in ("state/lists/partial", "cache/archives/partial", "parts"):
        (scratch / folder).mkdir(parents=True)
    (scratch / "state/status").touch()
    (scratch / "sources.list").write_text(
        f"deb [signed-by={KEYRING}] {main} {release} main\n"
        + f"deb [signed-by={KEYRING}] {security} {release}-security main\n" * (security != main)
    )
    options = {
        "Dir::State": "state",
        "Dir::State::status": "state/status",
        "Dir::Cache": "cache",
        "Dir::Etc::sourcelist": "sources.list",
        "Dir::Etc::sourceparts": "parts",
        "Dir::Etc::preferencesparts": "parts",
    }
    own = [f"-o{key}={scratch / value}" for key, value in options.items()]
    # apt's own user can't enter a private folder, and would say so each time.
    own += ["-oAPT::Sandbox::User=root", "-qq"]
    run(["apt-get", *own, "update"], f"read the package lists of {release}")
    depends = run(["apt-cache", *own, "depends", PACKAGE], f"find {PACKAGE} in {release}")
    names = [line.split()[1] for line in depends.splitlines() if "Depends: linux-image-" in line]
    run(["apt-get", *own, "download", names[0]], f"download {names[0]}", scratch)
    (package,) = scratch.glob("linux-image-*.deb")
    return package


def _make_initramfs(modules: Path, target: Path) -> None:
    """An initramfs of busybox, INIT, and BOOT_MODULES with what they need, in loading order."""
    needs = dict(
        line.split(":", 1) for line in (modules / "modules.dep").read_text().splitlines() if line
    )
    files: list[str] = []
    for module in BOOT_MODULES:
        # Built into some kernels, and then in none of their module lists.
        for path in (p for p in needs if Path(p).name.split(".")[0] == module):
            files += [p for p in [*reversed(needs[path].split()), path] if p not in files]

    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        (tree / "bin").mkdir()
        (tree / "boot").mkdir()
        shutil.copy("/bin/busybox", tree / "bin/busybox")
        (tree / "bin/sh").symlink_to("busybox")
        (tree / "init").write_text(INIT)
        (tree / "init").chmod(0o755)
        for number, path in enumerate(files):
            data = (modules / path).read_bytes()
            plain = lzma.decompress(data) if path.endswith(".xz") else data
            name = Path(path).name.removesuffix(".xz")
            (tree / f"boot/{number:02}-{name}").write_bytes(plain)
        names = "".join(f"{path.relative_to(tree)}\n" for path in sorted(tree.rglob("*")))
        packed = subprocess.run(
            ["busybox", "cpio", "-o", "-H", "newc"],
            cwd=tree,
            input=names.encode(),
            capture_output=True,
            check=True,
        )
    target.write_bytes(packed.stdout)


def make_ext4(tree: Path, image: Path) -> None:
    """An ext4 image of `tree`, as large as it must be and a quarter more."""
    kib = int(run(["du", "-sk", tree], f"measure {tree}").split()[0])
    label = ["-q", "-t", "ext4", "-O", "^has_journal", "-m", "0"]
    # Small files waste half a block each, and every file takes an inode.
    size = f"{kib * 5 // 4 + 32768}k"
    run(["mke2fs", *label, "-d", tree, image, size], f"make {image.name}")


def root_image() -> Path:
    """A small Debian of the host's release: build/venv runs on the same Python there."""
    release, main, _ = registry()
    image = cache() / f"{release}.ext4"
    if not image.exists():
        print(f"Making a guest's root file system: {release} ...", flush=True)
        with _scratch() as scratch:
            tree, made = scratch / "tree", scratch / "image"
            include = f"--include={','.join(PROGRAMS)}"
            run(
                ["debootstrap", "--variant=minbase", include, release, tree, main],
                f"install {release}",
            )
            shutil.rmtree(tree / "var/cache/apt")
            shutil.rmtree(tree / "var/lib/apt/lists")
            make_ext4(tree, made)
            made.rename(image)
    return image


def venv_image() -> Path:
    """build/venv as an image, made again when that was made again."""
    image, mark = cache() / "venv.ext4", cache() / "venv.made-from"
    made_from = (ROOT / "build/venv/made-from").read_text()
    if not (image.exists() and mark.exists() and mark.read_text() == made_from):
        mark.unlink(missing_ok=True)
        with _scratch() as scratch:
            make_ext4(ROOT / "build/venv", scratch / "image")
            (scratch / "image").rename(image)
        mark.write_text(made_from)
    return image
