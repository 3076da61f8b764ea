# SPDX-License-Identifier: Apache-2.0
"""Who sends requests at a constant rate: sockperf and our own generator, or wrk2.

A client that waits for an answer before it asks again asks less while the server is slow, and so
leaves out what it should have seen (coordinated omission). Those here have a request for each tick
of a clock, and begin a latency at the tick.

sockperf asks on one kept connection; perf/sockperf.py reads what it says. On several it is not
exact, and nobody offers what opens a connection at each tick: that is perf/socket_paced.c.

`WRK2=PATH` names wrk2. It asks a real nginx, and begins a request up to a millisecond and a half
after its tick, as it sleeps in whole milliseconds; that stands in its latencies. Its first ten
seconds calibrate.
"""

from __future__ import annotations

import math
import os
import random
import re
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Protocol

from perf import sockperf
from perf.fleet import FIRST, VIPS
from perf.socket_ways import BACKENDS, BUILD, PATIENCE_S, PORT, Way
from shunt.lab.netns import Process
from shunt.lab.servers import NGINX
from shunt.lb.errors import ShuntError

OWN, SOCKPERF, WRK2 = "perf/socket_paced.c", "sockperf", "wrk2"
# Requests a second, by kept connections (0: one for each); few enough for the dearest way.
RATES = {1: 10_000, 32: 10_000, 0: 2000}
WRK2_RATES = {1: 500, 32: 2000, 0: 500}  # a connection that sleeps asks no faster
WRK2_CALIBRATES_S = 11.0
WRK2_CONNECTIONS = 16  # where each is for one request
MESSAGE = 64  # bytes, as perf/socket_client.h has it
SOCKPERF_UNMEASURED_S = 0.55  # of its beginning and its end
UNITS_US = {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 60e6}


@dataclass(frozen=True)
class Latency:
    """From when a request was due until it was answered. Units: microseconds."""

    p50: float
    p99: float
    p999: float


class Generator(Protocol):
    """Sends requests at a constant rate."""

    name: str

    def latency(self, way: Way, kept: int, seconds: float) -> Latency:
        """Of requests on so many kept connections, or on one for each if `kept` is 0.

        Raises: ShuntError if not all were answered as they should be.
        """


class Own:
    """perf/socket_paced.c against perf/socket_server.c."""

    name = OWN

    def latency(self, way: Way, kept: int, seconds: float) -> Latency:
        with way.serving([str(BUILD / "socket_server"), str(PORT)]):
            did = way.paced(seconds, RATES[kept], kept)
        return Latency(did.p50_us, did.p99_us, did.p999_us)


class Sockperf:
    """sockperf against its own server on one kept connection; Own in the other cases.

    Of several connections it leaves out answers that another's have overtaken: the slow ones.
    """

    name = f"{SOCKPERF}, {OWN}"

    def latency(self, way: Way, kept: int, seconds: float) -> Latency:
        if kept != 1:
            return Own().latency(way, kept, seconds)
        log, there, asked = (way.directory / f"sockperf.{end}" for end in ("csv", "pods", "node"))
        first, addresses = way.asked
        asked.write_text(f"T:{IPv4Address(first) + random.randrange(addresses)}:{PORT}\n")
        there.write_text(f"T:0.0.0.0:{PORT}\n")
        argv = [SOCKPERF, "under-load", "-f", str(asked), "-Fe", "--full-log", str(log)]
        argv += ["--mps", str(RATES[kept]), "-t", str(math.ceil(seconds + SOCKPERF_UNMEASURED_S))]
        argv += ["-m", str(MESSAGE), "--reply-every", "1", "--full-rtt"]
        argv += ["--sender-affinity", str(way.client_cpu)]
        argv += ["--receiver-affinity", str(way.server_cpu)]
        with way.serving([SOCKPERF, "server", "-f", str(there), "-Fe"]):
            said = way.client(*argv)
        found = sockperf.latencies_us(log.read_text(), said, RATES[kept])
        return Latency(*(sockperf.quantile(found, part) for part in (0.5, 0.99, 0.999)))


class Wrk2:
    """wrk2 against nginx."""

    name = WRK2

    def __init__(self, path: str) -> None:
        """Raises: ShuntError if there is no such program."""
        if not Path(path).is_file() or not os.access(path, os.X_OK):
            raise ShuntError(
                f"WRK2={path} is no program",
                "it names the wrk2 that sends the requests",
                "give its path, or leave WRK2 out: then sockperf sends them",
            )
        self.path = path

    def latency(self, way: Way, kept: int, seconds: float) -> Latency:
        middle = way.services // 2
        address = FIRST + middle * BACKENDS if way.kind == "direct" else VIPS + middle
        argv = [self.path, "--latency", "-t1", f"-c{kept or WRK2_CONNECTIONS}"]
        argv += [f"-R{WRK2_RATES[kept]}", f"-d{round(WRK2_CALIBRATES_S + seconds)}s"]
        argv += [] if kept else ["-H", "Connection: close"]
        with nginx(way):
            return wrk2_latency(
                way.client(*argv, f"http://{address}:{PORT}/", timeout_s=PATIENCE_S)
            )


def nginx(way: Way) -> AbstractContextManager[Process]:
    """A real one among a way's pods."""
    directory = way.directory
    config = directory / "nginx.conf"
    config.write_text(NGINX.format(directory=directory, port=PORT, name="pod"))
    log = str(directory / "nginx-error.log")
    return way.serving(["nginx", "-p", str(directory), "-c", str(config), "-e", log])


def wrk2_latency(text: str) -> Latency:
    """What wrk2 printed.

    Raises: ShuntError if a request failed, or it says nothing of latencies.
    """
    errors = re.findall(r"^ *(Socket errors|Non-2xx or 3xx responses): (.*)", text, re.MULTILINE)
    if any(number != "0" for _, said in errors for number in re.findall(r"\d+", said)[:4]):
        raise ShuntError("wrk2: requests failed", str(errors), "see the server's log")
    of = {
        percentile: float(number) * UNITS_US[unit]
        for percentile, number, unit in re.findall(
            r"^ *(50\.000|99\.000|99\.900)% +([0-9.]+)(us|ms|s|m)\b", text, re.MULTILINE
        )
    }
    if len(of) != 3:
        raise ShuntError("wrk2 says nothing of latencies", text[-500:], "is WRK2 wrk2, not wrk?")
    return Latency(of["50.000"], of["99.000"], of["99.900"])


def chosen() -> Generator:
    """wrk2 if the environment names it, else sockperf if it is installed.

    Raises: ShuntError if what it names is no program.
    """
    if path := os.environ.get("WRK2"):
        return Wrk2(path)
    return Sockperf() if shutil.which(SOCKPERF) else Own()
