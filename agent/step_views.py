# SPDX-License-Identifier: Apache-2.0
"""The steps of a packet that the dry program took, in words and as plain values."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping
from ipaddress import ip_address

import numpy as np

from shunt.agent.flow_views import backend_name
from shunt.agent.node import Node
from shunt.agent.samples import describe, in_geneve
from shunt.agent.service_views import Json, names
from shunt.kern.flows import State, backends, seen_ns, states
from shunt.kern.netlink import Netlink
from shunt.lb import slots as slot
from shunt.lb.errors import ShuntError
from shunt.xdp.dry import Step, Tried

ACTIONS = {0: "aborted", 1: "drop", 2: "pass", 3: "tx", 4: "redirect", 7: "redirect"}  # XDP's; TC's
FOREIGN, ELSEWHERE = 3, 4  # KNOWN_REFUSED, KNOWN_LEAVING of bpf/nat_pair.h
# Such a packet goes on into the stack, or out of it, and is another.
CHANGED = ("PASS_TO_FRAGMENT", "SENT_TO_BACKEND", "SENT_TO_CLIENT", "SENT_MASQUERADED")
# Those of TC's that the stack then finds the way of.
TRANSLATED = ("SENT_TO_BACKEND", "SENT_TO_CLIENT", "SENT_MASQUERADED")
_WRAPPED = ("4", "41")  # IP in IP, as samples.describe() has it

# What a reason means for who asks why. {service}, {backend}: as far as they are known.
REASONS: Mapping[str, str] = {
    "PASS_NOT_IP": "passed to the host's own stack: it is not IP",
    "PASS_NOT_OURS": "passed to the host's own stack: it is for no service",
    "PASS_FRAGMENT": "passed to the host's own stack: a fragment whose first one was not sent on",
    "PASS_MALFORMED": "passed to the host's own stack: it is shorter than its headers say",
    "PASS_TO_FRAGMENT": "wrapped, and passed to the host's own stack, which fragments it on its"
    " way to {backend}",
    "PASS_TO_TC": "passed to the host's own stack, where TC translates it: service {service} is of"
    " mode local, or of SCTP",
    "SENT_TO_BACKEND": "sent to backend {backend} of service {service}",
    "SENT_TO_CLIENT": "sent to the client: a reply, translated back",
    "SENT_MASQUERADED": "sent out of the node, with an address of its own",
    "SENT_ERROR_TO_BACKEND": "sent to backend {backend}: an ICMP error about a flow of its own",
    "SENT_ERROR_TO_CLIENT": "sent to the client: an ICMP error about a packet of its own",
    "SENT_ECHO_REPLY": "answered: an echo request to a VIP of service {service}",
    "SENT_RST_NO_BACKEND": "answered with a reset: service {service} has no backend for it",
    "SENT_UNREACHABLE": "answered with ICMP port unreachable: service {service} has no backend"
    " for it",
    "SENT_RST_NO_FLOW": "answered with a reset: it opens no connection, and no translation is"
    " known",
    "SENT_TOO_BIG": "answered with ICMP too big: it does not fit the next hop's MTU",
    "DROP_NO_BACKEND": "dropped: service {service} has no backend for it, and no answer is due",
    "DROP_TOO_BIG": "dropped: it does not fit the next hop's MTU, and its sender is not to be told",
    "DROP_NO_NEXTHOP": "dropped: neither shuntd nor the kernel knows the way to {backend}; see"
    " `shunt backend list`",
    "DROP_TTL_EXPIRED": "dropped: its TTL has run out",
    "DROP_NO_HEADROOM": "dropped: the driver left no room for an outer header",
    "DROP_NAT_NO_FLOW": "dropped: no translation is known that it belongs to",
    "DROP_NAT_NO_PORT": "dropped: every port tried is taken towards {backend}",
    "DROP_NAT_SCTP_PORT": "dropped: another client has this port towards {backend}, and SCTP keeps"
    " its own",
    "DROP_NAT_TABLE_FULL": "dropped: the table of translations is full (limits: nat)",
    "DROP_NAT_NO_SOURCE": "dropped: this host has no address of the backend's family",
    "DROP_NAT_OVER_BUDGET": "dropped: too many new flows a second (budgets: inserts)",
    "DROP_NAT_INVALID": "dropped: its connection's state does not allow it",
    "DROP_NAT_MALFORMED": "dropped: it is shorter than its headers say, and cannot be translated",
    "DROP_NAT_FRAGMENT": "dropped: a later fragment to be masqueraded, whose first was not seen",
    "DROP_NAT46_FRAGMENT": "dropped: a fragment, which is not translated between IPv4 and IPv6",
    "DROP_NAT46_NO_EQUAL": "dropped: the backend's family has nothing like it, or the client's",
    "DROP_NAT46_NOT_XDP": "dropped: the backend is of the other family, which is XDP's alone",
    "DROP_NAT_CLASH": "dropped: to a backend itself, with the ports of a connection to a VIP",
    "DROP_SOURCE_DENIED": "dropped: service {service} does not serve this client",
    "DROP_RATE_LIMITED": "dropped: too many new connections from this client's network",
    "DROP_HOOK": "dropped by a hook",
    "DROP_BAD_TABLE": "dropped: the tables contradict each other, a defect: please report it",
}
# Of a packet on its way out.
LEAVING: Mapping[str, str] = {
    "PASS_NOT_OURS": "goes on as it is: it is no reply of a service's backend, and not one to"
    " masquerade",
}
# "": another step says so already.
EVENTS: Mapping[str, str] = {
    "FLOW_REMEMBERED": "it would be remembered",
    "FLOW_TABLE_FULL": "it would not be remembered: the table is full (limits: flows)",
    "FLOW_OVER_BUDGET": "it would not be remembered: too many a second (budgets: inserts)",
    "FLOW_UNPROTECTED": "and may move at the slot's next change: its previous owner is down",
    "CLIENT_REMEMBERED": "",
    "CLIENT_NOT_REMEMBERED": "the client would not be remembered: no room, or too many a second",
    "NAT_CREATED": "",
    "NAT_COLLISION": "a port that was tried is taken",
    "NAT_ADOPTED": "another processor's translation would be used",
    "FIB_FALLBACK": "shuntd does not know the neighbour: the kernel's routes and neighbours say",
    "SAMPLE_LOST": "",
    "FRAGMENT_FIRST": "",
    "FRAGMENT_LATE": "its first fragment was seen too long ago",
    "QUIC_BY_ID": "its connection id names the backend",
    "QUIC_FIRST": "the client chose its connection id, or nobody knows what it is",
    "QUIC_UNROUTABLE": "its connection id names no backend",
    "QUIC_DOWN": "the backend that its connection id names takes no packets",
    "FRAGMENT_EARLY": "it is for a VIP, and its first fragment is not known",
}

SCOPE = "external"  # enum scope of bpf/abi.h: there is no other outside a cluster

Told = tuple[str, Json]


class Teller:
    """One packet's steps, told."""

    def __init__(self, node: Node, frame: bytes, tried: Tried, *, leaving: bool = False) -> None:
        self.node, self.tried, self.tables = node, tried, node.tables
        self.leaving = leaving
        self.btf = node.datapath.btf
        self.packet = describe(frame)
        self.hop: Json = {}

    def explained(self) -> Json:
        """The whole, as api_types_explain.Explained."""
        last = self.tried.steps[-1]
        reason = names(self.btf, "reason", "REASON_")(last.b & 0xFF).name
        service, backend = self._service(last.b >> 8 & 0xFFFFFF), self._backend(last.b >> 32)
        means = (LEAVING if self.leaving else {}).get(reason, REASONS[reason])
        text = means.format(service=service or "?", backend=backend or "its backend")
        verdict = ACTIONS[last.a]
        steps = [told for step in self.tried.steps[:-1] if (told := self._tell(step))]
        kinds = {told["step"] for told in steps}
        chosen = last.b >> 32
        if service and "backend" not in kinds and (one := self._on_backend(*self._flags(chosen))):
            steps.append(self._told("backend", one))
        out = None
        if verdict in ("tx", "redirect") or reason in CHANGED:
            out = describe(self.tried.data)
            if verdict == "pass" and reason in TRANSLATED and "nexthop" not in kinds:
                steps.append(self._told("nexthop", routed(out["destination"])))
            steps.append(self._rewrite(out))
        facts = {"verdict": verdict, "reason": reason}
        label = reason.lower().replace("_", "-")
        steps.append({"step": "verdict", "text": f"{text} ({label})", "facts": facts})
        return {
            "packet": self.packet,
            "verdict": verdict,
            "reason": reason,
            "service": service,
            "backend": backend,
            "text": text,
            "out": out,
            "steps": steps,
        }

    def _service(self, svc: int) -> str:
        return self.tables.name_of(svc).rpartition("/")[0] if svc else ""

    def _backend(self, backend: int) -> str:
        return backend_name(self.tables, backend) or (f"(gone, id {backend})" if backend else "")

    def _flags(self, backend: int) -> tuple[int, int]:
        return backend, int(self.tables.backends["flags"][backend])

    def _owner(self, backend: int) -> str:
        """With its state, for people."""
        if not backend:
            return "nobody"
        flags = int(self.tables.backends["flags"][backend])
        return f"{self._backend(backend)} ({self._state(flags)})"

    def _state(self, flags: int) -> str:
        flag = self.tables.flag
        if not flags & flag.known:
            return "gone"
        if not flags & flag.up:
            return "failing"
        if flags & flag.removed:
            return "removed"
        return "draining" if flags & flag.drained else "up"

    def _where(self) -> str:
        """The packet's destination, for people."""
        address, port = self.packet.get("destination", "?"), self.packet.get("destination_port")
        if port is None:
            return str(address)
        shown = f"[{address}]" if ":" in address else address
        return f"{shown}:{port}/{self.packet['protocol']}"

    def _tell(self, step: Step) -> Json | None:
        tell: Callable[[int, int], Told | None] = getattr(self, f"_on_{step.kind.name.lower()}")
        told = tell(step.a, step.b)
        if told is None:
            return None
        kind = "nexthop" if step.kind.name == "HOP_MAC" else step.kind.name.lower()
        return self._told(kind.replace("_", "-"), told)

    @staticmethod
    def _told(kind: str, told: Told) -> Json:
        return {"step": kind, "text": told[0], "facts": told[1]}

    # Each step, by its name in bpf/step.h ----------------------------------------------------

    def _on_port(self, served: int, _: int) -> Told:
        port, protocol = self.packet.get("destination_port"), self.packet.get("protocol")
        said = "is in use by a service" if served else "is served by nobody, on any address"
        return f"{port}/{protocol} {said}", {"served": bool(served)}

    def _on_frontend(self, svc: int, every_port: int) -> Told:
        service, where = self._service(svc), self._where()
        if self.packet.get("protocol") in ("icmp", "icmpv6"):
            where = "the VIP and port of what it quotes"
        if svc:
            every = ", which has every port" if every_port else ""
            text = f"{where}: service {service}{every}; scope {SCOPE}"
        else:
            text = "nor every port of it" if every_port else f"no service has {where}"
        facts = {"service": service, "every_port": bool(every_port), "scope": SCOPE}
        return text, facts

    def _on_service(self, mode: int, flags: int) -> Told:
        name = self.tables.modes(mode).name.lower().replace("_", "-")
        asks = [f.name.lower().replace("_", "-") for f in self.tables.svc_flag if flags & f]
        policy = "source ranges" if "sources" in asks else "every client"
        text = f"mode {name}" + (f"; {', '.join(asks)}" if asks else "")
        facts = {"mode": name, "options": asks, "policy": policy}
        return f"{text}; {'serves' if policy == 'every client' else 'policy:'} {policy}", facts

    def _on_source(self, served: int, _: int) -> Told:
        said = "is" if served else "is not"
        return f"{self.packet.get('source')} {said} among the clients that are served", {
            "served": bool(served)
        }

    def _on_rate(self, within: int, _: int) -> Told:
        said = "within" if within else "over"
        return f"its network is {said} its rate of new connections", {"within": bool(within)}

    def _on_hash(self, value: int, log2: int) -> Told:
        number, of = (value << log2) >> 32, 1 << log2
        text = f"{value:08x}: slot {number} of the service's {of}"
        return text, {"hash": f"{value:08x}", "slot": number, "slots": of}

    def _on_slot(self, index: int, word: int) -> Told:
        words = np.array([word], np.uint64)
        cur, prev = int(slot.cur(words)[0]), int(slot.prev(words)[0])
        state = slot.State(int(slot.state(words)[0])).name.lower()
        facts = {
            "index": index,
            "state": state,
            "current": self._backend(cur),
            "previous": self._backend(prev),
        }
        if state == "settled":
            return f"settled: the hash alone decides, for {self._owner(cur)}", facts
        return f"{state}: now {self._owner(cur)}, before {self._owner(prev)}", facts

    def _on_flow(self, backend: int, word: int) -> Told:
        if not word:
            return "none is remembered", {"found": False}
        words = np.array([word], np.uint64)
        state = State(int(states(words)[0])).name.lower()
        idle_s = round(max(0, time.monotonic_ns() - int(seen_ns(words)[0])) / 1e9, 1)
        of = int(backends(words)[0])
        text = f"remembered: {self._owner(of)}, {state}, idle for {idle_s} s"
        if not backend:
            text += "; it does not speak for this packet (ended, expired, or another flow's)"
        return text, {
            "found": True,
            "backend": self._backend(of),
            "state": state,
            "idle_s": idle_s,
            "followed": bool(backend),
        }

    def _on_flow_forgotten(self, _a: int, _b: int) -> Told:
        return "what is remembered would be forgotten", {}

    def _on_client(self, backend: int, known: int) -> Told:
        shown, source = self._owner(backend), self.packet.get("source")
        said = "is" if known else "would be"
        text = f"{source} {said} remembered, with {shown}"
        return text, {"backend": self._backend(backend), "known": bool(known)}

    def _on_restart(self, _slot: int, _: int) -> Told:
        return "the slot's quiet window would begin anew", {}

    def _on_nat_reply(self, known: int, svc: int) -> Told | None:
        if not known:
            return "its port is one of nat's own, and no translation is known", {"known": False}
        service = self._service(svc)
        return f"a translation of service {service} is known", {"known": True, "service": service}

    def _on_nat_flow(self, found: int, backend: int) -> Told:
        facts = {"found": found == 0, "backend": self._backend(backend)}
        if found == 0:
            return f"translated already, to {self._owner(backend)}", facts
        if found == FOREIGN:
            return f"translated to {self._owner(backend)}, and not of that connection", facts
        if found == ELSEWHERE:
            return "of a connection that leaves the node masqueraded, and goes on so", facts
        if backend:
            return f"its translation to {self._owner(backend)} has ended", facts
        return "not translated yet", facts

    def _on_nat_new(self, port: int, backend: int) -> Told:
        source = f"this host's port {port}"
        if port == self.packet.get("source_port"):
            source = "the client's own address and port"
        text = f"it would be translated to {self._owner(backend)}, from {source}"
        return text, {"own_port": port, "backend": self._backend(backend)}

    def _on_masquerade(self, port: int, found: int) -> Told:
        facts = {"own_port": port, "found": found == 0}
        if found == FOREIGN:
            return f"masqueraded with port {port}, and not of that connection", facts
        if found == 0:
            return f"masqueraded already, with this host's port {port}", facts
        return f"it would be masqueraded with this host's port {port}", facts

    def _on_fragment_first(self, _svc: int, _backend: int) -> Told:
        return "the other fragments of its datagram would follow it", {}

    def _on_fragment(self, svc: int, backend: int) -> Told:
        service = self._service(svc)
        text = f"its first fragment was sent on, for service {service or '(a reply)'}"
        return text, {"service": service, "backend": self._backend(backend)}

    def _on_quote(self, svc: int, backend: int) -> Told:
        service, of = self._service(svc), self._backend(backend)
        text = f"what it quotes is of service {service} and backend {of}" if of else ""
        return text or "what it quotes is of a client in mode nat", {
            "service": service,
            "backend": of,
        }

    def _on_backend(self, backend: int, flags: int) -> Told | None:
        if not backend:
            return None
        state = self._state(flags)
        return f"{self._backend(backend)}, {state}", {
            "backend": self._backend(backend),
            "state": state,
        }

    def _on_hop(self, ifindex: int, rest: int) -> None:
        try:
            interface = socket.if_indextoname(ifindex)
        except OSError:
            interface = f"interface {ifindex}, which has gone"
        tags = [tag & 0xFFF for tag in (rest >> 48 & 0xFFFF, rest >> 32 & 0xFFFF) if tag]
        self.hop = {"interface": interface, "mtu": rest & 0xFFFFFFFF, "vlans": tags}

    def _on_hop_mac(self, _: int, head: int) -> Told:
        mac = head.to_bytes(8, "little")[:6].hex(":")
        hop = self.hop
        vlans = "".join(f", VLAN {tag}" for tag in hop["vlans"])
        mtu = f", MTU {hop['mtu']}" if hop["mtu"] < 0xFFFF else ""
        return f"{mac} by {hop['interface']}{vlans}{mtu}", {**hop, "mac": mac}

    def _on_event(self, event: int, _: int) -> Told | None:
        name = names(self.btf, "event", "EVENT_")(event).name
        return (EVENTS[name], {"event": name}) if EVENTS[name] else None

    def _rewrite(self, out: Json) -> Json:
        keys = ("source", "source_port", "destination", "destination_port")
        ends = _ends(out)
        same_port = out.get("destination_port") == self.packet.get("destination_port")
        inner = {} if same_port else in_geneve(self.tried.data)
        if inner:
            to = " > ".join(_ends(inner))
            text = f"wrapped in Geneve: {ends[0]} > {ends[1]}; in it {inner.get('protocol')} {to}"
        elif out.get("protocol") in _WRAPPED and self.packet.get("protocol") != out["protocol"]:
            text = f"wrapped: {ends[0]} > {ends[1]}"
        elif all(out.get(key) == self.packet.get(key) for key in keys):
            text = "its MACs alone"
        else:
            flags = f" {','.join(out['tcp_flags'])}" if out.get("tcp_flags") else ""
            text = f"it leaves as {out.get('protocol')} {ends[0]} > {ends[1]}{flags}"
        return {"step": "rewrite", "text": text, "facts": dict(out)}


def routed(address: str) -> Told:
    """The way that the host's own stack has to an address, now."""
    try:
        with Netlink() as netlink:
            route = netlink.resolve(ip_address(address))
    except (ShuntError, OSError) as e:
        why = e.why if isinstance(e, ShuntError) else str(e)
        return f"the kernel has no way to {address}: {why}", {"interface": ""}
    via = f"{route.gateway} by {route.link.name}" if route.gateway else f"by {route.link.name}"
    facts = {"interface": route.link.name, "mtu": route.mtu, "gateway": str(route.gateway or "")}
    return f"the kernel's route: {via}, MTU {route.mtu}", facts


def _ends(packet: Json) -> list[str]:
    """Source and destination of what samples.describe() has."""
    return [
        f"[{a}]:{p}" if p and ":" in str(a) else f"{a}:{p}" if p else str(a)
        for a, p in ((packet.get(k), packet.get(f"{k}_port")) for k in ("source", "destination"))
    ]
