# SPDX-License-Identifier: Apache-2.0
"""Every step, reason and event that the dry program can tell has its words."""

from __future__ import annotations

from shunt.agent.bind_explain import Bind
from shunt.agent.step_views import EVENTS, REASONS, Teller
from shunt.kern.objects import Object
from shunt.xdp.attach import OBJECT as LIVE
from shunt.xdp.dry import OBJECT, OWN


def test_all_have_words() -> None:
    with Object(OBJECT) as dry:
        reasons = set(dry.btf.enum("reason", "REASON_").__members__) - {"COUNT"}
        events = set(dry.btf.enum("event", "EVENT_").__members__) - {"COUNT"}
        steps = set(dry.btf.enum("step_kind", "STEP_").__members__) - {"VERDICT"}
    assert reasons == set(REASONS)
    assert events == set(EVENTS)
    told = {name.removeprefix("_on_").upper() for name in dir(Bind) if name.startswith("_on_")}
    assert set(dir(Bind)) > set(dir(Teller))
    assert steps == told


def test_reasons_say_what_becomes_of_the_packet() -> None:
    begins = {"PASS": ("passed", "wrapped"), "SENT": ("sent", "answered"), "DROP": ("dropped",)}
    for name, text in REASONS.items():
        assert text.startswith(begins[name[:4]]), name
        text.format(service="web", backend="10.0.0.1")


def test_both_programs_have_the_same_maps_and_constants() -> None:
    with Object(OBJECT) as dry, Object(LIVE) as live:
        assert dry.map_names() == live.map_names()
        assert set(live.map_names()) > OWN
        assert dry.btf.struct("lb_config") == live.btf.struct("lb_config")
        assert "trace" in dry.btf.variables(".bss")
        assert "trace" not in live.btf.variables(".bss"), "the live program notes no steps"
