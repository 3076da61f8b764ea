# SPDX-License-Identifier: Apache-2.0
"""iperf3 between two namespaces, by way of a VIP."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from shunt.lab.netns import Namespace

LISTEN = 5201


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
