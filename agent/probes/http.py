# SPDX-License-Identifier: Apache-2.0
"""Types http and https: one request, on a connection of its own."""

from __future__ import annotations

import asyncio
import socket
import ssl
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from yarl import URL

from shunt.agent.probes import tls
from shunt.agent.probes.attempt import WELL, Done, Outcome, Target, TaskAttempt
from shunt.agent.probes.sockets import open_socket
from shunt.lb.checks import BODY_MAX, Http
from shunt.lb.model import Backend

USER_AGENT = "shunt-health"


def request(_loop: asyncio.AbstractEventLoop, target: Target, done: Done) -> TaskAttempt:
    """A check of type http or https."""
    how = target.how
    assert isinstance(how, Http)
    return TaskAttempt(target, _ask(target, how), done)


async def _ask(target: Target, how: Http) -> Outcome:
    connector = aiohttp.TCPConnector(
        force_close=True,
        limit=1,
        use_dns_cache=False,
        socket_factory=lambda _: open_socket(target, socket.SOCK_STREAM),
    )
    scheme = "https" if how.tls else "http"
    # As written: it would otherwise be encoded anew.
    url = URL(f"{scheme}://{Backend(target.address, target.port)}{how.path}", encoded=True)
    headers = {"User-Agent": USER_AGENT, "Host": how.host} if how.host else None
    try:
        async with (
            aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(),  # the scheduler's
                headers=headers or {"User-Agent": USER_AGENT},
            ) as session,
            session.request(
                how.method,
                url,
                allow_redirects=False,
                ssl=tls.context(how.tls.verify) if how.tls else True,
                server_hostname=_server_name(how, target),
            ) as answer,
        ):
            body = await _beginning(answer) if how.body else ""
            found = {
                name.lower(): ", ".join(answer.headers.getall(name)) for name in answer.headers
            }
            return _outcome(target, how.judge(answer.status, found, body))
    except aiohttp.ClientConnectorError as error:
        return _unconnected(target, error)
    except ssl.SSLError as error:
        return _outcome(target, tls.problem(error))
    except aiohttp.ServerDisconnectedError:
        return _outcome(target, "the connection ended without an answer")
    except (aiohttp.ClientError, ValueError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        return _outcome(target, f"no HTTP answer: {str(error).splitlines()[0][:120]}")


async def _beginning(answer: aiohttp.ClientResponse) -> str:
    """The first BODY_MAX bytes of the body."""
    found = b""
    while len(found) < BODY_MAX:
        more = await answer.content.read(BODY_MAX - len(found))
        if not more:
            break
        found += more
    return found.decode(errors="replace")


def _server_name(how: Http, target: Target) -> str | None:
    if how.tls is None:
        return None
    return how.tls.server_name or _host_alone(how.host) or str(target.address)


def _host_alone(host: str) -> str:
    """A Host header without its port."""
    return urlsplit(f"//{host}").hostname or ""


def _unconnected(target: Target, error: aiohttp.ClientConnectorError) -> Outcome:
    cause: Any = error.os_error
    certificate = getattr(error, "certificate_error", None)
    if isinstance(certificate, ssl.SSLError):
        return _outcome(target, tls.problem(certificate))
    if isinstance(cause, ssl.SSLError):
        return _outcome(target, tls.problem(cause))
    raise cause


def _outcome(target: Target, reason: str) -> Outcome:
    return Outcome(f"{target.where}: {reason}") if reason else WELL
