# SPDX-License-Identifier: Apache-2.0
"""What the API's answers have in common: JSON, and errors in their three parts."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from shunt.agent import views
from shunt.agent.service_views import Json
from shunt.lb.errors import ShuntError

log = logging.getLogger("shunt")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Refused(ShuntError):
    """A request that is answered with an error status."""

    def __init__(self, status: int, problem: ShuntError, errors: list[Json] | None = None) -> None:
        super().__init__(problem.what, problem.why, problem.fix)
        self.status, self.errors = status, errors


def answer(value: object, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(
        body=msgspec.json.encode(value) + b"\n", status=status, content_type="application/json"
    )


async def body(request: web.Request, *known: str) -> Json:
    """The request's JSON object; an empty body is an empty one.

    Raises: Refused if it is anything else, or has other keys than those that are known, if any is.
    """
    raw = await request.read()
    try:
        found = msgspec.json.decode(raw) if raw else {}
    except msgspec.DecodeError as e:
        problem = ShuntError("the request's body is not JSON", str(e), "send a JSON object")
        raise Refused(400, problem) from e
    if not isinstance(found, dict):
        problem = ShuntError(
            "the request's body is no JSON object", f"it is {raw[:40]!r}", "send a JSON object"
        )
        raise Refused(400, problem)
    if unknown := [name for name in found if known and name not in known]:
        problem = ShuntError(
            f"the request's body has an unknown key {unknown[0][:40]!r}",
            f"it has: {', '.join(known)}",
            "correct the request",
        )
        raise Refused(400, problem)
    return found


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error as JSON, in its three parts."""
    try:
        return await handler(request)
    except Refused as e:
        shown: Json = {"error": views.error(e)}
        if e.errors is not None:
            shown["errors"] = e.errors
        return answer(shown, e.status)
    except ShuntError as e:
        return answer({"error": views.error(e)}, 500)
    except web.HTTPException as e:
        problem = ShuntError(
            f"{request.method} {request.path}: {e.reason}",
            "the API has no such route" if e.status in (404, 405) else "",
            "see the routes in docs/cli.md",
        )
        response = answer({"error": views.error(problem)}, e.status)
        if "Allow" in e.headers:
            response.headers["Allow"] = e.headers["Allow"]
        return response
    except Exception:
        log.exception("%s %s", request.method, request.path)
        problem = ShuntError(
            f"{request.method} {request.path} failed",
            "a defect of shuntd; its log says where",
            "please report what `journalctl -u shuntd` shows",
        )
        return answer({"error": views.error(problem)}, 500)
