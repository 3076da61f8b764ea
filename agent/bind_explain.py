# SPDX-License-Identifier: Apache-2.0
"""What would become of a bind(), as things are, and who has the port."""

from __future__ import annotations

from msgspec import UNSET

from shunt.agent.service_views import Json, names
from shunt.agent.socket_asked import Asked, plain, raw
from shunt.agent.socket_upkeep import INSTEAD, unreached
from shunt.agent.step_views import Told
from shunt.ipam.node import holders
from shunt.lb.model import Port, Protocol
from shunt.sockops.dry import DrySockets

# What a reason means for who asks why; the other reasons are none of a bind().
REASONS = {
    "PASS_NAMESPACE": "the call is left to the kernel: node ports are those of this host's network"
    " namespace",
    "PASS_BIND": "the call is left to the kernel: it takes no port of a service",
    "REFUSED_NODE_PORT": "the call fails with EADDRINUSE: {why}",
}
SHARED = (
    "the call is left to the kernel, as every bind() is with `sockets: {{node_ports: share}}`; but"
    " {why}"
)


class Bind(Asked):
    """One bind(), asked and told."""

    def decided(self, dry: DrySockets) -> Json:
        """The whole, as api_types_sockets.ExplainedSocket."""
        self.taken: set[int] = set()  # the IP versions of which the port is taken
        self.svc = 0  # who has the address and port
        self.groups()  # that there is such a group
        number, way = dry.bind(
            netns=self.netns,
            addr=raw(self.address),
            port=self.asked.port,
            proto=self.port.protocol,
            ipv6_only=self.asked.ipv6_only,
        )
        steps = [told for step in way if (told := self._tell(step))] + self._beside()
        reason = names(self.node.sockets.btf, "sock_reason", "SOCK_")(number).name
        if reason != "REFUSED_NODE_PORT":
            return self.concluded(reason, REASONS[reason], steps)
        service = self._holder()
        why = unreached(self.port, service)
        if not self.node.sockets.reserves:
            return self.concluded("PASS_BIND", SHARED.format(why=why), steps, service=service)
        text = REASONS[reason].format(why=why)
        return self.concluded(reason, text, steps, service=service, fix=self._instead())

    @property
    def port(self) -> Port:
        return Port(self.asked.port, Protocol[self.asked.protocol.upper()])

    @property
    def _is_every(self) -> bool:
        """Whether it is every address that would be bound."""
        return not int(plain(self.address))

    def _beside(self) -> list[Json]:
        """What the decision does not depend on, and might be thought to."""
        steps = []
        if not self.asked.port:
            text = (
                "0: the kernel chooses one, out of ip_local_port_range less ip_local_reserved_ports"
            )
            steps.append(self._told("port", (text, {})))
        if self.asked.cgroup is not UNSET:
            text = "control groups are not looked at: a node port is nobody's to bind"
            steps.append(self._told("cgroup", (text, {})))
        return steps

    def _holder(self) -> str:
        if not self._is_every:
            return self._service(self.svc)
        found = holders(self.node.services.values(), self.port, self.taken)
        return ", ".join(found[:3]) or "?"

    def _instead(self) -> str:
        if self._is_every and self.address.version == 6 and self.taken == {4}:
            return f"let the socket have IPV6_V6ONLY, which leaves IPv4's alone; or {INSTEAD}"
        return INSTEAD

    def _on_node_port(self, taken: int, ipv6: int) -> Told:
        version = 6 if ipv6 else 4
        of = f"on this node's addresses of IPv{version}"
        if taken:
            self.taken.add(version)
            text = f"a service has {self.port} {of}"
        else:
            text = f"no service has {self.port} {of}"
            if ipv6 and self._is_every and self.asked.ipv6_only:
                text += "; of IPv4's it takes none (IPV6_V6ONLY)"
        return text, {"taken": bool(taken), "ip_version": version}

    def _on_service(self, mode: int, flags: int) -> Told:
        """Whether it is one whose ports are node ports."""
        asks = bool(flags & self.tables.svc_flag["NODE"])
        text = "it asks for this node's own addresses"
        if not asks:
            text = (
                "it names this VIP, and asks for no address of this node: whoever serves it may"
                " listen"
            )
        return text, {"node": asks}

    def _on_frontend(self, svc: int, every_port: int) -> Told:
        self.svc = svc
        return super()._on_frontend(svc, every_port)
