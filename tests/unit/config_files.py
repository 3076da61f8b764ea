# SPDX-License-Identifier: Apache-2.0
"""What tests of wrong configurations share: writing files, and the errors as one reads them."""

from pathlib import Path

from shunt.agent.sources.file import ConfigErrors, load

SETTINGS = "interfaces: [eth0]\n"
# Line 1 is the name, 2 the vip, 3 the ports; the case under test begins at line 4.
SERVICE = "name: web\nvip: 203.0.113.10\nports: [80]\n"


def errors(place: Path, settings: str = SETTINGS, **services: str) -> list[str]:
    """The texts of all errors, with names of files relative to `place`."""
    (place / "shunt.yaml").write_text(settings)
    (place / "services.d").mkdir(exist_ok=True)
    for name, text in services.items():
        (place / "services.d" / f"{name}.yaml").write_text(text)
    return load_errors(place)


def load_errors(place: Path) -> list[str]:
    try:
        load(place / "shunt.yaml", place / "services.d")
    except ConfigErrors as raised:
        return [
            str(error).replace(f"{place}/services.d/", "").replace(f"{place}/", "")
            for error in raised.errors
        ]
    return []


def three(what: str, why: str, fix: str) -> str:
    return f"{what}\n  why: {why}\n  fix: {fix}"
