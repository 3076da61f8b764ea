# SPDX-License-Identifier: Apache-2.0
"""The API's routes that change services, and what they are changed from: pools."""

from __future__ import annotations

import re

import msgspec
from aiohttp import web
from yaml.nodes import Node as Tree

from shunt.agent import service_views
from shunt.agent.answers import Refused, answer
from shunt.agent.intent import Check, Intent, Overruled
from shunt.agent.node import Node
from shunt.agent.service_views import Json
from shunt.agent.sources.document import compose
from shunt.agent.sources.problems import ConfigErrors, Problems
from shunt.agent.sources.tree import TooDeep, node_of
from shunt.ipam.pools import size
from shunt.lb.errors import ShuntError
from shunt.lb.lookup import find_service

# Some 50,000 backends.
SERVICE_MAX = 4 << 20
REQUEST = "request"  # what errors call the body, as they call a file by its name
YAML = {"application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml"}
_ETAG = re.compile(r'\s*(?:W/)?"([0-9]{1,20})"\s*')


class Edits:
    """Services of the API."""

    def __init__(self, node: Node, intent: Intent) -> None:
        self.node, self.intent = node, intent

    def routes(self) -> list[web.RouteDef]:
        return [
            web.put("/v1/services/{service}", self._put),
            web.delete("/v1/services/{service}", self._delete),
            web.get("/v1/pools", self._pools),
        ]

    async def _put(self, request: web.Request) -> web.Response:
        name = request.match_info["service"]
        tree = await _tree(request)
        try:
            new = await self.intent.put_service(name, tree, REQUEST, self._check(request, name))
        except Refused:
            raise
        except ConfigErrors as e:
            status = 409 if isinstance(e, Overruled) else 422
            raise _refused(status, name, e, self.node.generation) from e
        except ShuntError as e:
            raise Refused(409, e) from e
        assert self.node.configuration is not None
        found = find_service(self.node.configuration, name)
        shown = await service_views.service(self.node, found)
        return tagged(answer(shown, 201 if new else 200), self.node)

    async def _delete(self, request: web.Request) -> web.Response:
        name = request.match_info["service"]
        known = self.intent.is_ours(name) or name in self.node.origins
        try:
            await self.intent.remove_service(name, self._check(request, name))
        except Refused:
            raise
        except ConfigErrors as e:
            raise _refused(409, name, e, self.node.generation) from e
        except ShuntError as e:
            raise Refused(409 if known else 404, e) from e
        return tagged(answer({"generation": self.node.generation}), self.node)

    async def _pools(self, _request: web.Request) -> web.Response:
        return answer({"pools": pools(self.node)})

    def _check(self, request: web.Request, name: str) -> Check:
        """What If-Match and If-None-Match ask for, looked at when nothing else can change it."""

        def check() -> None:
            wanted, unwanted = request.headers.get("If-Match"), request.headers.get("If-None-Match")
            known = self.intent.is_ours(name) or name in self.node.origins
            if wanted is not None and not (known if wanted.strip() == "*" else self._is(wanted)):
                raise Refused(412, _changed(f"If-Match: {wanted}", self.node.generation))
            if unwanted is not None and (known if unwanted.strip() == "*" else self._is(unwanted)):
                raise Refused(412, _there(name) if known else _changed(unwanted, 0))

        return check

    def _is(self, tags: str) -> bool:
        """Whether one of the entity tags is the generation in force."""
        found = [_ETAG.fullmatch(tag) for tag in tags.split(",")]
        if not all(found):
            raise Refused(
                400,
                ShuntError(
                    f"{tags[:40]!r} is no generation",
                    "an entity tag is the number of a generation in quotes, as answers have it",
                    'send If-Match: "41", or no such header',
                ),
            )
        return any(match and int(match[1]) == self.node.generation for match in found)


def tagged(response: web.Response, node: Node) -> web.Response:
    """An answer that says of which generation it is."""
    response.headers["ETag"] = f'"{node.generation}"'
    return response


def pools(node: Node) -> list[Json]:
    """Every pool: how many addresses it has, and who has which."""
    assert node.configuration is not None
    shown: list[Json] = []
    for pool in node.configuration.pools:
        shown.append(
            {
                "name": pool.name,
                "networks": [str(network) for network in pool.networks],
                # Text, since an IPv6 pool has more than a number of JSON can say.
                "size": str(size(pool.networks)),
                "given": [
                    {"service": service, "vip": str(address)} for service, address in pool.given
                ],
            }
        )
    return shown


async def _tree(request: web.Request) -> Tree:
    """The body, YAML or JSON, as what is read from a file. Raises: Refused."""
    raw = await request.clone(client_max_size=SERVICE_MAX).read()
    problems = Problems()
    if request.content_type in YAML:
        try:
            document = compose(REQUEST, raw.decode(), problems)
            problems.raise_any()
        except UnicodeDecodeError as e:
            raise _no_service("it is not UTF-8 text") from e
        except ConfigErrors as e:
            raise _refused(400, request.match_info["service"], e) from e
        if document is None or document.root is None:
            raise _no_service("it is empty")
        return document.root
    try:
        return node_of(msgspec.json.decode(raw))
    except (msgspec.DecodeError, RecursionError, TooDeep) as e:
        raise _no_service(str(e)) from e


def _no_service(why: str) -> Refused:
    fix = "send a service as JSON, or as YAML with Content-Type: application/yaml"
    return Refused(400, ShuntError("the request's body is no service", why, fix))


def _refused(status: int, name: str, e: ConfigErrors, generation: int | None = None) -> Refused:
    count = len(e.errors)
    shown = [{"what": f"{x.place}: {x.what}", "why": x.why, "fix": x.fix} for x in e.errors]
    in_force = "nothing has changed"
    if generation is not None:
        in_force = f"generation {generation} is still in force"
    what = f"service {name} is refused: {count} error{'s' * (count != 1)}"
    return Refused(status, ShuntError(what, in_force, "correct them, and send it again"), shown)


def _changed(asked: str, generation: int) -> ShuntError:
    return ShuntError(
        f"it has changed meanwhile ({asked[:60]})",
        f"generation {generation} is in force",
        "look at it again, and send the change with that generation if it is still wanted",
    )


def _there(name: str) -> ShuntError:
    return ShuntError(
        f"there is a service {name} already",
        "the request asks to add one, not to replace it",
        "give it another name, or replace it: shunt service add --replace",
    )
