# SPDX-License-Identifier: Apache-2.0
"""The API's client: HTTP over shuntd's Unix socket, with the standard library alone."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from shunt.cli.progress import progress
from shunt.lb.errors import ShuntError

# A reload of a large configuration takes seconds; longer means that nobody is there.
TIMEOUT_S = 60.0
Json = dict[str, Any]


class Unreachable(ShuntError):
    """The daemon does not answer."""


class Refused(ShuntError):
    """The daemon answered with an error. `errors`: each of them, where there are several."""

    def __init__(self, status: int, answer: Json) -> None:
        error = answer.get("error", {})
        super().__init__(
            error.get("what") or f"shuntd answered with HTTP status {status}",
            error.get("why", ""),
            error.get("fix", ""),
        )
        self.status = status
        self.errors: list[Json] = answer.get("errors", [])


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout_s: float | None) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(os.fspath(self._path))


class Client:
    """Requests to the daemon that listens at `path`.

    Every method raises Unreachable if it does not answer, and Refused if it says no.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def get(self, *parts: str, **query: object) -> Any:
        """What is at /v1/PARTS, each quoted; parameters that are None are left out."""
        return self._request("GET", parts, query)

    def post(self, *parts: str, body: Json | None = None) -> Any:
        return self._request("POST", parts, {}, body)

    def put(self, *parts: str, body: Json | str, headers: Mapping[str, str] | None = None) -> Any:
        """With a body that is text: YAML."""
        return self._request("PUT", parts, {}, body, headers)

    def delete(self, *parts: str, headers: Mapping[str, str] | None = None) -> Any:
        return self._request("DELETE", parts, {}, None, headers)

    def stream(self, *parts: str, **query: object) -> Iterator[Json]:
        """The objects of an endless answer, as they come."""
        connection = _UnixConnection(self.path, TIMEOUT_S)
        try:
            response = self._ask(connection, "GET", parts, query)
            if response.status >= 400:
                raise Refused(response.status, _decode(response.read()))
            if connection.sock is not None:
                connection.sock.settimeout(None)  # there may be nothing to say for hours
            while line := response.readline():
                yield _decode(line)
        except (OSError, http.client.HTTPException) as e:
            raise self._unreachable(e) from e
        finally:
            connection.close()

    def text(self, *parts: str) -> Iterator[str]:
        """An answer that is no JSON, line by line."""
        connection = _UnixConnection(self.path, TIMEOUT_S)
        try:
            response = self._ask(connection, "GET", parts, {})
            if response.status >= 400:
                raise Refused(response.status, _decode(response.read()))
            while line := response.readline():
                yield line.decode()
        except (OSError, http.client.HTTPException) as e:
            raise self._unreachable(e) from e
        finally:
            connection.close()

    def _request(
        self,
        method: str,
        parts: tuple[str, ...],
        query: Json,
        body: Json | str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Any:
        connection = _UnixConnection(self.path, TIMEOUT_S)
        try:
            with progress("waiting for shuntd"):
                response = self._ask(connection, method, parts, query, body, headers)
                raw = response.read()
        except (OSError, http.client.HTTPException) as e:
            raise self._unreachable(e) from e
        finally:
            connection.close()
        answer = _decode(raw)
        if response.status >= 400:
            raise Refused(response.status, answer)
        return answer

    @staticmethod
    def _ask(
        connection: _UnixConnection,
        method: str,
        parts: tuple[str, ...],
        query: Json,
        body: Json | str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> http.client.HTTPResponse:
        path = "/v1/" + "/".join(quote(part, safe="") for part in parts)
        given = {key: value for key, value in query.items() if value is not None}
        url = f"{path}?{urlencode(given)}" if given else path
        given_headers = dict(headers or {})
        raw = None
        if body is not None:
            is_text = isinstance(body, str)
            raw = (body if isinstance(body, str) else json.dumps(body)).encode()
            given_headers["Content-Type"] = f"application/{'yaml' if is_text else 'json'}"
        connection.request(method, url, raw, given_headers)
        return connection.getresponse()

    def _unreachable(self, error: Exception) -> Unreachable:
        what = f"shuntd does not answer at {self.path}"
        if isinstance(error, FileNotFoundError):
            return Unreachable(
                what,
                "there is no such socket",
                "start it (systemctl start shuntd), or name its socket with --socket",
            )
        if isinstance(error, ConnectionRefusedError):
            return Unreachable(
                what,
                "the socket is there, but nobody listens: it has ended without removing it",
                "systemctl start shuntd; why it ended: journalctl -u shuntd",
            )
        if isinstance(error, PermissionError):
            return Unreachable(
                what,
                "this user may not use the socket",
                "use sudo, or join the group shunt: usermod -aG shunt $USER",
            )
        if isinstance(error, TimeoutError):
            why = f"no answer within {TIMEOUT_S:g} s"
            return Unreachable(what, why, "journalctl -u shuntd says what it does")
        why = str(error) or type(error).__name__
        return Unreachable(what, why, "journalctl -u shuntd says what happened")


def _decode(raw: bytes) -> Json:
    try:
        found = json.loads(raw)
    except ValueError as e:
        raise Unreachable(
            "who answers is not shuntd",
            f"the answer is not JSON: {raw[:60]!r}",
            "name shuntd's socket with --socket",
        ) from e
    if not isinstance(found, dict):
        raise Unreachable("who answers is not shuntd", "", "name shuntd's socket with --socket")
    return found
