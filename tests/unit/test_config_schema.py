# SPDX-License-Identifier: Apache-2.0
"""The JSON Schema for editors, held against what the program itself takes and refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from shunt.cli.main import run
from tests.unit.config_files import errors

TEXT = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text()
EXAMPLES = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)]


def schema(capsys: pytest.CaptureFixture[str], *options: str) -> Any:
    assert run(["config", "schema", *options]) == 0
    return jsonschema_rs.validator_for(json.loads(capsys.readouterr().out))


def test_the_examples_of_the_documents_are_valid(capsys: pytest.CaptureFixture[str]) -> None:
    node, services = schema(capsys), schema(capsys, "--services")
    assert len(EXAMPLES) > 4
    for example in EXAMPLES:
        is_node = isinstance(example, dict) and "interfaces" in example
        (node if is_node else services).validate(example)


WRONG = [
    {"name": "web", "vip": "203.0.113.1"},
    {"name": "Web", "vip": "203.0.113.1", "ports": [80]},
    {"name": "web", "vip": [], "ports": [80]},
    {"name": "web", "vip": "203.0.113.1", "ports": [0]},
    {"name": "web", "vip": "203.0.113.1", "ports": [80], "backend": []},
    {"name": "web", "vip": "203.0.113.1", "ports": [80], "mode": "dsr"},
    {"name": "web", "vip": "203.0.113.1", "ports": [80], "backends": [{"weight": 1}]},
]


@pytest.mark.parametrize("service", WRONG)
def test_what_it_refuses_the_program_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], service: dict[str, Any]
) -> None:
    assert not schema(capsys, "--services").is_valid(service)
    assert errors(tmp_path, web=yaml.safe_dump(service))


def test_pools_have_names_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    node = schema(capsys)
    assert node.is_valid({"interfaces": ["eth0"], "pools": {"public": "10.0.0.0/24"}})
    assert not node.is_valid({"interfaces": ["eth0"], "pools": {"Public": "10.0.0.0/24"}})
    assert not node.is_valid({"interfaces": ["eth0"], "pools": {"public": []}})


@pytest.mark.parametrize(
    ("shell", "wants"), [("bash", "complete -o"), ("zsh", "#compdef shunt"), ("fish", "complete")]
)
def test_completion(capsys: pytest.CaptureFixture[str], shell: str, wants: str) -> None:
    assert run(["completion", shell, "-o", "json"]) == 2
    assert "no JSON" in capsys.readouterr().err
    assert run(["completion", shell]) == 0
    assert wants in capsys.readouterr().out


def test_a_shell_is_told_what_completes() -> None:
    """As the printed script asks: the command itself, with words in its environment."""
    done = subprocess.run(
        [sys.executable, "-m", "shunt.cli.main"],
        env={
            "PYTHONPATH": "build/py",
            "_SHUNT_COMPLETE": "bash_complete",
            "COMP_WORDS": "shunt service a",
            "COMP_CWORD": "2",
        },
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["plain,add"]
