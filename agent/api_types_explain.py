# SPDX-License-Identifier: Apache-2.0
"""What /v1/explain takes and answers, as in api_types.py."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, UnsetType

from shunt.agent.api_types import Answer, Error


class Explain(Answer):
    """Frames as they would come in, each from its Ethernet header on, in base64.

    `interface`: where; the first of the configured ones if it is left away. `leaving`: as they
    would go out there instead, which TC sees.
    """

    frames: Annotated[list[str], Meta(min_length=1, max_length=1000)]
    interface: str | UnsetType = UNSET
    leaving: bool = False


class Step(Answer):
    """A step of a packet's way: in words, and what they are made of."""

    step: str
    text: str
    facts: dict[str, Any]


class Explained(Answer):
    """What would become of a packet. `out`: the frame as it would leave; null if it would not.

    Verdict and reason are null, and `problem` is there, for a frame that cannot be tried.
    """

    packet: dict[str, Any]
    verdict: Literal["aborted", "drop", "pass", "tx", "redirect"] | None
    reason: str | None
    service: str
    backend: str
    text: str
    out: dict[str, Any] | None
    steps: list[Step]
    problem: Error | UnsetType = UNSET


class Explanation(Answer):
    interface: str
    packets: list[Explained]
