# SPDX-License-Identifier: Apache-2.0
"""What is wanted, and getting it in force: the files, and what the API adds to them.

One change after another. What is kept under the state directory is written before it is in force,
so that an answered request survives whatever comes; a change that cannot be in force is taken back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

import msgspec
from yaml.nodes import Node as Tree

from shunt.agent.events import Event, about
from shunt.agent.node import Node
from shunt.agent.sources.file import FileSource
from shunt.agent.sources.merge import API, Draft, Loaded, plain, read_service
from shunt.agent.sources.problems import ConfigErrors, Problems
from shunt.agent.sources.store import State, Store
from shunt.agent.sources.typed import Reader
from shunt.lb.errors import ShuntError

log = logging.getLogger("shunt")

Check = Callable[[], None]
Services = Mapping[str, dict[str, Any]]


class Overruled(ConfigErrors):
    """A service is right in itself, and others have what it wants."""


class Intent:
    """The sources, and the node that does what they say."""

    def __init__(
        self,
        node: Node,
        files: FileSource,
        store: Store,
        follow: Callable[[], Awaitable[None]],
        settled: Callable[[], Awaitable[bool]],
    ) -> None:
        """`follow` is awaited after each change: for what does not belong to forwarding.

        `settled` is awaited before files are read, and says whether one was just being written.
        """
        self.node, self.files, self.store = node, files, store
        self.follow, self.settled = follow, settled
        self._state = State()
        self._changing = asyncio.Lock()

    def start(self) -> None:
        """Have the node start with what is wanted.

        Raises: ShuntError. What forwarded before goes on as it was.
        """
        began = time.monotonic()
        self._state = self.store.read()
        loaded = self.files.merged(self._state)
        self._keep(State(self._state.services, loaded.vips))
        self._tell(loaded)
        read = time.monotonic()
        self.node.start(loaded.configuration)
        self.node.counts.first_apply_s = time.monotonic() - read
        self.node.counts.read_s = read - began

    async def load(self) -> list[str]:
        """Put the files in force; returns the errors, none if they are."""
        async with self._changing:
            self.node.counts.reloads += 1
            try:
                loaded = await self._merged(self._state, self._in_force())
                await self._put(loaded, self._state.services)
            except ConfigErrors as e:
                in_force = f"the running configuration (generation {self.node.generation})"
                self._refuse([error.text(f"{in_force} is still in force") for error in e.errors])
            except ShuntError as e:
                self._refuse([str(e)])
            else:
                self.node.errors = []
                return []
            await self.follow()
            return self.node.errors

    async def _merged(
        self,
        state: State,
        must: Collection[str],
        newest: tuple[Draft, Problems] | None = None,
    ) -> Loaded:
        """The files with services of the API; no file while somebody writes it.

        Raises: as `FileSource.merged`.
        """
        await self.settled()
        while True:
            error: ConfigErrors | None = None
            try:
                loaded = await asyncio.to_thread(self.files.merged, state, must, newest)
            except ConfigErrors as e:
                error = e
            # Errors of a newest one are noted once.
            if newest is None and await self.settled():
                continue
            if error is not None:
                raise error
            return loaded

    def _refuse(self, errors: list[str]) -> None:
        self.node.errors = errors
        self.node.counts.refused += 1
        for error in errors:
            log.error("%s", error)
        log.error(
            "the new configuration is refused; generation %d is still in force",
            self.node.generation,
            extra=about(Event.REFUSED, generation=self.node.generation, errors=len(errors)),
        )

    async def put_service(self, name: str, tree: Tree, file: str, check: Check) -> bool:
        """Add or replace a service of the API; whether it is new.

        Raises: ConfigErrors with all errors of it; Overruled if others have what it wants;
                ShuntError if it cannot be in force or kept, or what `check` raises. Nothing has
                changed then.
        """
        async with self._changing:
            check()
            problems = Problems()
            reader = Reader(file, problems)
            entry = read_service(reader, tree)
            if entry is not None and isinstance(entry.name, str) and entry.name != name:
                what, why = f'name {entry.name} is not "{name}"', f"the request is for {name}"
                reader.error(("name",), what, why, "use one name in both places")
            if entry is None:
                problems.raise_any()
                raise AssertionError("a service that is none has no error")
            # What others have is as told as what is wrong in itself: all at once.
            draft = Draft(reader, (), msgspec.structs.replace(entry, name=name))
            loaded = await self._merged(self._state, self._in_force() - {name}, (draft, problems))
            if errors := loaded.aside.get(name):
                raise (Overruled if name in loaded.overruled else ConfigErrors)(errors)
            new = name not in self._state.services
            await self._put(loaded, {**self._state.services, name: plain(entry)})
            log.info("service %s of the API is in force", name)
            return new

    async def remove_service(self, name: str, check: Check) -> None:
        """Remove a service of the API; one that is set aside, too.

        Raises: ShuntError if the API has none of this name; else as `put_service`.
        """
        async with self._changing:
            check()
            if name not in self._state.services:
                raise self._not_ours(name)
            services = {n: s for n, s in self._state.services.items() if n != name}
            state = State(services, self._state.vips)
            loaded = await self._merged(state, self._in_force() - {name})
            await self._put(loaded, services)
            log.info("service %s of the API is removed", name)

    def _not_ours(self, name: str) -> ShuntError:
        if name in self.node.origins:
            place = self.node.origins[name]
            return ShuntError(
                f"service {name} is not the API's", f"it stands at {place}", "remove it there"
            )
        names = ", ".join(sorted(self._state.services)) or "none"
        return ShuntError(
            f"no service {name}", f"the API added: {names}", "see `shunt service list`"
        )

    def is_ours(self, name: str) -> bool:
        """Whether the API has a service of this name, set aside or not."""
        return name in self._state.services

    def _in_force(self) -> set[str]:
        return {name for name, origin in self.node.origins.items() if origin == API}

    async def _put(self, loaded: Loaded, services: Services) -> None:
        """Keep it, then have it in force; both or neither. Raises: ShuntError."""
        before, told = self._state, (self.node.aside, self.node.origins)
        await asyncio.to_thread(self._keep, State(services, loaded.vips))
        self._tell(loaded)  # who watches is told of a change while it is made
        try:
            if loaded.configuration != self.node.configuration:
                for _ in self.node.configuring(loaded.configuration):
                    await asyncio.sleep(0)  # others have a turn
                log.info(
                    "in force: generation %d",
                    self.node.generation,
                    extra=about(Event.IN_FORCE, generation=self.node.generation),
                )
        except ShuntError:
            self.node.aside, self.node.origins = told
            await asyncio.to_thread(self._keep, before)
            raise
        self.node.errors = []
        await self.follow()

    def _keep(self, state: State) -> None:
        if state != self._state:
            self.store.write(state)
            self._state = state

    def _tell(self, loaded: Loaded) -> None:
        aside = {name: [str(e) for e in errors] for name, errors in loaded.aside.items()}
        for name in aside.keys() - self.node.aside.keys():
            log.warning("service %s of the API is set aside: %s", name, "\n".join(aside[name]))
        self.node.aside = aside
        self.node.origins = dict(loaded.origins)
