# SPDX-License-Identifier: Apache-2.0
"""What all tests share: hypothesis' profile, and skips that nobody expected fail the run."""

import os
import platform
import resource
import signal
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import yaml
from hypothesis import settings

# A shell that starts tests in the background has them, and whatever they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# A run that is told to end takes its namespaces, pins and processes along.
signal.signal(signal.SIGTERM, signal.default_int_handler)

# What is loaded is some ninety maps and programs, a descriptor each, and tests keep a few of it;
# others want thousands of sockets. A shell's limit may be 1024. (The daemon raises its own, too.)
SOFT, HARD = resource.getrlimit(resource.RLIMIT_NOFILE)
DESCRIPTORS = max(8192, SOFT)
if SOFT < DESCRIPTORS:
    resource.setrlimit(resource.RLIMIT_NOFILE, (DESCRIPTORS, max(DESCRIPTORS, HARD)))

EXPECTED = Path(__file__).parent / "expected_skips.yaml"

# The same examples in every run: a failure in someone's change is that change's. To look for
# new ones: SHUNT_HYPOTHESIS=explore.
settings.register_profile("shunt", max_examples=50, database=None, deadline=None, derandomize=True)
settings.register_profile("explore", database=None, deadline=None, max_examples=2000)
# On emulated processors: what is tried there is the kernel, not what a program does with numbers.
settings.register_profile("guest", settings.get_profile("shunt"), max_examples=10)
settings.load_profile(os.environ.get("SHUNT_HYPOTHESIS", "shunt"))
# For the same reason a guest runs one set of parameters of each test, and this is its number:
# guests of other numbers run others. Empty: all.
GUEST = os.environ.get("SHUNT_GUEST", "")


def case_of(test: str, total: int, guest: int) -> int:
    """Which of a test's sets of parameters a guest takes: drawn by the test's name, so that each
    guest has some of each kind; the next guest's is half of them further."""
    return (zlib.crc32(test.encode()) + guest * max(1, total // 2)) % total


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not GUEST:
        return
    tests: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    taken = {cases[case_of(test, len(cases), int(GUEST))] for test, cases in tests.items()}
    config.hook.pytest_deselected(items=[item for item in items if item not in taken])
    items[:] = [item for item in items if item in taken]


def unexpected_skips(
    skips: Mapping[str, str], release: str, expected: Mapping[str, Sequence[str]]
) -> list[str]:
    """Skips that `expected` does not allow on this kernel.

    Shape:  `skips` maps a test's id to its reason; `expected` maps the beginning of a kernel
            release to the features it lacks. A reason reads "needs FEATURE" or
            "needs FEATURE: why", FEATURE being a probe that `shunt doctor` shows.
    """
    known = [beginning for beginning in expected if _is_series(release, beginning)]
    allowed = set(expected[max(known, key=len)]) if known else set()
    wrong = []
    for test, reason in skips.items():
        needs, _, feature = reason.partition(":")[0].partition(" ")
        if needs != "needs" or feature not in allowed:
            wrong.append(f"{test}: {reason}")
    return wrong


def _is_series(release: str, beginning: str) -> bool:
    """6.1 is the series of 6.1.0-37-amd64, and not that of 6.12.9."""
    return release == beginning or release.startswith((beginning + ".", beginning + "-"))


class _Skips:
    """Collects what was skipped, and turns the run red when that was not expected."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            text = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            self.reasons[report.nodeid] = text.removeprefix("Skipped: ")

    def wrong(self) -> list[str]:
        expected = yaml.safe_load(EXPECTED.read_text())
        return unexpected_skips(self.reasons, platform.release(), expected)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if session.exitstatus == pytest.ExitCode.OK and self.wrong():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if wrong := self.wrong():
            terminalreporter.section("skips that were not expected", red=True)
            terminalreporter.line(f"kernel {platform.release()}; {EXPECTED.name} allows none of:")
            for line in wrong:
                terminalreporter.line(f"  {line}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_Skips(), "shunt-skips")
