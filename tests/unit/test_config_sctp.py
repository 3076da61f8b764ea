# SPDX-License-Identifier: Apache-2.0
"""Services of SCTP: which there can be, and what cannot be done for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from shunt.agent.sources.file import load
from shunt.agent.translating import needed
from shunt.lb.model import ANY_PORT, Mode, Port, Protocol
from tests.unit.config_files import errors, three

NAT = "name: a\nvip: 203.0.113.10\nmode: nat\n"
MISTAKES = {
    "a backend's own port for SCTP": (
        NAT + "ports: 3868/sctp\nbackends: ['10.0.0.2:3868', '10.0.0.3:3869']\n",
        "5: backend 10.0.0.3:3869 has another port than 3868/sctp",
        "SCTP's checksum covers the ports and cannot be corrected for others",
        "let the backend serve 3868 and remove its port here",
    ),
    "a backend's own port for every one of SCTP": (
        NAT + "ports: any/sctp\nbackends: ['10.0.0.3:3869']\n",
        "5: backend 10.0.0.3:3869 has another port than any/sctp",
        "SCTP's checksum covers the ports and cannot be corrected for others",
        "let the backend serve every port and remove its port here",
    ),
    "SCTP in Geneve": (
        "name: web\nvip: 203.0.113.10\nmode: dsr-geneve\nports: 3868/sctp\nbackends: [10.0.0.1]\n",
        "4: ports has 3868/sctp",
        "mode dsr-geneve is for TCP and UDP",
        "use mode: dsr-ipip, dsr-l2 or nat",
    ),
    "SCTP between the families": (
        NAT + "ports: 3868/sctp\nbackends: ['2001:db8::1']\n",
        "5: backend 2001:db8::1 is not of its VIP's family",
        "SCTP is not translated between IPv4 and IPv6",
        "make it two services, one for each family",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(tmp_path: Path, case: str) -> None:
    text, what, why, fix = MISTAKES[case]
    assert errors(tmp_path, web=text) == [three(f"web.yaml:{what}", why, fix)]


@pytest.mark.parametrize("mode", [mode for mode in Mode if mode is not Mode.DSR_GENEVE])
def test_services_of_sctp(tmp_path: Path, mode: Mode) -> None:
    """The port that every one of its ports is may stand at a backend; TC translates."""
    ports = "ports: [3868/sctp]" if mode.translates else "ports: [3868/sctp, any/sctp]"
    own = ":3868" if mode.translates else ""
    text = f"name: web\nvip: 203.0.113.10\n{ports}\nmode: {mode}\nbackends: ['10.0.0.1{own}']\n"
    assert errors(tmp_path, web=text) == []
    found = load(tmp_path / "shunt.yaml", tmp_path / "services.d")
    (service,) = found.services
    assert service.ports[0] == Port(3868, Protocol.SCTP)
    assert service.health is None, "nothing of TCP to connect to"
    assert needed(found) == mode.translates
    if not mode.translates:
        assert service.ports[1] == Port(ANY_PORT, Protocol.SCTP)
