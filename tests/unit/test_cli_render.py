# SPDX-License-Identifier: Apache-2.0
"""What the command prints: rows for a pipe, and the same fitted to a terminal."""

import os
import pty
import sys
from collections.abc import Callable
from datetime import datetime

import pytest

from shunt.cli import render
from shunt.cli.monitor import line

V6 = "2001:db8:1234:5678:9abc:def0:1234:5678"


def test_a_table_for_a_pipe_keeps_each_row_on_a_line() -> None:
    rows = [["web", V6 * 5, 7], ["a-long-name", "", 1234]]
    shown = render.table(["NAME", "VIP", "PACKETS"], rows, right=["PACKETS"]).splitlines()
    assert len(shown) == 3
    assert shown[1].split() == ["web", V6 * 5, "7"]
    assert shown[2].split() == ["a-long-name", "-", "1234"]
    assert len({len(text) for text in shown}) == 1
    assert shown[0].startswith("NAME         VIP  ")
    assert all(text == text.rstrip() for text in shown)


def test_an_empty_table_is_its_header() -> None:
    assert render.table(["A", "B"], []) == "A  B"


def on_a_terminal(show: Callable[[], None], columns: int) -> str:
    """What `show` prints when standard output is a terminal of this width."""
    parent, child = pty.openpty()
    before, environment = sys.stdout, dict(os.environ)
    os.environ.update(COLUMNS=str(columns), TERM="xterm-256color")
    os.environ.pop("NO_COLOR", None)
    try:
        with os.fdopen(child, "w") as terminal:
            sys.stdout = terminal
            show()
            terminal.flush()
            return os.read(parent, 65536).decode()
    finally:
        sys.stdout = before
        os.environ.clear()
        os.environ.update(environment)
        os.close(parent)


def test_a_terminal_gets_colours_and_its_width() -> None:
    def show() -> None:
        render.print_table(["NAME", "STATE", "VIP"], [["web", "failing", V6], ["b", "up", ""]])

    shown = on_a_terminal(show, 40)
    assert "\x1b[" in shown
    plain = "".join(shown.replace("\x1b[", "\0").split("\0")[:1])  # before the first colour
    assert plain == ""
    wide = on_a_terminal(show, 120)
    assert V6 in wide
    # Folded, not cut: every part of the address is there.
    assert "…" not in shown
    assert all(part in shown.replace("\r\n", "") for part in ("2001:db8", "5678"))


def test_what_looks_like_markup_is_printed_as_it_is() -> None:
    shown = on_a_terminal(lambda: render.print_table(["NAME"], [["[red]x[/red]"]]), 80)
    assert "[red]x[/red]" in shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1550, "1.6 kB"), (99_949, "99.9 kB"),
     (123_456, "123 kB"), (999_499, "999 kB"), (999_999, "1.0 MB"), (10**15, "1.0 PB"),
     (12 * 10**18, "12,000 PB")],
)  # fmt: skip
def test_sizes(value: int, shown: str) -> None:
    assert render.size(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0.0 %"), (1e-6, "< 0.1 %"), (0.001, "0.1 %"), (0.25, "25.0 %"), (0.9995, "> 99.9 %"),
     (1.0, "100.0 %")],
)  # fmt: skip
def test_shares_are_not_rounded_to_all_or_nothing(value: float, shown: str) -> None:
    assert render.percent(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (61, "1 min 1 s"), (3661, "1 h 1 min"),
     (47 * 3600, "47 h 0 min"), (50 * 3600, "2 d 2 h")],
)  # fmt: skip
def test_durations(seconds: float, shown: str) -> None:
    assert render.duration(seconds) == shown


def test_endpoints_names_and_numbers() -> None:
    assert render.endpoint("10.0.0.1", 80) == "10.0.0.1:80"
    assert render.endpoint("2001:db8::1", 80) == "[2001:db8::1]:80"
    assert render.endpoint("2001:db8::1", None) == "2001:db8::1"
    assert render.label("DROP_NO_BACKEND") == "drop-no-backend"
    assert (render.number(1234567), render.number(None)) == ("1,234,567", "-")
    assert (render.count(1, "services"), render.count(2, "services")) == ("1 service", "2 services")


SAMPLE = {
    "time": 1700000000.1234,
    "reason": "DROP_NO_BACKEND",
    "interface": "eth0",
    "service": "web",
    "backend": "",
    "bytes": 54,
}


def test_a_sample_in_a_line() -> None:
    tcp = {
        **SAMPLE,
        "source": "192.0.2.1",
        "destination": "203.0.113.10",
        "protocol": "tcp",
        "source_port": 4242,
        "destination_port": 80,
        "tcp_flags": ["rst", "ack"],
    }
    at = datetime.fromtimestamp(SAMPLE["time"]).astimezone().strftime("%H:%M:%S")  # type: ignore[arg-type]
    assert line(tcp) == (
        f"{at}.123 drop-no-backend eth0 tcp 192.0.2.1:4242 > 203.0.113.10:80 rst,ack 54 bytes"
        " service web"
    )
    assert line(SAMPLE) == f"{at}.123 drop-no-backend eth0 54 bytes service web"
