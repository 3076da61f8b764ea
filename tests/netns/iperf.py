# SPDX-License-Identifier: Apache-2.0
"""iperf3 between two namespaces, by way of a VIP."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from shunt.lab.netns import Namespace

LISTEN = 5201
TRANSFERS = pytest.mark.parametrize(
    "options", [("-n", "20M"), ("-u", "-b", "20M", "-n", "2M", "-l", "1200")]
)


def measure(
    client: Namespace, server: Namespace, log: Path, vip: str, port: int, *options: str
) -> Any:
    """What the client has to say in the end, of a test against a server of its own."""
    log.unlink(missing_ok=True)
    serving = server.start(["iperf3", "-s", "-1", "-p", str(LISTEN), "--forceflush"], log)
    try:
        deadline = time.monotonic() + 30
        while "listening" not in serving.log_tail():
            assert time.monotonic() < deadline, "iperf3 does not listen"
            time.sleep(0.02)
        done = client.run("iperf3", "-J", "-c", vip, "-p", str(port), *options, check=False)
    finally:
        serving.stop()
    said = json.loads(done.stdout)
    assert "error" not in said, said["error"]
    return said["end"]


def arrives(
    client: Namespace, server: Namespace, log: Path, vip: str, port: int, *options: str
) -> None:
    """One of TRANSFERS does."""
    said = measure(client, server, log, vip, port, *options)
    if "-u" in options:
        assert said["sum"]["lost_packets"] < said["sum"]["packets"] / 10
    else:
        assert said["sum_received"]["bytes"] >= 0.5 * said["sum_sent"]["bytes"] >= 0.5 * (20 << 20)
