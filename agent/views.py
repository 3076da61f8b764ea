# SPDX-License-Identifier: Apache-2.0
"""The node as plain values: what `shunt status` and the API's readers see. Changes nothing."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Iterable
from importlib import metadata

import numpy as np

from shunt.agent import health_views
from shunt.agent.node import Node
from shunt.agent.service_views import STATES, Json, backend_states, names
from shunt.kern import links
from shunt.kern.objects import open_pin
from shunt.lb import slots as slot
from shunt.lb.compile import Endpoint
from shunt.lb.errors import ShuntError
from shunt.lb.model import Protocol
from shunt.lb.standing import Panic
from shunt.xdp.attach import pin_name


def version() -> str:
    """The installed version; of a source tree that is not installed, only that it is one."""
    try:
        return metadata.version("shunt")
    except metadata.PackageNotFoundError:
        return "source tree"


def error(problem: ShuntError) -> Json:
    """An error's three parts."""
    return {"what": problem.what, "why": problem.why, "fix": problem.fix}


def error_of_text(text: str) -> Json:
    """The three parts of an error that was kept as its text."""
    found = {"what": "", "why": "", "fix": ""}
    part = "what"
    for line in text.splitlines():
        for label in ("why", "fix"):
            if line.startswith(f"  {label}: "):
                part, line = label, line.removeprefix(f"  {label}: ")  # noqa: PLW2901
                break
        found[part] += ("\n" if found[part] else "") + line
    return found


def status(node: Node) -> Json:
    """Everything `shunt status` shows."""
    assert node.configuration is not None
    attached = interfaces(node)
    shown = {
        "version": version(),
        "generation": node.generation,
        "uptime_s": round(time.monotonic() - node.counts.started_s, 1),
        "config_ok": not node.errors,
        "errors": [error_of_text(text) for text in node.errors],
        "set_aside": set_aside(node),
        "interfaces": attached,
        "sockets": sockets(node),
        "services": len(node.configuration.services),
        "backends": backend_counts(node),
        "slots": slot_counts(node),
        **_scanned(node),
        "reasons": reasons(node),
        "events": events(node),
        "losses": losses(node),
        "apply": {
            "took_ms": round(node.counts.apply_s * 1000, 1),
            "writes": node.counts.writes,
            "reloads": node.counts.reloads,
            "refused": node.counts.refused,
        },
        "start": {
            "read_s": round(node.counts.read_s, 3),
            "apply_s": round(node.counts.first_apply_s, 3),
        },
        "checks": _checks(node),
        "panic": health_views.panic(node),
        "nexthop_problems": nexthop_problems(node),
        "maps": map_fill(node),
    }
    shown["problems"] = _problems(node, attached)
    return shown


def set_aside(node: Node) -> list[Json]:
    """Services of the API that are not in force, and why."""
    return [
        {"service": name, "errors": [error_of_text(text) for text in node.aside[name]]}
        for name in sorted(node.aside)
    ]


def interfaces(node: Node) -> list[Json]:
    """How the program is attached, as the kernel has it now."""
    assert node.configuration is not None
    how = node.translating.translation.attached()
    xdp = node.configuration.settings.xdp_mode
    return [
        {**_interface(node, name), "tc": how.get(name, "none"), "xdp": xdp}
        for name in node.configuration.settings.interfaces
    ]


def sockets(node: Node) -> Json:
    """Whose calls are translated at the socket and whose not, and what became of them."""
    covered = node.sockets
    return {
        "scope": covered.scope,
        "cgroup": str(covered.cgroup or ""),
        "whole": covered.covers_host(),
        "attached": covered.attached(),
        "excluded_cgroups": [
            {"cgroup": path, "there": found != 0} for path, found in covered.excluded.items()
        ],
        "excluded_services": sorted(s.name for s in node.services.values() if not s.sockets),
        "node_ports": "reserve" if covered.reserves else "share",
        "calls": {name: times for name, times in node.sockets.reasons().items() if times},
        "closing": closing(node),
        "streams": streams(node),
    }


def closing(node: Node) -> Json:
    """Which sockets are closed when their backends go, how, and how many were."""
    last = node.closing.last
    return {
        "which": node.closing.which,
        "by": str(node.closing.by or ""),
        "udp": node.closing.closed[Protocol.UDP],
        "tcp": node.closing.closed[Protocol.TCP],
        "left": last.left if last else 0,
        "barred": error(barred) if (barred := node.closing.barred) else None,
        "sweeps": node.closing.sweeps,
        "last_ms": round(last.took_s * 1000, 1) if last else None,
    }


def streams(node: Node) -> Json:
    """Which connections pass TCP by, and why others do not."""
    events = node.streams.events()
    return {
        "attached": node.streams.attached(),
        **node.streams.live(),
        "bytes": events.get("REDIRECTED", (0, 0))[1],
        "events": {name: times for name, (times, _) in events.items() if times},
    }


def _problems(node: Node, attached: Iterable[Json]) -> list[str]:
    """What makes the node's state wrong as a whole, rather than a backend's."""
    found = []
    if node.errors:
        found.append(
            f"the newest configuration is refused; generation {node.generation} is in force"
        )
    found += [f"service {name} of the API is set aside" for name in sorted(node.aside)]
    for interface in attached:
        if not interface["attached"] and interface["xdp"] != "off":
            found.append(f"interface {interface['name']}: the program is not attached")
        if node.translating.needed and interface["tc"] == "none":
            found.append(f"interface {interface['name']}: the TC programs are not attached")
    if node.sockets.cgroup and not node.sockets.attached():
        found.append(f"sockets: a program has been detached from {node.sockets.cgroup}")
    if node.streams.cgroup and not node.streams.attached():
        found.append(f"redirect: a program has been detached from {node.streams.cgroup}")
    failing = {
        name.rpartition("/")[0]
        for name, target in node.want.items()
        if target.members and not any(member.up for member in target.members)
    }
    panics = node.checks.panic
    for name in sorted(failing | panics.keys()):
        found.append(f"service {name}: {_few(panics.get(name))}")
    found += [f"{e.what}: {e.why}" for e in node.observing.troubles.values()]
    return found


def _few(panic: Panic | None) -> str:
    if panic is None:
        return "every backend is failing"
    few = f"only {panic.up} of {panic.backends} backends are up" if panic.up else ""
    return f"{few or 'every backend is failing'}; all are treated as up (panic)"


def _interface(node: Node, name: str) -> Json:
    shown: Json = {"name": name, "ifindex": 0, "mode": "none", "program_id": 0, "attached": False}
    try:
        shown["ifindex"] = socket.if_nametoindex(name)
        attached = links.query(shown["ifindex"])
        shown["mode"], shown["program_id"] = attached.mode, attached.prog_id
        fd = open_pin(node.datapath.bpffs / "links" / pin_name(name))
    except OSError:  # the interface has gone, or nothing of ours is on it
        return shown
    try:
        shown["attached"] = links.info(fd) == (shown["ifindex"], attached.prog_id)
    finally:
        os.close(fd)
    return shown


def backend_counts(node: Node) -> Json:
    """By state; a backend counts once for each service, whatever its protocols."""
    states = backend_states(node.tables)
    by_service: dict[str, dict[Endpoint, int]] = {}
    for name, place in node.tables.placed.items():
        service = name.rpartition("/")[0]
        seen = by_service.get(service)
        by_service[service] = place.backends if seen is None else {**place.backends, **seen}
    ids = itertools.chain.from_iterable(seen.values() for seen in by_service.values())
    counts = np.bincount(states[np.fromiter(ids, np.intp)], minlength=len(STATES)).tolist()
    return dict(zip(STATES, counts, strict=True))


def slot_counts(node: Node) -> Json:
    """Slots by state; what no service has is not `used`."""
    tables = node.tables
    used = len(tables.words) - tables.regions.free_slots()
    moving = lingering = 0
    for name in tables.unsettled:
        states = slot.state(tables.words[tables.placed[name].slots()])
        moving += int(np.count_nonzero(states == slot.State.MOVING))
        lingering += int(np.count_nonzero(states == slot.State.LINGERING))
    return {
        "total": len(tables.words),
        "used": used,
        "moving": moving,
        "lingering": lingering,
        "moving_share": round(moving / used, 6) if used else 0.0,
    }


def _scanned(node: Node) -> Json:
    """What the last round of the scan found; null before the first."""
    maps, last = node.tables.maps, node.scanner.last
    return {
        "flows": {
            "remembered": last.flows if last else None,
            "exceptions": last.exceptions if last else None,
            "clients": last.clients if last else None,
            "limit": node.tables.flows.capacity,
        },
        "nat": {
            "pairs": last.nat if last else None,
            "limit": maps["nat_fwd"].spec.entries,
            "ports_busiest": last.ports.busiest()[1] if last else None,
            "ports": len(node.tables.nat_ports),
        },
        "scan": {
            "ago_s": round((time.monotonic_ns() - last.began_ns) / 1e9, 1) if last else None,
            "deleted": last.deleted if last else None,
        },
    }


def reasons(node: Node) -> Json:
    """Packets and bytes by why they left as they did; only those that there were."""
    reason = names(node.datapath.btf, "reason", "REASON_")
    totals = node.tables.maps["reasons"].totals()
    return {
        reason(i).name: {"packets": int(totals["packets"][i]), "bytes": int(totals["bytes"][i])}
        for i in np.flatnonzero(totals["packets"]).tolist()
    }


def events(node: Node) -> Json:
    """How often what happened on the way; only what did."""
    event = names(node.datapath.btf, "event", "EVENT_")
    times = node.tables.maps["events"].totals()["times"]
    return {event(i).name: int(times[i]) for i in np.flatnonzero(times).tolist()}


def losses(node: Node) -> list[Json]:
    """Packets that the kernel or a driver lost after the program had sent them."""
    return [
        {
            "interface": loss.interface,
            "reason": loss.kind,
            "error": loss.error,
            "packets": loss.frames,
        }
        for loss in node.observing.losses()
    ]


def _checks(node: Node) -> Json:
    counts = node.prober.counts
    return {
        "made": counts.checks,
        "failed": counts.failures,
        "late_ms_mean": round(counts.late_s_mean * 1000, 1),
        "late_ms_max": round(counts.late_s_max * 1000, 1),
        "troubles": dict(counts.troubles),  # checks that this host could not make
    }


def nexthop_problems(node: Node) -> list[Json]:
    """Backends towards which there is no way, or whose neighbour does not answer."""
    problems = node.nexthops.problems()
    return [
        {"address": str(address), **error(problems[address])}
        for address in sorted(problems, key=lambda a: (a.version, int(a)))
    ]


def map_fill(node: Node) -> Json:
    """How full each table is."""
    tables, last = node.tables, node.scanner.last
    used = {
        "services": sum(len(place.frontends) for place in tables.placed.values()),
        "svc": tables.service_ids.in_use(),
        "slots": len(tables.words) - tables.regions.free_slots(),
        "backends": tables.backend_ids.in_use(),
        "nexthops": int(np.count_nonzero(tables.nexthops["ifindex"])),
        "flows": last.flows + last.clients if last else 0,
        "sources": sum(1 for _ in tables.maps["sources"].items()[0]),
        "server_ids": len(tables.server_ids),
        "nat_fwd": last.nat if last else 0,
    }
    limits = {n: tables.maps[n].spec.entries for n in used} | {"flows": tables.flows.capacity}
    return {n: {"used": u, "limit": limits[n]} for n, u in used.items()}
