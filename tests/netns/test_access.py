# SPDX-License-Identifier: Apache-2.0
"""Who may use the socket, with real processes of other users; the hosts are in shunt_host."""

from __future__ import annotations

import json
import socket
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from shunt.agent.peers import Peer, may_use, peer_of
from shunt.lab.netns import Process
from tests.netns.shunt_host import Host

GID = 64999  # nobody has it on this machine: the group is told to the daemon alone
USER, GROUP = 65534, 65534


def asked_by(sock: Path, uid: int, gid: int, groups: Sequence[int] = ()) -> tuple[int, str]:
    """The status of an answer, or 0 if the socket could not be connected; and what was said."""
    more = ["--groups", ",".join(map(str, groups))] if groups else ["--clear-groups"]
    done = subprocess.run(
        ["setpriv", f"--reuid={uid}", f"--regid={gid}", *more,
         "curl", "-s", "-w", "\n%{http_code}", "--unix-socket", str(sock),
         "http://localhost/v1/errors"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    body, _, code = done.stdout.rpartition("\n")
    return int(code), body


def test_the_peer_is_asked_for_even_if_the_mode_lets_it_in(host: Host) -> None:
    host.sock.chmod(0o666)
    before = stat.S_IMODE(host.run.stat().st_mode)
    host.run.chmod(0o755)
    try:
        code, said = asked_by(host.sock, USER, GROUP)
        assert code == 403
        error = json.loads(said)["error"]
        assert error["what"] == f"user {USER} may not use this socket"
        assert "usermod" in error["fix"]
        assert asked_by(host.sock, USER, 0)[0] == 403  # root's group is not root
        assert asked_by(host.sock, 0, 0)[0] == 200
    finally:
        host.sock.chmod(0o660)
        host.run.chmod(before)


def test_the_group_is_let_in(own: Host) -> None:
    """The daemon sees an /etc/group with `shunt` in it, in a mount namespace of its own."""
    groups = own.directory / "group"
    groups.write_text(f"root:x:0:\nshunt:x:{GID}:\n")
    script = 'mount --bind "$0" /etc/group && exec "$@"'
    own.process = own.here.start(
        ["unshare", "--mount", "sh", "-c", script, str(groups), *own.argv()], own.log
    )
    assert isinstance(own.process, Process)
    own.until(lambda: own.shunt("service", "list").code == 0, "answers")
    found = own.sock.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (0, GID, 0o660)
    assert asked_by(own.sock, USER, GID)[0] == 200
    assert asked_by(own.sock, USER, GROUP, [4, GID])[0] == 200
    assert asked_by(own.sock, USER, GROUP, [4, 5])[0] == 0
    assert asked_by(own.sock, 0, 0)[0] == 200


@pytest.mark.parametrize(
    ("peer", "groups", "may"),
    [
        (Peer(1, 0, frozenset({0})), [], True),
        (Peer(1, 7, frozenset({0})), [], False),
        (Peer(1, 7, frozenset({0, 9})), [9], True),
        (Peer(1, 7, frozenset({0, 9})), [10], False),
        (Peer(1, 8, frozenset()), [], True),  # the daemon's own user
    ],
)
def test_who_may(peer: Peer, groups: list[int], may: bool) -> None:
    assert may_use(peer, 8, groups) is may


def test_the_kernel_says_who_it_is() -> None:
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        assert peer_of(one).uid == 0
        assert 0 in peer_of(one).groups
