# SPDX-License-Identifier: Apache-2.0
"""Exit codes and errors of the command, against real HTTP servers on Unix sockets."""

import asyncio
import io
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pytest
from aiohttp import web

from shunt.cli.client import Client, Refused, Unreachable
from shunt.cli.main import run, shunt

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@contextmanager
def serving(path: Path, handler: Handler) -> Iterator[None]:
    """A server in a thread of its own that answers every request with `handler`."""
    loop = asyncio.new_event_loop()
    up, stop = threading.Event(), asyncio.Event()

    async def serve() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.UnixSite(runner, str(path)).start()
        up.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert up.wait(10)
        yield
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


def answering(status: int, body: str) -> Handler:
    async def handler(_request: web.Request) -> web.Response:
        return web.Response(status=status, text=body)

    return handler


ERROR = json.dumps({"error": {"what": "no service x", "why": "there are: y", "fix": "look"}})


def test_an_error_of_the_api_is_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s"
    with serving(path, answering(404, ERROR)):
        assert run(["--socket", str(path), "service", "show", "x"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "shunt: no service x\n  why: there are: y\n  fix: look\n")


@pytest.mark.parametrize("body", ["<html>", "", "[1]", "{}x"])
def test_somebody_else_who_answers_is_exit_code_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], body: str
) -> None:
    path = tmp_path / "s"
    with serving(path, answering(200, body)):
        assert run(["--socket", str(path), "status"]) == 3
    assert "not shuntd" in capsys.readouterr().err


def test_nobody_who_answers_is_exit_code_3(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s"
    assert run(["--socket", str(path), "status"]) == 3
    assert f"shuntd does not answer at {path}" in capsys.readouterr().err
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    assert run(["--socket", str(path), "status"]) == 3
    assert "nobody listens" in capsys.readouterr().err
    long = tmp_path / ("x" * 120)
    assert run(["--socket", str(long), "status"]) == 3
    assert "too long" in capsys.readouterr().err


def test_a_daemon_that_ends_in_the_middle_of_an_answer(tmp_path: Path) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b'{"half":')
        assert request.transport is not None
        request.transport.abort()
        return response

    path = tmp_path / "s"
    with serving(path, handler), pytest.raises(Unreachable):
        Client(path).get("status")


def test_errors_of_a_reload_are_all_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several = [{"what": f"f:{n}: bad", "why": "w", "fix": "f"} for n in (1, 2)]
    with serving(tmp_path / "s", answering(422, json.dumps({"errors": several}))):
        assert run(["--socket", str(tmp_path / "s"), "config", "reload"]) == 1
    err = capsys.readouterr().err
    assert "HTTP status 422" in err
    assert "f:1: bad\n  why: w\n  fix: f\nf:2: bad\n" in err


def test_names_are_quoted_on_their_way(tmp_path: Path) -> None:
    seen = []

    async def handler(request: web.Request) -> web.Response:
        seen.append((request.method, request.raw_path, dict(request.query)))
        return web.json_response({})

    with serving(tmp_path / "s", handler):
        client = Client(tmp_path / "s")
        client.post("services", "a/b?c", "backends", "[2001:db8::1]:80", "drain")
        client.get("flows", service="a&b", limit=None)
    assert seen == [
        ("POST", "/v1/services/a%2Fb%3Fc/backends/%5B2001%3Adb8%3A%3A1%5D%3A80/drain", {}),
        ("GET", "/v1/flows?service=a%26b", {"service": "a&b"}),
    ]


def test_a_stream_gives_each_line_as_it_comes(tmp_path: Path) -> None:
    go = threading.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(b'{"n": 1}\n{"n"')
        await asyncio.to_thread(go.wait, 10)
        await response.write(b": 2}\n")
        await response.write_eof()
        return response

    with serving(tmp_path / "s", handler):
        stream = Client(tmp_path / "s").stream("monitor")
        assert next(stream) == {"n": 1}  # before the server has said the rest
        go.set()
        assert list(stream) == [{"n": 2}]


def test_a_stream_that_is_refused(tmp_path: Path) -> None:
    with serving(tmp_path / "s", answering(400, ERROR)), pytest.raises(Refused, match="no service"):
        next(Client(tmp_path / "s").stream("monitor"))


@pytest.mark.parametrize(
    "argv",
    [["--output", "xml", "status"], ["status", "-o", "xml"], ["backend", "weight", "a", "b", "x"],
     ["nothing"], ["backend", "nothing"], ["status", "more"], ["flow", "list", "--limit", "0"]],
)  # fmt: skip
def test_what_is_no_command_is_exit_code_2(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Error: " in err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("answer", "code", "asked"), [("y\n", 0, 1), ("n\n", 1, 0), ("\n", 1, 0), ("", 130, 0)]
)
def test_what_cannot_be_taken_back_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, asked: int
) -> None:
    requests = []

    async def handler(request: web.Request) -> web.Response:
        requests.append(await request.json())
        return web.json_response({"deleted": 3})

    monkeypatch.setattr("sys.stdin", Terminal(answer))
    with serving(tmp_path / "s", handler):
        assert run(["--socket", str(tmp_path / "s"), "flow", "flush", "web"]) == code
    assert requests == [{"service": "web"}] * asked


def test_help_is_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    assert run(["backend", "drain", "-h"]) == 0
    assert "[SERVICE] BACKEND" in capsys.readouterr().out


def test_the_output_option_stands_before_or_after(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s"
    with serving(path, answering(200, json.dumps({"services": []}))):
        for argv in (
            ["--socket", str(path), "-o", "json", "service", "list"],
            ["--socket", str(path), "service", "-o", "json", "list"],
            ["--socket", str(path), "service", "list", "-o", "json"],
            ["service", "list", "--output=json", "--socket", str(path)],
        ):
            assert run(argv) == 0
            assert capsys.readouterr().out == "[]\n"
        assert run(["-o", "json", "--socket", str(path), "service", "list", "-o", "table"]) == 0
        assert capsys.readouterr().out.startswith("NAME")


def test_the_socket_may_stand_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHUNT_SOCKET", str(tmp_path / "elsewhere"))
    assert run(["status"]) == 3
    assert str(tmp_path / "elsewhere") in capsys.readouterr().err


def commands(group: click.Group, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*prefix, name))
        else:
            yield (*prefix, name)


def test_every_command_is_in_the_documents() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "cli.md").read_text()
    names = [" ".join(("shunt", *words)) for words in commands(shunt)]
    assert len(names) > 15
    assert [name for name in names if f"## {name}" not in text and f"`{name}" not in text] == []
