# SPDX-License-Identifier: Apache-2.0
"""docs/configuration.md says what the program does: every key, its default, and its examples."""

import re
from pathlib import Path
from typing import Any

import pytest
from msgspec import NODEFAULT, Struct, UnsetType

from shunt.agent.sources.file import load
from shunt.agent.sources.kinds import fields_of, kinds_of
from shunt.agent.sources.shape import BackendEntry, ServiceEntry, SettingsFile
from shunt.cli.main import run

DOCS = Path(__file__).parents[2] / "docs"
TEXT = (DOCS / "configuration.md").read_text()
CaptureFixture = pytest.CaptureFixture[str]
HEADER = "| Key | Default |"


def documented(section: str) -> dict[str, str]:
    """Keys and defaults of the table below a heading."""
    table = TEXT.partition(f"# {section}\n")[2].partition(HEADER)[2].partition("\n\n")[0]
    rows = (re.match(r"\| `([a-z0-9_.]+)` \| ([^|]*) \|", line) for line in table.splitlines())
    return {row[1]: row[2] for row in rows if row}


def declared(shape: type[Struct], prefix: str = "") -> dict[str, Any]:
    """Keys and defaults of a Struct; those of a mapping in it as KEY.KEY."""
    found: dict[str, Any] = {}
    for key, field in fields_of(shape).items():
        kinds = kinds_of(field.type)
        if not kinds.mapping or kinds.scalar:
            found[prefix + key] = "required" if field.required else default(field)
        if kinds.mapping:
            found |= declared(kinds.mapping, f"{prefix}{key}.")
    return found


def default(field: Any) -> Any:
    return field.default_factory() if field.default is NODEFAULT else field.default


@pytest.mark.parametrize(
    ("section", "shape"),
    [
        ("The node: shunt.yaml", SettingsFile),
        ("A service: services.d/*.yaml", ServiceEntry),
        ("Backends", BackendEntry),
    ],
)
def test_every_key_is_documented_with_its_default(section: str, shape: type[Struct]) -> None:
    told, true = documented(section), declared(shape)
    assert list(told) == list(true)
    for key, value in true.items():
        if isinstance(value, UnsetType):
            continue  # depends on something else, which the table says in words
        words = {"required": "required", "[]": "none", "{}": "none"}
        plain = f"{value:g}s" if isinstance(value, float) else str(value)
        assert told[key] == words.get(str(value), f"`{plain}`"), key


def test_the_examples_load(tmp_path: Path) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 12
    settings = [block for block in blocks if "interfaces:" in block]
    services = [block for block in blocks if "interfaces:" not in block]
    services_d = tmp_path / "services.d"
    services_d.mkdir()
    for at, setting in enumerate(settings):
        (tmp_path / "shunt.yaml").write_text(setting)
        for service in services:
            (services_d / "web.yaml").write_text(service)
            # The mode of the node is that of a service which names none; nat refuses the mixture.
            if at == 1 and "shop/web" in service:
                continue
            if "pool/" in service and "pools:" not in setting:
                continue
            assert load(tmp_path / "shunt.yaml", services_d).services


def test_the_example_of_an_error_is_real(tmp_path: Path) -> None:
    (tmp_path / "shunt.yaml").write_text("interfaces: [eth0]\n")
    (tmp_path / "services.d").mkdir()
    text = "name: web\nvip: 203.0.113.10\nports: [80, 443]\nbackends: ['10.0.0.300:80']\n"
    (tmp_path / "services.d" / "web.yaml").write_text(text)
    with pytest.raises(Exception, match="not an address") as raised:
        load(tmp_path / "shunt.yaml", tmp_path / "services.d")
    assert str(raised.value).replace(str(tmp_path), "/etc/shunt") in TEXT


def test_what_config_check_prints_is_real(tmp_path: Path, capsys: CaptureFixture) -> None:
    (tmp_path / "shunt.yaml").write_text("interfaces: [eth0]\n")
    (tmp_path / "services.d").mkdir()
    text = "name: shop\nvip: 203.0.113.300\nports: [80]\n"
    text += "backend: [10.0.0.1]\nbackends: [10.0.0.1]\n"
    (tmp_path / "services.d" / "shop.yaml").write_text(text)
    places = ["--config", tmp_path / "shunt.yaml", "--services", tmp_path / "services.d"]
    assert run(["config", "check", *map(str, places)]) != 0
    said = "".join(capsys.readouterr()).replace(str(tmp_path), "/etc/shunt")
    assert f"$ shunt config check\n{said}```" in (DOCS / "cli.md").read_text()
