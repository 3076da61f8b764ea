# SPDX-License-Identifier: Apache-2.0
"""The load balancer's program and maps: loaded, pinned, attached to interfaces, swapped.

Everything is pinned under one directory: maps/NAME and links/INTERFACE. What is pinned goes on
forwarding while no agent runs.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shunt.kern import flows, links
from shunt.kern.maps import Map, MapSpec, possible_cpus, spec_of_fd
from shunt.kern.netlink import Netlink
from shunt.kern.objects import Object, Program, open_pin, pin, unlike
from shunt.lb.compile import mapped
from shunt.lb.errors import ShuntError
from shunt.lb.frontends import lines_for
from shunt.lb.model import Limits, Settings
from shunt.lb.slots import BACKEND_BITS
from shunt.xdp import hooks, resize
from shunt.xdp.dry import DryRun

OBJECT = Path(__file__).parent / "lb.bpf.o"
PROGRAM = "shunt_lb"


def entries(limits: Limits) -> dict[str, int]:
    """The sizes of the maps that the configuration sets."""
    return {
        "services": lines_for(limits.frontends),
        "svc": limits.services,
        "svc_options": limits.services,
        "names": limits.services,
        "sources": limits.sources,
        "rates": limits.rates,
        "server_ids": limits.server_ids,
        "svc_stats": limits.services * possible_cpus(),
        "slots": limits.slots,
        "restarts": -(-limits.slots // 8),
        "backends": limits.backends,
        "backend_stats": limits.backends * possible_cpus(),
        "nexthops": limits.nexthops,
        "flows": flows.lines_for(limits.flows),
        "echo": limits.frontends,
        "nat_fwd": limits.nat,
        "nat_rev": limits.nat,
        "nat_refused": limits.backends,
    }


def fit(obj: Object) -> None:
    """Set what follows from the sizes of maps: after `set_entries`, before `load`."""
    config = obj.variable(".rodata", "config")
    for name in ("services", "flows"):
        config[f"{name}_mask"] = obj.spec(name).entries - 1
    for name, of, stats in (
        ("services", "svc", "svc_stats"),
        ("backends", "backends", "backend_stats"),
    ):
        config[name] = obj.spec(of).entries
        obj.set_entries({stats: obj.spec(of).entries * possible_cpus()})
    obj.set_entries({"svc_options": obj.spec("svc").entries})
    obj.set_entries({"nat_refused": obj.spec("backends").entries})


def configure(config: Any, settings: Settings) -> None:
    """Fill struct lb_config."""
    config["hash_seed"] = settings.hash_seed
    config["nat_key"] = [secrets.randbits(64), secrets.randbits(64)]
    for name, net in (("4", settings.ipip_source4), ("6", settings.ipip_source6)):
        address = mapped(net.network_address)
        config[f"ipip_saddr{name}"] = np.frombuffer(address, np.uint8)
        config[f"ipip_spread{name}"] = int(net.hostmask) & 0xFFFFFFFF
    for budget in ("inserts_per_s", "answers_per_s", "samples_per_s"):
        config[budget] = getattr(settings, budget)
    config["nat_port_min"] = settings.nat_port_min
    config["masquerade"] = settings.masquerade is not None
    config["handover_peer"] = settings.handover == "peer"
    config["check_mark"] = settings.check_mark << BACKEND_BITS
    config["nat_port_count"] = settings.nat_port_max - settings.nat_port_min + 1


class Datapath:
    """The program and its maps in the kernel, under one pin directory."""

    def __init__(self, bpffs: Path, path: Path = OBJECT) -> None:
        self.bpffs, self.path = bpffs, path
        self.modes: dict[str, str] = {}  # interface -> native, generic
        self._outgrown: dict[str, Map] = {}  # maps whose programs run until attach()
        self._obj: Object | None = None
        self._config: Any = None

    @property
    def maps(self) -> dict[str, Map]:
        """The maps by name."""
        return self._loaded.maps

    @property
    def programs(self) -> list[Program]:
        """The programs that are loaded."""
        return list(self._loaded.programs.values())

    @property
    def _loaded(self) -> Object:
        assert self._obj is not None, "load() comes first"
        return self._obj

    @property
    def btf(self) -> Any:
        """The object's BTF: enums and layouts."""
        return self._loaded.btf

    @property
    def config(self) -> Any:
        """The loaded program's constants (struct lb_config): another object with each `load`."""
        return self._config

    def dry_run(self) -> DryRun:
        """A program that tells what this one does, on the same maps; of use until the next `load`.

        Raises: ShuntError if the kernel refuses.
        """
        return DryRun(self._config, self.maps)

    def load(self, settings: Settings) -> None:
        """Load the program on the pinned maps, or on new ones; nothing is attached yet.

        A map whose size in `settings` is another than it was made with is copied into a new one.

        Raises: ShuntError if a pinned map is of another version, what is in it does not fit its
                new size, or the kernel refuses. The programs attached before go on.
        """
        pins = self.bpffs / "maps"
        pins.mkdir(parents=True, exist_ok=True)
        obj = Object(self.path)
        outgrown: dict[str, Map] = {}
        try:
            sizes = entries(settings.limits)
            obj.set_entries(sizes)
            fit(obj)
            configure(obj.variable(".rodata", "config"), settings)
            obj.variable(".rodata", "config")["bond"] = _bond(settings.interfaces)
            config = obj.variable(".rodata", "config").copy()
            version = int(obj.btf.enum("abi", "ABI_")["VERSION"])
            _check_version(pins, obj.spec("meta"), version, settings)
            for name in obj.map_names():
                if old := _reuse(obj, name, pins / name, sizes):
                    outgrown[name] = old
            obj.load()
            for name, old in outgrown.items():
                resize.carry(old, obj.maps[name])
            self._pin(obj, bool(outgrown))
        except BaseException:
            obj.close()
            _close_all(outgrown)
            raise
        meta = obj.maps["meta"].mapped()
        meta["hash_seed"], meta["abi"] = settings.hash_seed, version
        if self._obj is not None:
            # Whoever reads and writes the maps holds these very objects, and goes on with them.
            obj.maps, self._obj.maps = self._obj.maps, obj.maps
        self.close()
        self._obj, self._outgrown, self._config = obj, outgrown, config

    def _pin(self, obj: Object, anew: bool) -> None:
        """Pin what is not; all of them aside, if some replace what is pinned."""
        pins = self.bpffs / ("maps-new" if anew else "maps")
        if anew and pins.is_dir():
            _remove_pins(pins)  # of an attempt that was cut off
        pins.mkdir(exist_ok=True)
        for name in obj.map_names():
            if not (pins / name).exists():
                pin(obj.maps[name].fd, pins / name)

    def _replace_outgrown(self) -> None:
        """The new program runs everywhere: take over what the old one learnt until now."""
        if not self._outgrown:
            return
        for name in resize.LEARNING:
            if name in self._outgrown:
                resize.carry_rest(self._outgrown[name], self.maps[name])
        _remove_pins(self.bpffs / "maps")
        (self.bpffs / "maps-new").rename(self.bpffs / "maps")
        _close_all(self._outgrown)

    def attach(self, interfaces: Iterable[str], mode: str) -> None:
        """Attach to these interfaces and to no others; swap the program where it is attached.

        With `mode` off to none at all.
        Raises: ShuntError if one is absent, down or taken. The others are as before.
        """
        wanted = list(interfaces) if mode != "off" else []
        pins = self.bpffs / "links"
        pins.mkdir(parents=True, exist_ok=True)
        with Netlink() as netlink:
            found = {name: netlink.link(name) for name in wanted}
        fd = self._loaded.programs[PROGRAM].fd
        for name, link in found.items():
            self._attach_one(name, link.ifindex, fd, mode)
        kept = {pin_name(name) for name in found}
        for path in pins.iterdir():
            if path.name not in kept:
                links.detach_pin(path)
        self.modes = {name: self.modes[name] for name in wanted}
        # Until here packets that hooks see have gone through the programs and maps before.
        hooks.install(self._loaded, self.bpffs)
        self._replace_outgrown()

    def _attach_one(self, name: str, ifindex: int, prog_fd: int, mode: str) -> None:
        path = self.bpffs / "links" / pin_name(name)
        if path.exists():
            fd = open_pin(path)
            try:
                if links.info(fd)[0] == ifindex:
                    links.update(fd, prog_fd)
                    self.modes[name] = links.query(ifindex).mode
                    return
            finally:
                os.close(fd)
            path.unlink()  # of an interface that has gone and come again
        fd, self.modes[name] = links.attach_xdp(prog_fd, ifindex, name, mode)
        try:
            pin(fd, path)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Let go of everything; what is pinned stays in force."""
        if self._obj is not None:
            self._obj.close()
            self._obj = None
        _close_all(self._outgrown)


def _bond(interfaces: Sequence[str]) -> int:
    """The ifindex of the bond that is the only interface; 0 if it is none, or not alone."""
    with Netlink() as netlink:
        found = [link for link in netlink.links().values() if link.name in interfaces]
    return found[0].ifindex if len(interfaces) == 1 and found and found[0].kind == "bond" else 0


def _reuse(obj: Object, name: str, path: Path, sizes: dict[str, int]) -> Map | None:
    """Use the pinned map if there is one; if only its size differs, return it instead.

    Raises: ShuntError if anything else differs.
    """
    try:
        fd = open_pin(path)
    except FileNotFoundError:
        return None
    want = obj.spec(name)
    have = spec_of_fd(fd, want)
    if name in sizes and have.entries != want.entries and not unlike(want, have):
        return Map(fd, have)
    try:
        obj.reuse(name, fd, str(path))
    finally:
        os.close(fd)
    return None


def _close_all(maps: dict[str, Map]) -> None:
    for m in maps.values():
        m.close()
    maps.clear()


def _remove_pins(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
    directory.rmdir()


def _check_version(pins: Path, like: MapSpec, version: int, settings: Settings) -> None:
    """Raises: ShuntError if the pinned maps are of another version, or hashed otherwise."""
    try:
        meta = Map.pinned(pins / "meta", like)
    except FileNotFoundError:
        return
    try:
        found = meta.mapped()
        names = found.dtype.names or ()  # none: of another size, which _reuse refuses
        there = int(found["abi"][0]) if "abi" in names else 0
        seed = int(found["hash_seed"][0]) if "hash_seed" in names else None
    finally:
        meta.close()
    if there not in (0, version):
        raise ShuntError(
            f"the maps pinned in {pins} are of version {there}",
            f"this shuntd is of version {version}: it would misread them",
            "run the version that made them, or take them away with `shunt cleanup`"
            " (connections are forgotten)",
        )
    if there and seed is not None and seed != settings.hash_seed:
        raise ShuntError(
            f"hash_seed is {settings.hash_seed}, and was {seed} when these maps were made",
            "another seed sends almost every established connection to another backend",
            f"set hash_seed: {seed}, or run `shunt cleanup` first and lose the connections",
        )


def pin_name(interface: str) -> str:
    """An interface's name as a name in bpffs, which has no dots."""
    return interface.replace("%", "%25").replace(".", "%2E")


def cleanup(bpffs: Path) -> list[str]:
    """Detach all that is pinned there and remove the pins; says what it removed."""
    removed = []
    folders = (("links", links.detach_pin), ("maps", Path.unlink), ("maps-new", Path.unlink))
    for folder, remove in folders:
        directory = bpffs / folder
        if directory.is_dir():
            for path in sorted(directory.iterdir()):
                remove(path)
                removed.append(str(path))
            directory.rmdir()
    removed += hooks.cleanup(bpffs)
    if bpffs.is_dir() and not any(bpffs.iterdir()):
        bpffs.rmdir()
    return removed
