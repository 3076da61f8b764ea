# SPDX-License-Identifier: Apache-2.0
"""The distribution's libbpf (1.1 or later) through ctypes: signatures and errno, nothing else."""

from __future__ import annotations

import ctypes as c
import ctypes.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

from shunt.lb.errors import ShuntError

P, INT, U, Z = c.c_void_p, c.c_int, c.c_uint32, c.c_size_t
PrintFn = c.CFUNCTYPE(INT, INT, c.c_char_p, P)
SampleFn = c.CFUNCTYPE(INT, P, P, Z)

# bpf_cmd-independent constants of <linux/bpf.h>, which has no Python face.
BPF_ANY, BPF_NOEXIST, BPF_EXIST = 0, 1, 2
BPF_TRACE_ITER, BPF_XDP, BPF_TCX_INGRESS, BPF_TCX_EGRESS = 28, 37, 46, 47
MAP_HASH, MAP_ARRAY, MAP_PROG_ARRAY, MAP_PERCPU_ARRAY = 1, 2, 3, 6
MAP_LRU_HASH, MAP_LPM_TRIE, MAP_SOCKHASH, MAP_RINGBUF = 9, 11, 18, 27
BPF_SK_MSG_VERDICT = 7
PROG_TYPE_XDP = 6
BPF_F_MMAPABLE = 1 << 10
BPF_TC_INGRESS, BPF_TC_EGRESS, BPF_TC_F_REPLACE = 1, 2, 1
XDP_FLAGS_SKB_MODE, XDP_FLAGS_DRV_MODE = 1 << 1, 1 << 2
TC_ACT_UNSPEC, TC_ACT_SHOT, TC_ACT_REDIRECT = -1, 2, 7  # UNSPEC: TCX_NEXT, to other programs
XDP_ABORTED, XDP_DROP, XDP_PASS, XDP_TX, XDP_REDIRECT = range(5)


class BatchOpts(c.Structure):
    """struct bpf_map_batch_opts"""

    _fields_ = (("sz", Z), ("elem_flags", c.c_uint64), ("flags", c.c_uint64))


class LinkCreateOpts(c.Structure):
    """struct bpf_link_create_opts, up to the part that XDP, TCX and iterators use"""

    _fields_ = (
        ("sz", Z),
        ("flags", U),
        ("iter_info", P),
        ("iter_info_len", U),
        ("target_btf_id", U),
        ("cookie", c.c_uint64),
        ("pad", c.c_uint64 * 4),
    )


class XdpQueryOpts(c.Structure):
    """struct bpf_xdp_query_opts"""

    _fields_ = (
        ("sz", Z),
        ("prog_id", U),
        ("drv_prog_id", U),
        ("hw_prog_id", U),
        ("skb_prog_id", U),
        ("attach_mode", c.c_uint8),
    )


class TcHook(c.Structure):
    """struct bpf_tc_hook"""

    _fields_ = (("sz", Z), ("ifindex", INT), ("attach_point", INT), ("parent", U))


class TcOpts(c.Structure):
    """struct bpf_tc_opts"""

    _fields_ = (
        ("sz", Z),
        ("prog_fd", INT),
        ("flags", U),
        ("prog_id", U),
        ("handle", U),
        ("priority", U),
    )


class ProgLoadOpts(c.Structure):
    """struct bpf_prog_load_opts"""

    _fields_ = (
        ("sz", Z),
        ("attempts", INT),
        ("expected_attach_type", U),
        ("prog_btf_fd", U),
        ("prog_flags", U),
        ("prog_ifindex", U),
        ("kern_version", U),
        ("attach_btf_id", U),
        ("attach_prog_fd", U),
        ("attach_btf_obj_fd", U),
        ("fd_array", P),
        ("func_info", P),
        ("func_info_cnt", U),
        ("func_info_rec_size", U),
        ("line_info", P),
        ("line_info_cnt", U),
        ("line_info_rec_size", U),
        ("log_level", U),
        ("log_size", U),
        ("log_buf", P),
    )


class TestRunOpts(c.Structure):
    """struct bpf_test_run_opts"""

    _fields_ = (
        ("sz", Z),
        ("data_in", P),
        ("data_out", P),
        ("data_size_in", U),
        ("data_size_out", U),
        ("ctx_in", P),
        ("ctx_out", P),
        ("ctx_size_in", U),
        ("ctx_size_out", U),
        ("retval", U),
        ("repeat", INT),
        ("duration", U),
        ("flags", U),
        ("cpu", U),
        ("batch_size", U),
    )


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    # name: (result, arguments...)
    "libbpf_set_print": (P, PrintFn),
    "libbpf_major_version": (U,),
    "libbpf_minor_version": (U,),
    "bpf_object__open_file": (P, c.c_char_p, P),
    "bpf_object__load": (INT, P),
    "bpf_object__close": (None, P),
    "bpf_object__btf": (P, P),
    "bpf_object__next_map": (P, P, P),
    "bpf_object__next_program": (P, P, P),
    "bpf_map__name": (c.c_char_p, P),
    "bpf_map__fd": (INT, P),
    "bpf_map__type": (INT, P),
    "bpf_map__key_size": (U, P),
    "bpf_map__value_size": (U, P),
    "bpf_map__max_entries": (U, P),
    "bpf_map__map_flags": (U, P),
    "bpf_map__btf_key_type_id": (U, P),
    "bpf_map__btf_value_type_id": (U, P),
    "bpf_map__set_max_entries": (INT, P, U),
    "bpf_map__reuse_fd": (INT, P, INT),
    "bpf_map__initial_value": (P, P, c.POINTER(Z)),
    "bpf_program__name": (c.c_char_p, P),
    "bpf_program__fd": (INT, P),
    "bpf_program__insns": (P, P),
    "bpf_program__insn_cnt": (Z, P),
    "bpf_program__flags": (U, P),
    "bpf_program__set_flags": (INT, P, U),
    "bpf_program__set_autoload": (INT, P, c.c_bool),
    "bpf_program__expected_attach_type": (INT, P),
    "bpf_program__set_log_buf": (INT, P, P, Z),
    "bpf_program__set_log_level": (INT, P, U),
    "bpf_linker__new": (P, c.c_char_p, P),
    "bpf_linker__add_file": (INT, P, c.c_char_p, P),
    "bpf_linker__finalize": (INT, P),
    "bpf_linker__free": (None, P),
    "bpf_prog_load": (INT, INT, c.c_char_p, c.c_char_p, P, Z, c.POINTER(ProgLoadOpts)),
    "btf__raw_data": (P, P, c.POINTER(U)),
    "bpf_obj_pin": (INT, INT, c.c_char_p),
    "bpf_obj_get": (INT, c.c_char_p),
    "bpf_obj_get_info_by_fd": (INT, INT, P, c.POINTER(U)),
    "bpf_btf_get_fd_by_id": (INT, U),
    "bpf_map_get_fd_by_id": (INT, U),
    "bpf_prog_get_fd_by_id": (INT, U),
    "bpf_map_lookup_elem": (INT, INT, P, P),
    "bpf_map_create": (INT, INT, c.c_char_p, U, U, U, P),
    "bpf_map_update_elem": (INT, INT, P, P, c.c_uint64),
    "bpf_map_delete_elem": (INT, INT, P),
    "bpf_map_get_next_key": (INT, INT, P, P),
    "bpf_map_lookup_batch": (INT, INT, P, P, P, P, c.POINTER(U), c.POINTER(BatchOpts)),
    "bpf_map_update_batch": (INT, INT, P, P, c.POINTER(U), c.POINTER(BatchOpts)),
    "bpf_map_delete_batch": (INT, INT, P, c.POINTER(U), c.POINTER(BatchOpts)),
    "bpf_prog_attach": (INT, INT, INT, INT, U),
    "bpf_link_create": (INT, INT, INT, INT, c.POINTER(LinkCreateOpts)),
    "bpf_iter_create": (INT, INT),
    "bpf_link_update": (INT, INT, INT, P),
    "bpf_link_detach": (INT, INT),
    "bpf_xdp_query": (INT, INT, INT, c.POINTER(XdpQueryOpts)),
    "bpf_tc_hook_create": (INT, c.POINTER(TcHook)),
    "bpf_tc_hook_destroy": (INT, c.POINTER(TcHook)),
    "bpf_tc_attach": (INT, c.POINTER(TcHook), c.POINTER(TcOpts)),
    "bpf_tc_detach": (INT, c.POINTER(TcHook), c.POINTER(TcOpts)),
    "bpf_raw_tracepoint_open": (INT, c.c_char_p, INT),
    "bpf_enable_stats": (INT, INT),
    "bpf_prog_test_run_opts": (INT, INT, c.POINTER(TestRunOpts)),
    "ring_buffer__new": (P, INT, SampleFn, P, P),
    "ring_buffer__epoll_fd": (INT, P),
    "ring_buffer__consume": (INT, P),
    "ring_buffer__free": (None, P),
}

_log: list[str] = []


@cache
def lib() -> c.CDLL:
    """The loaded library.

    Raises: ShuntError if libbpf is absent or older than 1.1.
    """
    name = ctypes.util.find_library("bpf") or "libbpf.so.1"
    try:
        found = c.CDLL(name, use_errno=True)
    except OSError as e:
        raise ShuntError(
            "libbpf is not installed", str(e), "install it: apt-get install libbpf1"
        ) from e
    for symbol, (result, *arguments) in _SIGNATURES.items():
        function = getattr(found, symbol)
        function.restype, function.argtypes = result, arguments
    version = found.libbpf_major_version(), found.libbpf_minor_version()
    if version < (1, 1):
        raise ShuntError(
            f"libbpf {version[0]}.{version[1]} is too old",
            "Shunt is tested with libbpf 1.1 and later",
            "install a newer libbpf1 (Debian 12 has 1.1)",
        )
    found.libbpf_set_print(_print_fn)
    return found


def _keep_log(level: int, fmt: bytes, args: int) -> int:
    """libbpf's own messages: kept for the error that follows, never printed by themselves."""
    if level > 0:  # LIBBPF_WARN is 0
        return 0
    buffer = c.create_string_buffer(16384)
    c.CDLL(None).vsnprintf(buffer, c.c_size_t(len(buffer)), fmt, c.c_void_p(args))
    _log.append(buffer.value.decode(errors="replace").rstrip())
    del _log[:-50]
    return 0


_print_fn = PrintFn(_keep_log)  # libbpf keeps the pointer: it must live as long as the process


def take_log() -> list[str]:
    """What libbpf has complained of since the last call."""
    lines = list(_log)
    _log.clear()
    return lines


def call(name: str, *arguments: Any) -> int:
    """Call a function that returns a negative errno on failure.

    Raises: OSError with that errno; its text names the function.
    """
    result = int(getattr(lib(), name)(*arguments))
    if result < 0:
        raise OSError(-result, f"{name}: {os.strerror(-result)}")
    return result


def pointer_call(name: str, *arguments: Any) -> int:
    """Call a function that returns NULL on failure, its errno in `errno`.

    Raises: OSError with that errno.
    """
    c.set_errno(0)
    result = getattr(lib(), name)(*arguments)
    if not result:
        code = c.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return int(result)


def each(function: str, owner: int) -> list[int]:
    """All handles that a bpf_object__next_* iterator gives."""
    step: Callable[[int, int | None], int | None] = getattr(lib(), function)
    found: list[int] = []
    at: int | None = None
    while at := step(owner, at):
        found.append(at)
    return found


def info_by_fd(fd: int, info: c.Structure) -> None:
    """Fill a struct bpf_*_info.

    Raises: OSError.
    """
    size = U(c.sizeof(info))
    call("bpf_obj_get_info_by_fd", fd, c.byref(info), c.byref(size))


class MapInfo(c.Structure):
    """struct bpf_map_info"""

    _fields_ = (
        ("type", U),
        ("id", U),
        ("key_size", U),
        ("value_size", U),
        ("max_entries", U),
        ("map_flags", U),
        ("name", c.c_char * 16),
        ("ifindex", U),
        ("btf_vmlinux_value_type_id", U),
        ("netns_dev", c.c_uint64),
        ("netns_ino", c.c_uint64),
        ("btf_id", U),
        ("btf_key_type_id", U),
        ("btf_value_type_id", U),
        ("pad", U),
        ("map_extra", c.c_uint64),
    )


class BtfInfo(c.Structure):
    """struct bpf_btf_info"""

    _fields_ = (
        ("btf", c.c_uint64),
        ("btf_size", U),
        ("id", U),
        ("name", c.c_uint64),
        ("name_len", U),
        ("kernel_btf", U),
    )


class ProgInfo(c.Structure):
    """struct bpf_prog_info, up to what is read here"""

    _fields_ = (
        ("type", U),
        ("id", U),
        ("tag", c.c_uint8 * 8),
        ("jited_prog_len", U),
        ("xlated_prog_len", U),
        ("jited_prog_insns", c.c_uint64),
        ("xlated_prog_insns", c.c_uint64),
        ("load_time", c.c_uint64),
        ("created_by_uid", U),
        ("nr_map_ids", U),
        ("map_ids", c.c_uint64),
        ("name", c.c_char * 16),
        ("ifindex", U),
        ("flags", U),  # gpl_compatible
        ("netns_dev", c.c_uint64),
        ("netns_ino", c.c_uint64),
        ("jited", U * 2),
        ("jited_at", c.c_uint64 * 2),
        ("btf_id", U),
        ("func_info_rec_size", U),
        ("func_info", c.c_uint64),
        ("nr_info", U * 2),
        ("line_info", c.c_uint64 * 2),
        ("nr_line", U * 4),
        ("prog_tags", c.c_uint64),
        ("run_time_ns", c.c_uint64),
        ("run_cnt", c.c_uint64),
    )


class LinkInfo(c.Structure):
    """struct bpf_link_info for an XDP or TCX link"""

    _fields_ = (
        ("type", U),
        ("id", U),
        ("prog_id", U),
        ("pad", U),
        ("ifindex", U),
        ("rest", c.c_uint8 * 44),
    )


class CgroupLinkInfo(c.Structure):
    """struct bpf_link_info for a link to a control group"""

    _fields_ = (
        ("type", U),
        ("id", U),
        ("prog_id", U),
        ("pad", U),
        ("cgroup_id", c.c_uint64),
        ("attach_type", U),
        ("rest", c.c_uint8 * 36),
    )
