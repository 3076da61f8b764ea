# SPDX-License-Identifier: Apache-2.0
"""`sudo make demo`: Shunt on real traffic, and what is lost when things happen to it.

Exit code: 0 if nothing was lost that should not be; 1 if something was; 2 if the demo could not
run; 128 + the signal's number if it was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shunt.lab.scenario import SERVICES, dsr_vips, traffic_plan
from shunt.lab.script import Script
from shunt.lab.servers import running
from shunt.lab.shuntd import attach_decap, daemons
from shunt.lab.topology import Lab, remove_leftovers
from shunt.lab.traffic import Traffic
from shunt.lab.view import View
from shunt.lb.errors import ShuntError

PIPE_WIDTH = 120
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class InterruptedBySignal(BaseException):
    """Raised in the main thread by a signal, so that every context is left in order."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def interrupt(number: int, _frame: FrameType | None) -> None:
    ignore_signals()
    raise InterruptedBySignal(number)


def ignore_signals() -> None:
    """From here on it is only cleaned up, which a Ctrl-C must not stop half-way."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def main() -> int:
    arguments = parse()
    console = Console(highlight=False, emoji=False)
    if not console.is_terminal:
        console = Console(highlight=False, emoji=False, width=PIPE_WIDTH)
    for number in SIGNALS:
        signal.signal(number, interrupt)
    try:
        return run(console, stay=arguments.stay)
    except ShuntError as error:
        console.print(Text(str(error), style="red"))
        return 2
    except InterruptedBySignal as signalled:
        name = signal.Signals(signalled.number).name
        console.print(f"{name}: everything the demo made is removed")
        return 128 + signalled.number


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument(
        "--stay", action="store_true", help="after the script, stay up to be played with"
    )
    return parser.parse_args()


def run(console: Console, *, stay: bool) -> int:
    started_s = time.monotonic()
    for name in remove_leftovers():
        console.print(f"removed what a killed demo had left: {name}")
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab())
        view = View(console, lab)
        stack.enter_context(view.shown())
        script = prepare(stack, lab, view)
        script.run()
        if stay:
            keep_up(script, view, console)
        # Waits for what is under way: a request sent at the very end counts like any other.
        script.traffic.stop()
        script.judge()
        view.doing = ""
        ignore_signals()
    good = summary(console, view, time.monotonic() - started_s)
    return 0 if good else 1


def prepare(stack: contextlib.ExitStack, lab: Lab, view: View) -> Script:
    """Everything up and answering; what was started ends with the stack."""
    view.say(f"network namespaces {lab.name}-*: a client, a router, 2 load balancers, 4 backends")
    lab.add_vips(dsr_vips())
    servers = stack.enter_context(running(lab.backends, lab.directory))
    for host in lab.backends:
        attach_decap(lab, host)
        view.states[host.role] = "nginx"
    view.say(f"{len(servers)} backends: nginx, and an echo server for TCP and UDP")
    documents = [service.document(lab.backends) for service in SERVICES]
    started = stack.enter_context(daemons(lab, documents))
    for role, daemon in started.items():
        daemon.wait_up()
        view.states[role] = "shuntd"
    view.say(f"{len(started)} times shuntd, from {len(documents)} YAML files each")
    traffic = stack.enter_context(Traffic(lab.client, traffic_plan(), lab.directory))
    view.traffic = traffic
    traffic.wait_established()
    view.say(f"{len(traffic.live())} flows up, {', '.join(s.name for s in SERVICES)}")
    return Script(lab, servers, started, traffic, view)


def keep_up(script: Script, view: View, console: Console) -> None:
    """Until Ctrl-C, which is the way to end this and no failure."""
    lab = script.lab
    shunt = Path(sys.executable).with_name("shunt")
    daemon = next(iter(script.daemons.values()))
    vips = [str(s.vip) for s in SERVICES]
    for line in (
        "",
        "It stays up until Ctrl-C. Things to try, as root, in another terminal:",
        f"  nsenter --net={lab.client.path} curl http://{vips[0]}/ http://[{vips[1]}]/",
        f"  export SHUNT_SOCKET={daemon.run / 'shunt.sock'}",
        f"  {shunt} status",
        f"  {shunt} service show {SERVICES[0].name}",
        f"  {shunt} backend list",
        f"  {shunt} backend undrain {lab.backends[1].address4}",
        f"  {shunt} monitor --type drop",
        f"  $EDITOR {daemon.services / SERVICES[0].name}.yaml    # it is watched",
        f"  nsenter --net={lab.backends[0].namespace.path} tcpdump -ni eth0 port 80",
        "",
    ):
        console.print(line, highlight=False, soft_wrap=True)
    view.doing = "up until Ctrl-C"
    with contextlib.suppress(InterruptedBySignal):
        while True:
            time.sleep(1)
            script.traffic.check()


def summary(console: Console, view: View, took_s: float) -> bool:
    """The steps side by side, and the verdict. True if it is good."""
    table = Table(title="what each step cost", title_justify="left", box=None, padding=(0, 1))
    table.add_column("step")
    for name in ("requests", "lost", "flows", "lost"):
        table.add_column(name, justify="right")
    table.add_column("counted apart")
    apart: Counter[str] = Counter()
    for step in view.steps:
        apart += step.excused
        named = ", ".join(f"{n} {name}" for name, n in sorted(step.excused.items()))
        table.add_row(
            step.title,
            str(step.requests),
            str(step.lost_requests),
            str(step.flows_before),
            str(step.lost_flows),
            named,
        )
    console.print(table)
    good = all(step.good for step in view.steps)
    requests = sum(step.requests for step in view.steps)
    console.print(
        Text(
            f"{requests} requests and {view.steps[0].flows_before} flows in {took_s:.0f} s: "
            + (
                "nothing was lost that should not be"
                if good
                else "something was lost, or not as it should be"
            ),
            style="bold green" if good else "bold red",
        )
    )
    if apart:
        console.print("counted apart: " + ", ".join(f"{n} {name}" for name, n in apart.items()))
    return good


if __name__ == "__main__":
    sys.exit(main())
