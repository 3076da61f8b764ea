/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Whether a connection is worth being paired. That makes connect() and close() dearer, which
 * redirected messages make good; a connection of one question and its answer is better left to TCP.
 * Which it will be nobody knows when it is opened. So each client's process has a credit: brief
 * connections take from it, when they end, and messages give. Without credit one connection of some
 * is paired all the same, and shows when the process has come to have others.
 */
#ifndef SHUNT_PAYER_H
#define SHUNT_PAYER_H

#include "dial.h"

/* So many of an end's messages make good a brief connection. */
#define MAKE_GOOD 64

/* The process that calls connect(). */
static __always_inline __u32 this_payer(void)
{
	struct task_struct *task = (void *)bpf_get_current_task_btf();

	return task->tgid;
}

static __always_inline bool may_pair(__u32 id)
{
	struct stream_payer *payer = bpf_map_lookup_elem(&stream_payers, &id);

	if (!payer) {
		struct stream_payer first = {.credit = config.credit};

		bpf_map_update_elem(&stream_payers, &id, &first, BPF_NOEXIST);
		return true;
	}
	return READ_ONCE(payer->credit) > 0 ||
	       __sync_fetch_and_add(&payer->dials, 1) % config.trial == 0;
}

/* The client's end of a connection that was paired is closed. */
static __always_inline void charge(const struct stream_val *stream)
{
	__u32 id = stream->payer;
	struct stream_payer *payer;

	if (stream->messages >= config.brief)
		return;
	payer = bpf_map_lookup_elem(&stream_payers, &id);
	if (payer && READ_ONCE(payer->credit) > 0)
		__sync_fetch_and_add(&payer->credit, -1);
}

/* An end's message was redirected. */
static __always_inline void make_good(const struct stream_val *stream)
{
	__u32 id = stream->payer;
	struct stream_payer *payer;

	if (stream->messages % MAKE_GOOD)
		return;
	payer = bpf_map_lookup_elem(&stream_payers, &id);
	if (payer && READ_ONCE(payer->credit) < (__s32)config.credit)
		__sync_fetch_and_add(&payer->credit, 1);
}

#endif
