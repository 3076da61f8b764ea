# SPDX-License-Identifier: Apache-2.0
"""Run one command in a guest: a copy of the checkout, under another kernel, in QEMU.

    tests.kernels.guest --kernel 6.1 -- COMMAND...        (tools/vm runs this)

COMMAND runs as root in the checkout's path, with build/venv and the BPF file system there. Its
output is printed as it comes; its exit status is this program's. KVM is not needed.
"""

import argparse
import fcntl
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shunt.lb.errors import ShuntError
from tests.kernels import images

RESULTS_BYTES = 64 << 20
CONSOLE_LINES = 40

# Runs in the guest as its first process. The command's output goes to the second serial port:
# the first one is the kernel's.
JOB = """
set -e
export PATH={root}/build/venv/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM=dumb
export PYTHONDONTWRITEBYTECODE=1 GUEST_RESULTS=/job/results
mkdir -p /dev/pts /dev/shm /job/results
mount -t devpts devpts /dev/pts
# /tmp stays a part of the root disk, which is a snapshot: the checkout may be in it.
for place in /dev/shm /run; do mount -t tmpfs tmpfs $place; done
mkdir -p /run/netns /run/lock
mount -t bpf bpf /sys/fs/bpf
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t debugfs debugfs /sys/kernel/debug
mount -t tracefs tracefs /sys/kernel/tracing
hostname guest
ip link set lo up
uname -r >/job/results/release
cd {root}
stty -F /dev/ttyS1 raw -echo
status=0
{command} </dev/null >/dev/ttyS1 2>&1 || status=$?
echo $status >/job/results/status
stty -F /dev/ttyS1 -raw # returns once all of the output is sent
tar -cf /dev/vde -C /job/results .
sync
echo o >/proc/sysrq-trigger
sleep 60
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a guest left: its kernel, the command's exit status, and files by name."""

    release: str
    status: int
    files: dict[str, bytes]


def run_in_guest(
    series: str,
    command: Sequence[str],
    *,
    timeout_s: float = 900,
    memory_mib: int = 2048,
    processors: int = 2,
    prefix: str = "",
) -> Outcome:
    """Boot a kernel of `series` and run `command` in it.

    Its output is printed as it comes, each line after `prefix`. Files that it leaves in the
    folder $GUEST_RESULTS come back in the outcome.

    Raises: ShuntError if the guest does not boot, does not finish in time, or runs a kernel
            that is not of the series. The command's own failure is no error: see `status`.
    """
    with _images_locked():
        kernel = images.kernel(series)
        disks = [images.root_image(), kernel.modules, images.venv_image()]
    with tempfile.TemporaryDirectory(prefix="shunt-guest-") as folder:
        job, results, console = (Path(folder) / name for name in ("job", "results", "console"))
        _write_job(job, command)
        with results.open("wb") as file:
            file.truncate(RESULTS_BYTES)
        argv = _qemu(kernel, console, memory_mib, processors)
        # Writes to the root disk go to a temporary file; only `results` is kept.
        argv += _disk(disks[0], "snapshot=on")
        for disk in (*disks[1:], job):
            argv += _disk(disk, "readonly=on")
        argv += _disk(results, "cache=unsafe")
        _boot(argv, timeout_s, console, prefix)
        outcome = _read(results, console)
    if not outcome.release.startswith(f"{series}."):
        raise ShuntError(
            f"the guest ran kernel {outcome.release}, not {series}",
            why=f"the cached kernel {images.cache() / series} is of another series",
            fix="remove that folder; the next run fetches it again",
        )
    return outcome


@contextmanager
def _images_locked() -> Iterator[None]:
    """Two runs don't make the same image at once. A finished one is only ever read."""
    with (images.cache() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write_job(target: Path, command: Sequence[str]) -> None:
    """A tar of the checkout at its own path, and of the guest's first process."""
    with tempfile.TemporaryDirectory() as folder, tarfile.open(target, "w") as tar:
        script, place = Path(folder) / "init", Path(folder) / "checkout"
        script.write_text(JOB.format(root=shlex.quote(str(images.ROOT)), command=_quoted(command)))
        place.write_text(f"CHECKOUT={shlex.quote(str(images.ROOT))}\n")
        tar.add(script, "job/init")
        tar.add(place, "job/checkout")
        tar.add(images.ROOT, str(images.ROOT).lstrip("/"), filter=_belongs)
    # A disk is a whole number of sectors, which a tar of 10,240-byte records is.


def _quoted(command: Sequence[str]) -> str:
    return " ".join(shlex.quote(word) for word in command)


def _belongs(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Sources, objects, and what of build/ is imported or loaded; as root's, who runs there."""
    inside = Path(f"/{entry.name}").relative_to(images.ROOT).parts
    built = inside[:1] == ("build",) and inside[1:2] not in ((), ("py",), ("defects",))
    if built or inside[:1] == (".git",) or "__pycache__" in inside:
        return None
    entry.uid = entry.gid = 0
    return entry


def _qemu(kernel: images.Kernel, console: Path, memory_mib: int, processors: int) -> list[str]:
    return [
        *("setpriv", "--pdeathsig", "KILL"),  # a run that is killed leaves no guest behind
        # One thread for all of a guest's processors: Debian 12's QEMU (7.2) may keep what it has
        # translated while another thread changed it, and a kernel that patches its own code
        # (static keys) then met a breakpoint of its own that was gone, and panicked.
        *("qemu-system-x86_64", "-machine", "q35", "-accel", "tcg,thread=single", "-cpu", "max"),
        *("-m", str(memory_mib), "-smp", str(processors), "-nodefaults", "-display", "none"),
        *("-no-reboot", "-nic", "none", "-device", "virtio-rng-pci"),
        *("-kernel", str(kernel.image), "-initrd", str(kernel.initramfs)),
        # no_timer_check: on a busy machine the guest's timer may come too late for that check.
        # apparmor=0: nobody needs it here, and its start (aa_dfa_unpack) has panicked once.
        "-append",
        "console=ttyS0 panic=-1 loglevel=5 mitigations=off nokaslr no_timer_check apparmor=0",
        *("-serial", f"file:{console}", "-chardev", "stdio,id=out,signal=off"),
        *("-serial", "chardev:out"),
    ]


def _disk(path: Path, option: str) -> list[str]:
    return ["-drive", f"file={path},format=raw,if=virtio,{option}"]


def _boot(argv: Sequence[str], timeout_s: float, console: Path, prefix: str) -> None:
    with subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, errors="replace"
    ) as guest:
        late = threading.Event()

        def give_up() -> None:
            late.set()
            guest.kill()

        timer = threading.Timer(timeout_s, give_up)
        timer.start()
        try:
            for line in guest.stdout or ():
                print(f"{prefix}{line}", end="", flush=True)
        except BaseException:
            guest.kill()  # or leaving this block would wait for it
            raise
        finally:
            timer.cancel()
    if late.is_set():
        raise ShuntError(
            f"the guest did not finish within {timeout_s:g} s",
            why=f"its console ended with:\n{_tail(console)}",
            fix="give it more time with --timeout, or less to do",
        )
    if guest.returncode:
        raise ShuntError(
            "the guest could not be started",
            why=f"qemu-system-x86_64 ended with exit code {guest.returncode}; its message is above",
            fix="install what `make test-kernels` lists",
        )


def _read(results: Path, console: Path) -> Outcome:
    files = {}
    try:
        with tarfile.open(results) as tar:
            for entry in tar:
                if content := tar.extractfile(entry):
                    files[entry.name.removeprefix("./")] = content.read()
        return Outcome(files["release"].decode().strip(), int(files["status"]), files)
    except (tarfile.ReadError, KeyError):
        raise ShuntError(
            "the guest ended without a result",
            why=f"it crashed, or never reached the command; its console ended with:\n"
            f"{_tail(console)}",
            fix="look for a kernel message above; the cached images can be removed and made again",
        ) from None


def _tail(console: Path) -> str:
    text = console.read_text(errors="replace") if console.exists() else ""
    return "\n".join(text.splitlines()[-CONSOLE_LINES:])


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools/vm", description="Run a command in a guest.")
    parser.add_argument("--kernel", choices=images.SERIES, required=True, metavar="SERIES")
    parser.add_argument("--timeout", type=float, default=900, metavar="SECONDS")
    parser.add_argument("--memory", type=int, default=2048, metavar="MIB")
    parser.add_argument("--cpus", type=int, default=2, metavar="N")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("tools/vm needs root\n  why: it installs a Debian for the guest\n  fix: use sudo")
        return 1
    try:
        return run_in_guest(
            options.kernel,
            options.command,
            timeout_s=options.timeout,
            memory_mib=options.memory,
            processors=options.cpus,
        ).status
    except ShuntError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
