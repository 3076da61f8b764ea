# SPDX-License-Identifier: Apache-2.0
"""What doctor says would make hosts faster that are described to it, and what it reads of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from shunt.agent.doctor import Finding, Level
from shunt.agent.doctor_speed import SpeedFacts, check_speed, gather_speed
from shunt.kern.queues import Queues, cpu_list, interrupts
from shunt.lb.model import Configuration, Settings
from tests.unit.test_doctor import FACTS, NIC

CPUS = frozenset(range(4))
GOOD = SpeedFacts(
    cpus=CPUS,
    governors=frozenset({"performance"}),
    vulnerabilities={"retbleed": "Not affected", "spec_rstack_overflow": "Not affected"},
    jit_harden="0",
    statistics="0",
    queues={"eth0": Queues((1024, 4096), (4, 8), {n: frozenset({n}) for n in range(4)})},
)


def found(speed: SpeedFacts, xdp_mode: str = "auto", mode: str = "native") -> list[Finding]:
    settings = Settings(("eth0",), xdp_mode)  # type: ignore[arg-type]
    facts = replace(FACTS, devices={"eth0": replace(NIC, mode=mode)})
    return check_speed(speed, facts, Configuration(settings))


def test_a_host_that_is_well_set_up() -> None:
    (finding,) = found(GOOD)
    assert (finding.level, finding.check) == (Level.OK, "speed")


ONE = frozenset({1})


@pytest.mark.parametrize(
    ("speed", "check", "fix"),
    [
        (
            replace(GOOD, queues={"eth0": Queues(ring=(256, 4096))}),
            "speed eth0",
            "ethtool -G eth0 rx 1024",
        ),
        (
            replace(GOOD, queues={"eth0": Queues(ring=(256, 512))}),
            "speed eth0",
            "ethtool -G eth0 rx 512",
        ),
        (
            replace(GOOD, queues={"eth0": Queues(channels=(1, 16))}),
            "speed eth0",
            "ethtool -L eth0 combined 4",
        ),
        (
            replace(GOOD, queues={"eth0": Queues(irqs={7: ONE, 8: ONE, 9: ONE})}),
            "speed eth0",
            (
                "echo 0 > /proc/irq/7/smp_affinity_list && echo 1 > /proc/irq/8/smp_affinity_list"
                " && echo 2 > /proc/irq/9/smp_affinity_list"
                "  # or let irqbalance do it: systemctl enable --now irqbalance"
            ),
        ),
        (
            replace(GOOD, governors=frozenset({"performance", "powersave"})),
            "speed cpu",
            "cpupower frequency-set -g performance",
        ),
        (replace(GOOD, jit_harden="2"), "speed jit", "sysctl -w net.core.bpf_jit_harden=1"),
        (replace(GOOD, statistics="1"), "speed statistics", "sysctl -w kernel.bpf_stats_enabled=0"),
        (
            replace(GOOD, vulnerabilities={"spec_rstack_overflow": "Mitigation: Safe RET"}),
            "speed returns",
            (
                "echo 'GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX spec_rstack_overflow=off\"'"
                " > /etc/default/grub.d/shunt.cfg && update-grub && reboot"
                "  # only where nobody but root runs programs"
            ),
        ),
    ],
)
def test_what_slows_packets_is_told_with_a_command(speed: SpeedFacts, check: str, fix: str) -> None:
    (finding,) = found(speed)
    assert (finding.level, finding.check, finding.fix) == (Level.WARN, check, fix)
    assert finding.what
    assert finding.why


@pytest.mark.parametrize(
    "queues",
    [
        Queues(),  # a veth tells nothing
        Queues(ring=(128, 128), channels=(1, 1)),
        Queues(channels=(8, 8), irqs={n: frozenset({n % 4}) for n in range(8)}),
        Queues(irqs={7: ONE}),
        Queues(irqs={7: CPUS, 8: CPUS}),
    ],
)
def test_what_cannot_be_better_is_not_told(queues: Queues) -> None:
    assert [f.level for f in found(replace(GOOD, queues={"eth0": queues}))] == [Level.OK]


def test_generic_by_choice_and_gro_before_it() -> None:
    by_choice, merged = found(GOOD, "generic", "generic")
    assert "xdp: auto" in by_choice.fix
    assert merged.fix == "ethtool -K eth0 gro off"
    assert [f.level for f in found(GOOD, "auto", "native")] == [Level.OK]


def test_lists_of_processors() -> None:
    assert cpu_list("0-2,5\n") == {0, 1, 2, 5}
    assert cpu_list("\n") == frozenset()


def test_interrupts_are_those_that_packets_come_by(tmp_path: Path) -> None:
    pci = tmp_path / "sys/devices/pci0"
    (pci / "virtio0").mkdir(parents=True)
    net = tmp_path / "sys/class/net/eth0"
    net.mkdir(parents=True)
    (net / "device").symlink_to(pci / "virtio0")
    (pci / "msi_irqs").mkdir()
    for number in (24, 25, 26):
        (pci / "msi_irqs" / str(number)).touch()
    proc = tmp_path / "proc"
    for number, cpus in ((24, "0-3"), (25, "1"), (30, "2")):
        (proc / "irq" / str(number)).mkdir(parents=True)
        (proc / "irq" / str(number) / "effective_affinity_list").write_text(f"{cpus}\n")
    (proc / "interrupts").write_text(
        "           CPU0       CPU1\n"
        " 24:          0          0   PCI-MSIX-0000:00:03.0   0-edge      virtio0-config\n"
        " 25:       1234          0   PCI-MSIX-0000:00:03.0   1-edge      virtio0-input.0\n"
        " 30:       1234          0   PCI-MSIX-0000:00:04.0   1-edge      virtio1-input.0\n"
        "NMI:          0          0   Non-maskable interrupts\n"
    )
    assert interrupts("eth0", tmp_path / "sys", proc) == {25: ONE}
    assert interrupts("eth9", tmp_path / "sys", proc) == {}


def test_this_host_can_be_looked_at() -> None:
    facts = gather_speed(["lo"])
    assert facts.cpus
    assert facts.queues["lo"] == Queues()
