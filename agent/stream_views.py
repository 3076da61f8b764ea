# SPDX-License-Identifier: Apache-2.0
"""Of the sockets that are listed, which pass TCP by, and why others do not: both ends of each."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shunt.agent.service_views import Json, names
from shunt.kern.btf import Btf
from shunt.kern.maps import Map

SYN_SENT = 2  # net/tcp_states.h
OFF: Json = {"stream": "off", "stream_why": "", "stream_messages": 0, "stream_bytes": 0}
# Asked for, but the socket keeps nothing: brief, or older than that.
UNPAIRED: Json = {**OFF, "stream": "tcp", "stream_why": "UNPAIRED"}


class Ends:
    """The ends of streams at one moment, and the records of their connections."""

    def __init__(self, ends: NDArray[Any], maps: Mapping[str, Map], btf: Btf) -> None:
        """`ends` are rows of sockops.listing, `maps` the streams' own, `btf` has their types."""
        self._events: Any = names(btf, "stream_event", "STREAM_")
        side: Any = names(btf, "stream_side", "STREAM_")
        streams = ends["stream"]
        self._clients = self._of(ends, streams["side"] == side.CLIENT, "pair")
        self._servers = self._of(ends, streams["side"] == side.SERVER, "pair", "first_in")
        self._pairs: dict[int, Any] = {}
        self._optins: set[int] = set()
        if maps:
            keys, pairs = maps["stream_pairs"].items()
            self._pairs = dict(zip((int(key) for key in keys), pairs, strict=True))
            self._optins = {int(key) for key in maps["stream_optins"].items()[0]}

    @staticmethod
    def _of(ends: NDArray[Any], which: NDArray[np.bool_], *fields: str) -> dict[Any, Any]:
        chosen = ends[which]
        keys = zip(*(chosen["stream"][field].tolist() for field in fields), strict=True)
        return dict(zip(keys, chosen, strict=True))

    def client(self, cookie: int) -> Any:
        """The end of the client's socket that has this cookie; None if it has none."""
        return self._clients.get((cookie,))

    def server(self, client: Any) -> Any:
        """The other end of a client's. What is left of a connection before has other numbers."""
        mine = client["stream"]
        found = self._servers.get((int(mine["pair"]), int(mine["first_out"])))
        if found is None or found["stream"]["first_out"] != mine["first_in"]:
            return None
        return found

    def shown(self, end: Any) -> Json:
        """What has become of an end's stream."""
        stream = end["stream"]
        way, why = self._way(stream, int(end["socket"]["state"]) == SYN_SENT)
        return {
            "stream": way,
            "stream_why": why.name if why else "",
            "stream_messages": int(stream["messages"]),
            "stream_bytes": int(stream["bytes"]),
        }

    def _way(self, stream: Any, dialling: bool) -> tuple[str, IntEnum | None]:
        """As judge() of sockops/stream.bpf.c would have the next message."""
        events, pair = self._events, self._pair(stream)
        why = int(stream["why"])
        if not why and pair is None:
            if dialling:
                return "opening", None
            why = events.TO_TCP_ENDED
        why = why or int(pair["why"])
        if not why and int(stream["svc"]) not in self._optins:
            why = events.TO_TCP_OPTED_OUT
        if why:
            return "tcp", events(why)
        return ("redirected" if pair["ready"] else "opening"), None

    def _pair(self, stream: Any) -> Any:
        """As find_pair() of sockops/dial.h; None if there is none."""
        pair = self._pairs.get(int(stream["pair"]))
        if pair is None:
            return None
        first = {(int(pair[name]) + 1) & 0xFFFFFFFF for name in ("client_isn", "server_isn")}
        return pair if first == {int(stream["first_out"]), int(stream["first_in"])} else None
