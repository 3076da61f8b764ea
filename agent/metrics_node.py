# SPDX-License-Identifier: Apache-2.0
"""Metrics of the node as a whole; how many there are does not depend on the services."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shunt.agent import views
from shunt.agent.metric_families import Family, Sample, one
from shunt.agent.node import Node
from shunt.agent.service_views import names
from shunt.kern.maps import memory_bytes
from shunt.kern.objects import Program
from shunt.kern.programs import Runs, runs
from shunt.lb.model import Protocol
from shunt.xdp import hooks

SOCKETS = Protocol.UDP, Protocol.TCP
STATUS = Path("/proc/self/status")


def _counted(enum: str, prefix: str, map_name: str, field: str) -> Callable[[Node], list[Sample]]:
    """A per-processor array of counters, by the names of its enum."""

    def read(node: Node) -> list[Sample]:
        totals = node.tables.maps[map_name].totals()[field]
        known = names(node.datapath.btf, enum, prefix)
        return [((m.name.lower(),), int(totals[m])) for m in known if m.name != "COUNT"]

    return read


def _fallbacks(node: Node) -> list[Sample]:
    return one(views.events(node).get("FIB_FALLBACK", 0))


def _hooks(node: Node) -> list[Sample]:
    return [
        ((hook.name, hook.position, answer), float(packets))
        for hook in hooks.listing(node.datapath.bpffs)
        for answer, packets in (
            ("passed", hook.passed),
            ("dropped", hook.dropped),
            ("marked", sum(hook.marked.values())),
            ("invalid", hook.invalid),
        )
    ]


def _marks(node: Node) -> list[Sample]:
    return [
        ((hook.name, hook.position, str(mark)), float(packets))
        for hook in hooks.listing(node.datapath.bpffs)
        for mark, packets in hook.marked.items()
    ]


def _undelivered(node: Node) -> list[Sample]:
    return [
        ((loss.interface, loss.kind.lower(), loss.error), loss.frames)
        for loss in node.observing.losses()
    ]


def _attached(node: Node) -> list[Sample]:
    shown = (i for i in views.interfaces(node) if i["xdp"] != "off")
    return [((i["name"], i["mode"]), float(i["attached"])) for i in shown]


def _translating(node: Node) -> list[Sample]:
    if not node.translating.needed:
        return []
    return [((i["name"],), float(i["tc"] != "none")) for i in views.interfaces(node)]


def _backends(node: Node) -> list[Sample]:
    return [((state,), n) for state, n in views.backend_counts(node).items()]


def _slots(node: Node) -> list[Sample]:
    counts = views.slot_counts(node)
    settled = counts["used"] - counts["moving"] - counts["lingering"]
    parts = {
        "settled": settled,
        "moving": counts["moving"],
        "lingering": counts["lingering"],
        "free": counts["total"] - counts["used"],
    }
    return [((state,), n) for state, n in parts.items()]


def _scanned(field: str) -> Callable[[Node], list[Sample]]:
    """Nothing before the first round of the scan has ended."""

    def read(node: Node) -> list[Sample]:
        last = node.scanner.last
        return one(getattr(last, field)) if last else []

    return read


def _scan_age(node: Node) -> list[Sample]:
    last = node.scanner.last
    return one((time.monotonic_ns() - last.began_ns) / 1e9) if last else []


def _fill(field: str) -> Callable[[Node], list[Sample]]:
    def read(node: Node) -> list[Sample]:
        return [((name,), fill[field]) for name, fill in views.map_fill(node).items()]

    return read


def _pressure(node: Node) -> list[Sample]:
    return [((n,), fill["used"] / fill["limit"]) for n, fill in views.map_fill(node).items()]


def _memory(node: Node) -> list[Sample]:
    return [((name,), memory_bytes(m.fd)) for name, m in node.tables.maps.items()]


def _ports_used(node: Node) -> list[Sample]:
    last, ports = node.scanner.last, len(node.tables.nat_ports)
    return one(last.ports.busiest()[1] / ports) if last and ports else []


def _loaded(node: Node) -> list[Program]:
    return [
        *node.datapath.programs,
        *node.translating.translation.programs,
        *node.upkeep.detour.programs,
        *node.sockets.programs,
        *node.closing.programs,
        *node.streams.programs,
        *node.observing.programs(),
    ]


def _elsewhere(node: Node) -> list[Sample]:
    closing = node.closing
    return one(not closing.barred) if closing.by and closing.elsewhere else []


def _programs(value: Callable[[Runs], float]) -> Callable[[Node], Iterator[Sample]]:
    def read(node: Node) -> Iterator[Sample]:
        for program in _loaded(node):
            yield (program.name,), value(runs(program.fd))

    return read


def _checks(value: Callable[[Any], float]) -> Callable[[Node], list[Sample]]:
    return lambda node: one(value(node.prober.counts))


def _anonymous_bytes(_node: Node) -> list[Sample]:
    kilobytes = next(
        line.split()[1] for line in STATUS.read_text().splitlines() if line.startswith("RssAnon:")
    )
    return one(int(kilobytes) * 1024)


NODE = (
    Family("shunt_build_info", "gauge", ("version",), "Always 1.",
           lambda _: [((views.version(),), 1)]),
    Family("shunt_uptime_seconds", "gauge", (), "Since shuntd started.",
           lambda n: one(time.monotonic() - n.counts.started_s)),
    Family("shunt_config_generation", "gauge", (), "Of the configuration in force.",
           lambda n: one(n.generation)),
    Family("shunt_config_last_reload_successful", "gauge", (),
           "1 if the newest configuration is in force, 0 if it was refused.",
           lambda n: one(not n.errors)),
    Family("shunt_config_reloads_total", "counter", (), "Times that the configuration was read.",
           lambda n: one(n.counts.reloads)),
    Family("shunt_config_refused_total", "counter", (),
           "Configurations and changes that were refused.", lambda n: one(n.counts.refused)),
    Family("shunt_services", "gauge", (), "Services configured.",
           lambda n: one(len(n.configuration.services) if n.configuration else 0)),
    Family("shunt_backends", "gauge", ("state",), "Backends, once for each service.", _backends),
    Family("shunt_interface_attached", "gauge", ("interface", "mode"),
           "1 if the program is attached.", _attached),
    Family("shunt_sockets_attached", "gauge", ("scope",),
           "1 if calls of this host's sockets are translated.",
           lambda n: [((n.sockets.scope,), float(n.sockets.attached()))]),
    Family("shunt_socket_calls_total", "counter", ("reason",),
           "connect() and sendmsg() with an address, and bind(), by what became of it.",
           lambda n: [((r.lower(),), times) for r, times in n.sockets.reasons().items()]),
    Family("shunt_sockets_closed_total", "counter", ("protocol",),
           "Connections that were closed since their backends had gone.",
           lambda n: [((p.name.lower(),), n.closing.closed[p]) for p in SOCKETS]),
    Family("shunt_sockets_stale", "gauge", (),
           "Connections to backends that have gone, which the last sweep could not close.",
           lambda n: one(n.closing.last.left) if n.closing.last else []),
    Family("shunt_sockets_elsewhere_closed", "gauge", (),
           "1 if shuntd may close them in every network namespace, 0 if not; absent unless all are"
           " covered.", _elsewhere),
    Family("shunt_sockets_sweep_seconds", "gauge", (), "What the last sweep for them took.",
           lambda n: one(n.closing.last.took_s) if n.closing.last else []),
    Family("shunt_streams", "gauge", ("way",),
           "Connections between two sockets of this node that are redirected, or were.",
           lambda n: [((way,), float(times)) for way, times in n.streams.live().items()]),
    Family("shunt_stream_events_total", "counter", ("event",),
           "Connections and messages of services with `redirect`, by what became of them.",
           lambda n: [((e.lower(),), times) for e, (times, _) in n.streams.events().items()]),
    Family("shunt_stream_redirected_bytes_total", "counter", (), "Bytes that passed TCP by.",
           lambda n: one(n.streams.events().get("REDIRECTED", (0, 0))[1])),
    Family("shunt_tc_attached", "gauge", ("interface",),
           "1 if the TC programs are attached; absent while no service needs them.", _translating),
    Family("shunt_packets_total", "counter", ("reason",),
           "Packets by why they left the program as they did.",
           _counted("reason", "REASON_", "reasons", "packets")),
    Family("shunt_bytes_total", "counter", ("reason",), "Bytes of those packets.",
           _counted("reason", "REASON_", "reasons", "bytes")),
    Family("shunt_events_total", "counter", ("event",), "What happened to packets on the way.",
           _counted("event", "EVENT_", "events", "times")),
    Family("shunt_undelivered_packets_total", "counter", ("interface", "reason", "error"),
           "Packets that the kernel or a driver lost after the program had sent them.",
           _undelivered),
    Family("shunt_slots", "gauge", ("state",), "Slots of all services, and those of none.", _slots),
    Family("shunt_slots_moving_ratio", "gauge", (), "Share of the used slots that are moving.",
           lambda n: one(views.slot_counts(n)["moving_share"])),
    Family("shunt_flows_remembered", "gauge", (), "Flows in the table, at the last scan.",
           _scanned("flows")),
    Family("shunt_flows_exceptions", "gauge", (),
           "Of them, those whose backend is not their slot's owner.", _scanned("exceptions")),
    Family("shunt_flows_limit", "gauge", (), "How many the table is meant for.",
           lambda n: one(n.tables.flows.capacity)),
    Family("shunt_nat_pairs", "gauge", (), "Translations, at the last scan.", _scanned("nat")),
    Family("shunt_nat_pairs_limit", "gauge", (), "How many the tables hold.",
           lambda n: one(n.tables.maps["nat_fwd"].spec.entries)),
    Family("shunt_nat_ports_used_ratio", "gauge", (),
           "Share of nat's ports taken towards the busiest destination, at the last scan.",
           _ports_used),
    Family("shunt_scan_age_seconds", "gauge", (), "Since the last scan of the flows began.",
           _scan_age),
    Family("shunt_map_used", "gauge", ("map",), "Elements in use.", _fill("used")),
    Family("shunt_map_limit", "gauge", ("map",), "Elements that there is room for.",
           _fill("limit")),
    Family("shunt_map_pressure_ratio", "gauge", ("map",), "Used elements by limit.", _pressure),
    Family("shunt_map_memory_bytes", "gauge", ("map",), "What the kernel takes for the map.",
           _memory),
    Family("shunt_nexthop_problems", "gauge", (), "Backends' addresses without a way to them.",
           lambda n: one(len(n.nexthops.problems()))),
    Family("shunt_fib_fallback_packets_total", "counter", (),
           "Packets that asked the kernel's routes, since their next hop was not resolved.",
           _fallbacks),
    Family("shunt_hook_packets_total", "counter", ("hook", "position", "answer"),
           "Packets by what a user's hook answered, since it was loaded.", _hooks),
    Family("shunt_hook_marked_packets_total", "counter", ("hook", "position", "mark"),
           "Of the marked ones, those with each mark.", _marks),
    Family("shunt_program_runs_total", "counter", ("program",),
           "Runs of a program while the kernel's statistics were on.",
           _programs(lambda r: r.count)),
    Family("shunt_program_run_seconds_total", "counter", ("program",), "Time of those runs.",
           _programs(lambda r: r.time_ns / 1e9)),
    Family("shunt_checks_total", "counter", (), "Health checks begun.",
           _checks(lambda c: c.checks)),
    Family("shunt_check_failures_total", "counter", (), "Health checks that failed.",
           _checks(lambda c: c.failures)),
    Family("shunt_checks_skipped_total", "counter", (), "Turns of checks that went by.",
           _checks(lambda c: c.skipped)),
    Family("shunt_check_late_seconds_total", "counter", (),
           "How much after their turn the checks began, summed.", _checks(lambda c: c.late_s_sum)),
    Family("shunt_check_troubles_total", "counter", ("error",),
           "Checks that this host could not make.",
           lambda n: [((error,), times) for error, times in n.prober.counts.troubles.items()]),
    Family("shunt_apply_writes_total", "counter", (), "Writes to the maps.",
           lambda n: one(n.counts.writes)),
    Family("shunt_process_anonymous_memory_bytes", "gauge", (), "RssAnon of shuntd.",
           _anonymous_bytes),
)  # fmt: skip
