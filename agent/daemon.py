# SPDX-License-Identifier: Apache-2.0
"""shuntd: one process, one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import logging
import os
import resource
import signal
import sys
import time
from pathlib import Path

import click

from shunt.agent.api import Api
from shunt.agent.events import Event, about
from shunt.agent.intent import Intent
from shunt.agent.journal import log_to, to_journal
from shunt.agent.metrics import Endpoint
from shunt.agent.node import Node
from shunt.agent.samples import Samples
from shunt.agent.service_manager import keep_alive, notify
from shunt.agent.sources.file import FileSource
from shunt.agent.sources.store import Store
from shunt.agent.unix_socket import remove_stale
from shunt.kern.bpffs import ensure_bpffs
from shunt.kern.features import check_host
from shunt.kern.inotify import Watch
from shunt.kern.memory import trim
from shunt.lb.errors import ShuntError

log = logging.getLogger("shunt")

# Files are often written several at once; they are looked at together.
COALESCE_S = 0.1
# A file that is written in place is read when it is closed; after so long in any case.
WRITING_MAX_S = 10.0
# A round of the scan takes at most this share of the time.
SCAN_SHARE = 0.1
SCAN_EVERY_S = 1.0


class Daemon:
    """The node, its source, its API, and the loops between them."""

    def __init__(self, config: Path, services: Path, bpffs: Path, run: Path, state: Path) -> None:
        self.source = FileSource(config, services)
        self.bpffs, self.run_dir = bpffs, run
        self.node = Node(bpffs, state)
        self.metrics = Endpoint(self.node)
        self.intent = Intent(self.node, self.source, Store(state), self._follow, self._settled)
        self._reload = asyncio.Event()
        self._watch: Watch | None = None
        self._written = asyncio.Event()  # nobody writes a file that we would read
        self._written.set()
        self._patience: asyncio.TimerHandle | None = None
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Until SIGTERM or SIGINT.

        Raises: ShuntError if it cannot start; what forwarded before goes on.
        """
        check_host()
        raise_file_limit()
        ensure_bpffs(self.bpffs)
        self.bpffs.mkdir(parents=True, exist_ok=True)
        self.run_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(only_one(self.bpffs))
            remove_stale(self.run_dir / "shunt.sock")  # before anything is attached
            watch = stack.enter_context(Watch(self.source.paths()))
            self._start()
            self.node.observing.start_tracing()
            samples = Samples(self.node.datapath.maps["samples"].fd)
            stack.callback(samples.close)
            api = Api(self.node, samples, self.intent)
            await api.start(self.run_dir / "shunt.sock")
            await self._observe()
            loop = asyncio.get_running_loop()
            self._watch = watch
            loop.add_reader(watch.fileno(), self._changed, watch)
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.add_signal_handler(number, self._stop.set)
            loop.add_signal_handler(signal.SIGHUP, self._reload.set)
            notify("READY=1", self._status())
            log.info(
                "in force: generation %d, %d services; read in %.2f s, applied in %.2f s",
                self.node.generation,
                len(self.node.want),
                self.node.counts.read_s,
                self.node.counts.first_apply_s,
                extra=about(Event.STARTED, generation=self.node.generation),
            )
            await self._until_stopped()
            notify("STOPPING=1")
            await self.metrics.close()
            await api.close()
            await self.node.close()
            log.info("stopped; what is in force goes on", extra=about(Event.STOPPED))

    def _status(self) -> str:
        """One line for `systemctl status`."""
        refused = f"; {len(self.node.errors)} errors, refused" if self.node.errors else ""
        return f"STATUS=generation {self.node.generation} in force{refused}"

    def _start(self) -> None:
        """Read the files, and bring what they say in force."""
        # All that is made now stays. Looking through it again and again, now and later, would take
        # as long as the rest does, and hold up the event loop for it.
        gc.disable()
        # A thread reads files while the loop answers requests: at the usual 5 ms each of the loop's
        # turns waits that long.
        sys.setswitchinterval(0.001)
        self.intent.start()
        trim()
        gc.freeze()
        gc.enable()

    async def _until_stopped(self) -> None:
        loops = self._scanning(), self._reloading(), keep_alive()
        tasks = [asyncio.create_task(one) for one in loops]
        stop = asyncio.create_task(self._stop.wait())
        done, _ = await asyncio.wait({*tasks, stop}, return_when=asyncio.FIRST_COMPLETED)
        for task in (*tasks, stop):
            task.cancel()
        await asyncio.gather(*tasks, stop, return_exceptions=True)
        for task in done - {stop}:
            task.result()  # a loop that ended by itself did so with an error

    def _changed(self, watch: Watch) -> None:
        if self.source.concerns(watch.read()):
            self._reload.set()
        if not self.source.concerns(watch.writing):
            self._all_written()
            return
        self._reload.set()
        self._written.clear()
        if self._patience is None:
            loop = asyncio.get_running_loop()
            self._patience = loop.call_later(WRITING_MAX_S, self._lose_patience, watch)

    def _lose_patience(self, watch: Watch) -> None:
        names = ", ".join(sorted(path for path in watch.writing if self.source.concerns([path])))
        log.warning("%s: not closed by its writer for %g s; read as it is", names, WRITING_MAX_S)
        watch.writing.clear()
        self._all_written()

    def _all_written(self) -> None:
        self._written.set()
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    async def _settled(self) -> bool:
        """Wait until nobody writes what we would read; whether that took any time."""
        if self._watch is not None:
            self._changed(self._watch)
        if self._written.is_set():
            return False
        await self._written.wait()
        return True

    async def _reloading(self) -> None:
        while True:
            await self._reload.wait()
            await asyncio.sleep(COALESCE_S)
            self._reload.clear()
            await self.intent.load()
            trim()

    async def _follow(self) -> None:
        """What comes after a change, or after one that was refused."""
        await self._observe()
        notify(self._status())

    async def _observe(self) -> None:
        assert self.node.configuration is not None
        await self.metrics.follow(self.node.configuration.settings)

    async def _scanning(self) -> None:
        while True:
            began = time.monotonic()
            steps = self.node.scanner.steps(self.node.want, time.monotonic_ns)
            with contextlib.suppress(StopIteration):
                while True:
                    next(steps)
                    await asyncio.sleep(0)
            self.node.after_scan()
            took = time.monotonic() - began
            await asyncio.sleep(max(SCAN_EVERY_S, took * (1 / SCAN_SHARE - 1)))


def raise_file_limit() -> None:
    """As many files as are allowed: each health check under way has one, and the usual limit of
    1,024 is for programs that use select()."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@contextlib.contextmanager
def only_one(bpffs: Path):  # type: ignore[no-untyped-def]
    """Hold the pin directory against a second shuntd.

    Raises: ShuntError if there is one.
    """
    fd = os.open(bpffs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise ShuntError(
                f"another shuntd is running on {bpffs}",
                "two would overwrite each other's tables",
                "stop it (systemctl stop shuntd), or give this one its own --bpffs and --run",
            ) from e
        yield
    finally:
        os.close(fd)


@click.command()
@click.option("--config", type=Path, default=Path("/etc/shunt/shunt.yaml"), show_default=True)
@click.option("--services", type=Path, default=Path("/etc/shunt/services.d"), show_default=True)
@click.option("--bpffs", type=Path, default=Path("/sys/fs/bpf/shunt"), show_default=True)
@click.option("--run", type=Path, default=Path("/run/shunt"), show_default=True)
@click.option("--state", type=Path, default=Path("/var/lib/shunt"), show_default=True)
@click.option("--verbose", is_flag=True, help="Log what is done, not only what happens.")
def main(config: Path, services: Path, bpffs: Path, run: Path, state: Path, verbose: bool) -> None:
    """The load balancer's daemon. Packets go on while it is stopped."""
    log_to(logging.DEBUG if verbose else logging.INFO)

    async def start() -> None:
        await Daemon(config, services, bpffs, run, state).run()

    try:
        asyncio.run(start())
    except ShuntError as e:
        if to_journal():  # under systemd the journal is where one looks
            log.critical("%s", e)
        else:
            click.echo(f"shuntd: {e}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
