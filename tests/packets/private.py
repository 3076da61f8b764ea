# SPDX-License-Identifier: Apache-2.0
"""A network namespace without a name: it is gone when the function that ran in it returns."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

_CLONE_NEWNET = 0x40000000
T = TypeVar("T")

FORWARDING = {"ipv4/ip_forward": "1", "ipv6/conf/all/forwarding": "1"}


def in_namespace(
    function: Callable[[], T], ip: Sequence[str] = (), settings: dict[str, str] | None = None
) -> T:
    """Call it on a thread of its own, in a new namespace prepared by `ip` commands.

    BPF_PROG_TEST_RUN's packets come in on that namespace's loopback interface.
    Raises: what the function raises; RuntimeError if the namespace cannot be prepared.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            _prepare(ip, settings or {})
            results.append(function())
        except BaseException as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _prepare(ip: Sequence[str], settings: dict[str, str]) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        raise RuntimeError(f"no new network namespace: {os.strerror(ctypes.get_errno())}")
    commands = "\n".join(["link set dev lo up", *ip, ""])
    done = subprocess.run(
        ["ip", "-batch", "-"], input=commands, text=True, capture_output=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{done.stderr} in:\n{commands}")
    for name, value in settings.items():
        Path("/proc/sys/net", name).write_text(value)
    for command in ip:
        if command.startswith("address add ") and ":" in command:
            _wait_for_address(command.split()[2].partition("/")[0])


def _wait_for_address(address: str) -> None:
    """An IPv6 address is this host's only once the device's carrier has been noticed."""
    deadline = time.monotonic() + 5
    show = ["ip", "-6", "route", "get", address]
    while "local" not in subprocess.run(show, capture_output=True, text=True, check=False).stdout:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{address} does not become an address of the namespace")
        time.sleep(0.01)
