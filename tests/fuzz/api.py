# SPDX-License-Identifier: Apache-2.0
"""schemathesis against the OpenAPI document of a real shuntd: what `make fuzz-api` runs.

```
    schemathesis -- TCP, loopback -- bridge -- shunt.sock -- shuntd in a namespace
```

It fails on an answer that the document does not know, on a defect (500), on input that is accepted
and should not be, and if the daemon has ended, has lost a service of its files, or has errors
afterwards. Streams do not end, so they are left out.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click
import yaml

from shunt.agent.openapi import ROUTES
from shunt.cli.client import Client
from tests.netns.shunt_host import SERVICES, SETTINGS, a_host

POOLS = {"public": ["203.0.113.64/28"], "public6": ["2001:db8:f::/64"]}
# Valid by its schema and yet refused is what names, addresses and generations are about.
LEFT_OUT = "positive_data_acceptance"
TIMEOUT_S = 30
# A precondition that does not hold is looked at before the body is (RFC 9110, 13.2.1).
REFUSALS = """
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 406, 409, 412, 413, 415, 422, 428, 429, "5xx"]
"""


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextmanager
def bridge(path: Path) -> Iterator[int]:
    """A TCP port of the loopback that leads to a Unix socket."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):
            while True:
                outer, _ = listening.accept()
                inner = socket.socket(socket.AF_UNIX)
                inner.connect(os.fspath(path))
                for ends in ((outer, inner), (inner, outer)):
                    threading.Thread(target=_pump, args=ends, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield listening.getsockname()[1]
    finally:
        listening.close()


def _command(port: int, examples: int, seed: int | None) -> list[str]:
    program = Path(sys.executable).with_name("schemathesis")
    streams = [path for (_, path), route in ROUTES.items() if route.stream]
    return [
        *(str(program), "run", f"http://127.0.0.1:{port}/v1/openapi.json"),
        *("--checks", "all", "--exclude-checks", LEFT_OUT, "--continue-on-failure"),
        *(word for path in streams for word in ("--exclude-path", path)),
        *("--max-examples", str(examples), "--request-timeout", str(TIMEOUT_S)),
        *(("--seed", str(seed)) if seed is not None else ()),
        *("--warnings", "off"),
    ]


@click.command()
@click.option("--examples", default=100, show_default=True, help="For each operation.")
@click.option("--seed", type=int, help="To see the same again.")
def main(examples: int, seed: int | None) -> None:
    """Fuzz the local API of a real shuntd."""
    # Also who is ended leaves no namespace behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with a_host("fuzz") as host:
        host.config.write_text(yaml.safe_dump({**SETTINGS, "pools": POOLS}))
        host.start()
        (host.directory / "schemathesis.toml").write_text(REFUSALS)
        with bridge(host.sock) as port:
            # It keeps examples where it stands; the daemon's directory goes when all is done.
            status = subprocess.run(
                _command(port, examples, seed), cwd=host.directory, check=False
            ).returncode
        wrong = []
        if host.process is None or not host.process.running:
            wrong.append("shuntd has ended")
        else:
            client = Client(host.sock)
            found = {s["name"]: s["origin"] for s in client.get("services")["services"]}
            if lost := [n for n in SERVICES if not found.get(n, "").startswith("/")]:
                wrong.append(f"services of files are gone: {', '.join(lost)}")
            if errors := client.get("errors")["errors"]:
                wrong.append(f"the configuration has errors: {errors}")
    for line in wrong:
        print(f"fuzz-api: {line}", file=sys.stderr)
    sys.exit(1 if status or wrong else 0)


if __name__ == "__main__":
    main()
