# SPDX-License-Identifier: Apache-2.0
"""What would make a balancer faster. Pure: every finding follows from the facts, and its fix is a
command. Nothing here is wrong: packets go their way without it, but fewer of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from shunt.agent.doctor import Finding, Level
from shunt.agent.facts import BalancerFacts, read_sysctl
from shunt.kern.netdev import XDP_ACT_BASIC
from shunt.kern.queues import Queues, cpu_list, queues
from shunt.lb.model import Configuration

CPUS = Path("/sys/devices/system/cpu")
# Packets that a receive ring should hold: a millisecond at a million packets a second.
RING_WANTED = 1024
SLOW_GOVERNORS = {"powersave", "ondemand", "conservative"}
# What makes each return of kernel code slow, by the file that tells; the kernel's parameter.
RETURNS = {
    "spec_rstack_overflow": ("safe ret", "spec_rstack_overflow=off"),
    "retbleed": ("untrained return thunk", "retbleed=off"),
}


@dataclass(frozen=True, slots=True)
class SpeedFacts:
    """This host, as far as it makes packets fast or slow."""

    cpus: frozenset[int]
    governors: frozenset[str] = frozenset()
    vulnerabilities: Mapping[str, str] = field(default_factory=dict)
    jit_harden: str = ""
    statistics: str = ""  # kernel.bpf_stats_enabled
    queues: Mapping[str, Queues] = field(default_factory=dict)


def gather_speed(names: Iterable[str], cpus: Path = CPUS) -> SpeedFacts:
    """Look at this host and these devices of it. Raises: OSError."""
    folder = cpus / "vulnerabilities"
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    governors = cpus.glob("cpu[0-9]*/cpufreq/scaling_governor")
    return SpeedFacts(
        cpus=cpu_list((cpus / "online").read_text()),
        governors=frozenset(path.read_text().strip() for path in governors),
        vulnerabilities={path.name: path.read_text().strip() for path in files},
        jit_harden=read_sysctl("net.core.bpf_jit_harden"),
        statistics=read_sysctl("kernel.bpf_stats_enabled"),
        queues={name: queues(name) for name in names},
    )


def check_speed(
    speed: SpeedFacts, facts: BalancerFacts, configuration: Configuration
) -> list[Finding]:
    """Everything there is to say, in the order in which it is worth doing."""
    found = [
        *_modes(facts, configuration),
        *_queues(speed, facts),
        *_kernel(speed),
    ]
    return found or [Finding(Level.OK, "speed", "nothing here slows packets down needlessly")]


def _modes(facts: BalancerFacts, configuration: Configuration) -> Iterator[Finding]:
    for device in facts.devices.values():
        acts = device.device.xdp
        configured = configuration.settings.xdp_mode == "generic"
        mine = device.name in configuration.settings.interfaces
        if mine and configured and acts is not None and acts & XDP_ACT_BASIC:
            yield Finding(
                Level.WARN,
                f"speed {device.name}",
                f"{device.name} could run the program in its driver, and runs it after it",
                "`xdp: generic` is configured: several times as slow as native",
                "sed -i 's/^xdp: *generic/xdp: auto/' /etc/shunt/shunt.yaml"
                " && systemctl restart shuntd",
            )
        if mine and device.mode == "generic" and "gro" in device.device.offloads:
            yield Finding(
                Level.WARN,
                f"speed {device.name}",
                f"{device.name} merges packets (GRO) before the generic program sees them",
                "they are larger than the next hop's MTU then, and cost an ICMP error or a copy",
                f"ethtool -K {device.name} gro off",
            )


def _queues(speed: SpeedFacts, facts: BalancerFacts) -> Iterator[Finding]:
    for name, found in sorted(speed.queues.items()):
        check = f"speed {name}"
        if found.ring is not None and found.ring[0] < (wanted := min(RING_WANTED, found.ring[1])):
            yield Finding(
                Level.WARN,
                check,
                f"{name}'s receive rings hold {found.ring[0]} packets",
                "a burst that is longer is dropped by the card before any program sees it",
                f"ethtool -G {name} rx {wanted}",
            )
        if found.channels is not None:
            now, most = found.channels
            if now < (wanted := min(most, len(speed.cpus))):
                # Drivers without combined queues are rare; ethtool says so for them.
                yield Finding(
                    Level.WARN,
                    check,
                    f"{name} receives by {now} of {wanted} queues",
                    f"each queue is one processor's, and there are {len(speed.cpus)}",
                    f"ethtool -L {name} combined {wanted}",
                )
        yield from _interrupts(check, name, found, speed)


def _interrupts(check: str, name: str, found: Queues, speed: SpeedFacts) -> Iterator[Finding]:
    used = frozenset().union(*found.irqs.values()) if found.irqs else frozenset()
    wanted = min(len(found.irqs), len(speed.cpus))
    if len(used) >= wanted:
        return
    spread = zip(sorted(found.irqs), sorted(speed.cpus) * len(found.irqs), strict=False)
    yield Finding(
        Level.WARN,
        check,
        f"the {len(found.irqs)} queues of {name} interrupt {len(used)} of {len(speed.cpus)}"
        " processors",
        "the others idle while these drop packets",
        " && ".join(f"echo {cpu} > /proc/irq/{irq}/smp_affinity_list" for irq, cpu in spread)
        + "  # or let irqbalance do it: systemctl enable --now irqbalance",
    )


def _kernel(speed: SpeedFacts) -> Iterator[Finding]:
    if speed.governors & SLOW_GOVERNORS:
        governors = ", ".join(sorted(speed.governors & SLOW_GOVERNORS))
        yield Finding(
            Level.WARN,
            "speed cpu",
            f"processors save power (governor {governors})",
            "packets come in bursts, and the clock rises only after them",
            "cpupower frequency-set -g performance",
        )
    if speed.jit_harden == "2":
        yield Finding(
            Level.WARN,
            "speed jit",
            "compiled BPF programs are hardened, root's too",
            "net.core.bpf_jit_harden is 2: every constant takes instructions more; 1 hardens those"
            " of others alone",
            "sysctl -w net.core.bpf_jit_harden=1",
        )
    if speed.statistics == "1":
        yield Finding(
            Level.WARN,
            "speed statistics",
            "the kernel takes the time of every run of a BPF program",
            "kernel.bpf_stats_enabled is 1: two readings of the clock for each packet",
            "sysctl -w kernel.bpf_stats_enabled=0",
        )
    slow = {
        file: parameter
        for file, (words, parameter) in RETURNS.items()
        if words in speed.vulnerabilities.get(file, "").lower()
    }
    if slow:
        parameters = " ".join(slow.values())
        yield Finding(
            Level.WARN,
            "speed returns",
            f"every return in the kernel is slowed, against {' and '.join(slow)}",
            "the kernel and each program return many times for a packet; the mitigation keeps"
            " programs that run on this host from reading others' memory",
            f"echo 'GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX {parameters}\"'"
            " > /etc/default/grub.d/shunt.cfg && update-grub && reboot"
            "  # only where nobody but root runs programs",
        )
