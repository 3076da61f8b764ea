/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* What programs read of the kernel's own sockets; offsets are relocated when they are loaded. */
#ifndef SHUNT_KERNEL_STREAM_H
#define SHUNT_KERNEL_STREAM_H

#include <stdbool.h>
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

#include "kernel_types.h"

struct list_head {
	struct list_head *next;
} KERNEL_TYPE;

typedef struct {
	int counter;
} atomic_t;

typedef struct refcount_struct {
	atomic_t refs;
} refcount_t;

struct sk_psock {
	struct list_head ingress_msg; /* redirected messages that were not read yet */
	refcount_t refcnt;	      /* the map's one, and one of every call that uses it */
} KERNEL_TYPE;

struct proto {
	unsigned long *memory_pressure; /* not 0 while TCP has too much memory */
} KERNEL_TYPE;

struct sock_common {
	struct proto *skc_prot;
	unsigned long skc_flags;
} KERNEL_TYPE;

struct sock {
	struct sock_common __sk_common;
	int sk_rcvlowat;
	int sk_peek_off; /* -1: not used */
	__u32 sk_tsflags;
	void *sk_user_data;
} KERNEL_TYPE;

struct inet_sock {
	struct sock sk;
} KERNEL_TYPE;

struct inet_connection_sock {
	struct inet_sock icsk_inet;
	const void *icsk_ulp_ops;
} KERNEL_TYPE;

struct tcp_sock {
	struct inet_connection_sock inet_conn;
	__u32 write_seq;
	__u32 rcv_nxt;
	bool is_mptcp;
} KERNEL_TYPE;

struct task_struct {
	int tgid;
} KERNEL_TYPE;

enum sock_flags {
	SOCK_RCVTSTAMP = 1, /* relocated too */
	SOCK_ZEROCOPY = 2,
};

/* include/linux/skmsg.h: what else stands in the pointer to a psock. */
#define USER_DATA_FLAGS 7ULL

static __always_inline __u64 psock_of(const struct tcp_sock *tp)
{
	return (__u64)tp->inet_conn.icsk_inet.sk.sk_user_data & ~USER_DATA_FLAGS;
}

/* Whether the socket, which is locked, has read all messages that were redirected to it. */
static __always_inline bool has_read_all(const struct tcp_sock *tp)
{
	__u64 psock = psock_of(tp), first = 0;
	__u64 queue = psock + bpf_core_field_offset(struct sk_psock, ingress_msg);

	if (!psock || bpf_probe_read_kernel(&first, sizeof(first), (void *)queue))
		return false;
	return first == queue;
}

/* Whether no thread is sending a message by the socket, which is locked: the lock is let go between
 * the verdict and the other end's queue, but not the reference. */
static __always_inline bool is_quiet(const struct tcp_sock *tp)
{
	__u64 psock = psock_of(tp);
	__u64 at = psock + bpf_core_field_offset(struct sk_psock, refcnt);
	int references = 0;

	if (!psock)
		return true;
	return !bpf_probe_read_kernel(&references, sizeof(references), (void *)at) &&
	       references == 1;
}

/* TCP waits for memory; a message that is redirected fails without. */
static __always_inline bool is_short_of_memory(const struct tcp_sock *tp)
{
	__u64 since = 0;

	bpf_probe_read_kernel(&since, sizeof(since),
			      tp->inet_conn.icsk_inet.sk.__sk_common.skc_prot->memory_pressure);
	return since;
}

/* What the queue of redirected messages does not heed, or what does not heed that queue. */
static __always_inline bool has_option(const struct tcp_sock *tp)
{
	const struct sock *sk = &tp->inet_conn.icsk_inet.sk;
	unsigned long flags = 1UL << bpf_core_enum_value(enum sock_flags, SOCK_ZEROCOPY) |
			      1UL << bpf_core_enum_value(enum sock_flags, SOCK_RCVTSTAMP);

	if (bpf_core_field_exists(tp->is_mptcp) && tp->is_mptcp)
		return true;
	return sk->sk_rcvlowat > 1 || sk->sk_peek_off >= 0 || sk->sk_tsflags ||
	       tp->inet_conn.icsk_ulp_ops || sk->__sk_common.skc_flags & flags;
}

#endif
