# SPDX-License-Identifier: Apache-2.0
"""No secret gets through, whatever a file looks like; and what is none stays readable."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from shunt.agent.redact import HIDDEN, hides, redact_text, redact_yaml

SETTINGS = """\
# the old password: swordfish
interfaces: [eth0]
hash_seed: 0x5eed  # equal on all nodes
metrics: {listen: "127.0.0.1:9961"}
"""
SERVICE = """\
- name: shop/web
  vip: 203.0.113.10
  backends:
    - {address: 10.0.0.1, port: 80}
  health:
    type: http
    headers:
      Authorization: Bearer swordfish
      X-Trace: swordfish
    body: |
      {"user": "swordfish"}
      more
    port: 8080
  exec: [/usr/bin/check, --pin, swordfish]
  url: https://admin:swordfish@example.org/path
"""


def test_a_configuration_without_its_secrets() -> None:
    found = redact_yaml(SETTINGS)
    assert "swordfish" not in found
    assert "0x5eed" not in found
    assert f"hash_seed: {HIDDEN}  # equal on all nodes" in found
    assert "interfaces: [eth0]" in found
    assert 'metrics: {listen: "127.0.0.1:9961"}' in found


def test_a_service_without_its_secrets() -> None:
    found = redact_yaml(SERVICE)
    assert "swordfish" not in found
    assert yaml.safe_load(found) == [
        {
            "name": "shop/web",
            "vip": "203.0.113.10",
            "backends": [{"address": "10.0.0.1", "port": 80}],
            "health": {"type": "http", "headers": HIDDEN, "body": HIDDEN, "port": 8080},
            "exec": HIDDEN,
            "url": f"https://{HIDDEN}@example.org/path",
        }
    ]


@pytest.mark.parametrize(
    "text",
    [
        "a: &p swordfish\npassword: *p\n",
        "password: &p [swordfish]\nb: *p\n",
        "x: &x {k: swordfish}\nheaders:\n  - *x\n",
        "{hash_seed:\nswordfish}\n",
        "password: >-\n  sword\n\n  swordfish\nb: 1\n",
        "? password\n: swordfish\n",
        "a: 1\n---\ntoken: swordfish\n",
        "a: [b\npassword: swordfish\n",
        "a: [b\n- what: swordfish\n  swordfish\n",
        "- " * 3000 + "password: swordfish",
        "a: 'it''s'\n# token=swordfish\n",
        "a: x://u:swordfish@h\n",
        "\tpassword: swordfish",
    ],
)
def test_secrets_in_odd_places(text: str) -> None:
    assert "swordfish" not in redact_yaml(text)


HARMLESS = ("name", "vip", "ports", "monkey", "passive", "backends", "interval", "type", "address")
SECRET = (
    "password",
    "hash_seed",
    "headers",
    "api_key",
    "X-Auth-Token",
    "Cookie",
    "private",
    "argv",
)
leaves = st.one_of(st.integers(0, 9), st.booleans(), st.text("ab :#'\"{}[]\n-", max_size=12))
secrets = st.recursive(
    st.text("ab :#'\"{}[]\n-", max_size=8).map(lambda t: f"{t}swordfish{t}"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner),
    max_leaves=4,
)


@st.composite
def documents(draw: st.DrawFn, depth: int = 0) -> Any:
    if depth == 3 or draw(st.booleans()):
        return draw(leaves)
    if draw(st.booleans()):
        return [draw(documents(depth=depth + 1)) for _ in range(draw(st.integers(0, 3)))]
    keys = draw(st.lists(st.sampled_from(HARMLESS + SECRET), max_size=4, unique=True))
    return {k: draw(secrets if k in SECRET else documents(depth=depth + 1)) for k in keys}


def hidden(document: Any) -> Any:
    if isinstance(document, dict):
        return {k: HIDDEN if hides(k) else hidden(v) for k, v in document.items()}
    return [hidden(part) for part in document] if isinstance(document, list) else document


@given(documents(), st.sampled_from([True, False, None]), st.sampled_from([20, 80, 10_000]))
def test_no_document_tells_a_secret(document: Any, flow: bool | None, width: int) -> None:
    text = yaml.safe_dump(document, default_flow_style=flow, width=width)
    found = redact_yaml(text)
    assert "swordfish" not in found
    assert yaml.safe_load(found) == hidden(document) or "#" in text or "://" in text


def test_names_that_hide_and_names_that_do_not() -> None:
    assert all(hides(name) for name in SECRET)
    assert not any(hides(name) for name in HARMLESS)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("GET / Authorization: Basic c3dvcmQ=", f"GET / Authorization: {HIDDEN}"),
        ("it used bearer abcdefghij twice", f"it used bearer {HIDDEN} twice"),
        ("see https://u:p@h/x and y", f"see https://{HIDDEN}@h/x and y"),
        ("refused: hash_seed: 5 is", f"refused: hash_seed: {HIDDEN}"),
        ("-----BEGIN PRIVATE KEY-----\nabc\n-----END PRIVATE KEY-----\nz", f"{HIDDEN}\nz"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc", HIDDEN),
        ("backend 10.0.0.1 of service web is down: port 80", None),
        ('shunt_packets_total{reason="pass_not_ip"} 1.0', None),
        ('  "weight": 1,', None),
    ],
)
def test_text(text: str, shown: str | None) -> None:
    assert redact_text(text) == (text if shown is None else shown)
