/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What a user's hook is written against, with clang (a .o file) or bcc (a .c file): docs/hooks.md.
 *
 *	int hook(struct hook_view *view);
 *
 * A hook sees a copy of the packet and answers SHUNT_PASS, SHUNT_DROP or SHUNT_MARK(n). What it
 * writes into the view changes nothing.
 */
#ifndef SHUNT_HOOK_H
#define SHUNT_HOOK_H

#include <linux/types.h>

#define SHUNT_PASS    0
#define SHUNT_DROP    1
#define SHUNT_MARK(n) ((n) << 8 | 2) /* pass, and mark: n from 1 to HOOK_MARK_MAX */

#define HOOK_MARK_MAX	63
#define HOOK_DATA_BYTES 128

struct hook_view {	/* map hook_view: per processor, one element */
	__u8 saddr[16]; /* IPv6, or IPv4-mapped, of the client's packet. Zero where it has not */
	__u8 daddr[16]; /* been parsed: not IP, a fragment, malformed. */
	__be16 sport;	/* TCP and UDP only */
	__be16 dport;
	__u8 proto;   /* IPPROTO_*; 0 = not parsed */
	__u8 post_lb; /* 0 before balancing, 1 after it */
	__u16 pad;
	__u32 ifindex;	/* where it came in */
	__u32 len;	/* of the frame as it is now, in bytes */
	__u32 captured; /* bytes of it in `data` */
	__u32 mark;	/* set by the pre-lb hook; 0 = none */
	__u32 action;	/* post-lb: enum xdp_action, what is about to happen */
	__u32 reason;	/* post-lb: enum reason, and why */
	__u32 svc;	/* post-lb: the service's id, 0 = none */
	__u32 backend;	/* post-lb: the backend's id, 0 = none */
	__u32 result;	/* what the hook has answered */
	__u8 data[HOOK_DATA_BYTES];
};

#ifdef BCC_SEC
#define HOOK_TRIE(NAME, KEY, VALUE, ENTRIES) \
	BPF_F_TABLE("lpm_trie", KEY, VALUE, NAME, ENTRIES, BPF_F_NO_PREALLOC)
#define HOOK_HASH(NAME, KEY, VALUE, ENTRIES)  BPF_TABLE("hash", KEY, VALUE, NAME, ENTRIES)
#define HOOK_ARRAY(NAME, KEY, VALUE, ENTRIES) BPF_TABLE("array", KEY, VALUE, NAME, ENTRIES)
#elif defined(__bpf__)
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#define HOOK_MAP(TYPE, NAME, KEY, VALUE, ENTRIES, FLAGS) \
	struct {                                         \
		__uint(type, TYPE);                      \
		__uint(max_entries, ENTRIES);            \
		__uint(map_flags, FLAGS);                \
		__type(key, KEY);                        \
		__type(value, VALUE);                    \
	} NAME SEC(".maps")
#define HOOK_TRIE(NAME, KEY, VALUE, ENTRIES) \
	HOOK_MAP(BPF_MAP_TYPE_LPM_TRIE, NAME, KEY, VALUE, ENTRIES, BPF_F_NO_PREALLOC)
#define HOOK_HASH(NAME, KEY, VALUE, ENTRIES) \
	HOOK_MAP(BPF_MAP_TYPE_HASH, NAME, KEY, VALUE, ENTRIES, 0)
#define HOOK_ARRAY(NAME, KEY, VALUE, ENTRIES) \
	HOOK_MAP(BPF_MAP_TYPE_ARRAY, NAME, KEY, VALUE, ENTRIES, 0)

/* Hidden: the kernel then verifies it as a part of its caller, so `view` is never NULL. */
__hidden int hook(struct hook_view *view);
#endif

#endif
