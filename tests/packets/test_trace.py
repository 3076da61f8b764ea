# SPDX-License-Identifier: Apache-2.0
"""What the kernel loses of what programs sent is counted, by interface, kind and error.

Each loss is a real one: frames through the kernel's own paths, over a veth whose end `far` does not
poll.
"""

from __future__ import annotations

import ctypes as c
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shunt.kern import libbpf, links
from shunt.kern.features import xdp_tracepoints
from shunt.xdp.trace import Loss, Trace, error_name
from tests.packets.private import in_namespace

PAIR = ["link add near type veth peer name far", "link set near up", "link set far up"]
FRAME = bytes.fromhex("020000000002020000000001") + b"\x08\x00" + bytes(50)
FRAMES = 7
BPF_PROG_TYPE_XDP, BPF_F_TEST_XDP_LIVE_FRAMES = 6, 2
BPF_FUNC_REDIRECT = 23
EXIT = struct.pack("<BBhi", 0x95, 0, 0, 0)


def returns(verdict: int) -> bytes:
    return struct.pack("<BBhi", 0xB7, 0, 0, verdict) + EXIT


def redirects(ifindex: int) -> bytes:
    arguments = struct.pack("<BBhi", 0xB7, 1, 0, ifindex) + struct.pack("<BBhi", 0xB7, 2, 0, 0)
    return arguments + struct.pack("<BBhi", 0x85, 0, 0, BPF_FUNC_REDIRECT) + EXIT


@contextmanager
def loaded(instructions: bytes) -> Iterator[int]:
    load = libbpf.lib().bpf_prog_load
    load.argtypes = (c.c_int, c.c_char_p, c.c_char_p, c.c_char_p, c.c_size_t, c.c_void_p)
    fd = load(BPF_PROG_TYPE_XDP, b"t", b"GPL", instructions, len(instructions) // 8, None)
    assert fd >= 0, os.strerror(-fd)
    try:
        yield fd
    finally:
        os.close(fd)


def send_live(instructions: bytes, frame: bytes = FRAME) -> None:
    """Frames that come in on `near`, really sent where the program says."""
    metadata = struct.pack("=6I", 0, len(frame), 0, socket.if_nametoindex("near"), 0, 0)
    data, context = c.create_string_buffer(frame, len(frame)), c.create_string_buffer(metadata, 24)
    opts = libbpf.TestRunOpts(
        sz=c.sizeof(libbpf.TestRunOpts),
        data_in=c.addressof(data),
        data_size_in=len(frame),
        ctx_in=c.addressof(context),
        ctx_size_in=24,
        repeat=FRAMES,
        flags=BPF_F_TEST_XDP_LIVE_FRAMES,
    )
    with loaded(instructions) as program:
        libbpf.call("bpf_prog_test_run_opts", program, opts)


def losses_of(send: Callable[[], None]) -> list[Loss]:
    """What is counted in a namespace with the pair while something is sent."""
    if not xdp_tracepoints().present:
        pytest.skip("needs xdp_tracepoints")

    def work() -> list[Loss]:
        trace = Trace()
        try:
            assert trace.losses() == []
            send()
            deadline = time.monotonic() + 30
            while sum(loss.frames for loss in trace.losses()) < FRAMES:
                assert time.monotonic() < deadline, trace.losses()
                time.sleep(0.01)
            return trace.losses()
        finally:
            trace.close()

    return in_namespace(work, PAIR)


def test_a_driver_that_takes_no_frames() -> None:
    """Since Linux 6.3 the kernel asks it first."""
    (found,) = losses_of(lambda: send_live(returns(libbpf.XDP_TX)))
    assert (found.interface, found.frames) == ("near", FRAMES)
    assert (found.kind, found.error) in (("REDIRECT", "EOPNOTSUPP"), ("XMIT", "ENXIO"))


def test_a_driver_that_does_not_take_these_frames() -> None:
    """They are longer than what the other end takes, which polls."""

    def send() -> None:
        subprocess.run(["ethtool", "-K", "far", "gro", "on"], check=True)
        subprocess.run(["ip", "link", "set", "far", "mtu", "68"], check=True)
        send_live(returns(libbpf.XDP_TX), FRAME + bytes(100))

    assert losses_of(send) == [Loss("near", "XMIT", "", FRAMES)]


def test_a_redirect_to_nowhere() -> None:
    found = losses_of(lambda: send_live(redirects(9999)))
    assert found == [Loss("near", "REDIRECT", "EINVAL", FRAMES)]


@pytest.mark.parametrize(
    ("verdict", "kind"), [(libbpf.XDP_ABORTED, "ABORTED"), (77, "ABORTED"), (libbpf.XDP_TX, "TX")]
)
def test_a_program_on_the_way(verdict: int, kind: str) -> None:
    """Frames arrive from `far`; `near` sends those of XDP_TX to where nobody polls."""

    def send() -> None:
        with loaded(returns(verdict)) as program:
            link, _ = links.attach_xdp(program, socket.if_nametoindex("near"), "near", "native")
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
                sender.bind(("far", 0))
                for _ in range(FRAMES):
                    sender.send(FRAME)
            time_out = time.monotonic() + 30
            while received() < FRAMES and time.monotonic() < time_out:
                time.sleep(0.01)
            os.close(link)

    (found,) = losses_of(send)
    assert (found.interface, found.kind) == ("near", kind)
    assert found.frames >= FRAMES


def received() -> int:
    lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
    (line,) = (line for line in lines if line.strip().startswith("near:"))
    return int(line.partition(":")[2].split()[1])


def test_other_namespaces_are_not_counted() -> None:
    """Both pairs have the same indexes."""
    if not xdp_tracepoints().present:
        pytest.skip("needs xdp_tracepoints")

    def work() -> list[Loss]:
        trace = Trace()
        try:
            in_namespace(lambda: send_live(returns(libbpf.XDP_TX)), PAIR)
            return trace.losses()
        finally:
            trace.close()

    assert in_namespace(work, PAIR) == []


def test_errors_have_their_names() -> None:
    assert (error_name(0), error_name(6), error_name(4096)) == ("", "ENXIO", "4096")
    assert error_name(95) == "EOPNOTSUPP"
