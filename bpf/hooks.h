/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Users' hooks. A tail call does not return, so a packet that hooks see passes through a chain of
 * programs, each of which calls the next by its slot in `hooks` (enum hook_slot):
 *
 *	shunt_lb -> enter -> [pre-lb] -> balance -> [post-lb] -> exit
 *
 * Without a hook, slot HOOK_ENTRY is empty and shunt_lb does everything itself: a tail call through
 * an empty slot whose index is constant is a jump over it.
 */
#ifndef SHUNT_HOOKS_H
#define SHUNT_HOOKS_H

#include "parse.h"

#define HOOK_NO_ANSWER 0xffffffff

static __always_inline struct hook_view *find_view(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&hook_view, &zero);
}

static __always_inline struct hook_state *find_state(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&hook_state, &zero);
}

/* What a hook sees of the frame as it is now. The view's rest was set before. */
static __noinline void capture(struct xdp_md *ctx, struct hook_view *view)
{
	void *from = (void *)(long)ctx->data, *to = (void *)(long)ctx->data_end;
	__u32 captured;

	if (!view)
		return;
	asm volatile("" : "+r"(from), "+r"(to)); /* as in take_sample() */
	view->len = to - from;
	view->captured = 0;
	view->result = HOOK_NO_ANSWER;
	captured = to - from;
	if (captured > HOOK_DATA_BYTES)
		captured = HOOK_DATA_BYTES;
	barrier_var(captured);
	if (captured >= ETH_HLEN) {
		barrier_var(captured);
		if (captured <= HOOK_DATA_BYTES &&
		    !bpf_xdp_load_bytes(ctx, 0, view->data, captured))
			view->captured = captured;
	}
}

static __always_inline void describe(struct xdp_md *ctx, struct hook_view *view)
{
	struct packet pkt = {};
	enum reason why;

	parse(ctx, at(ctx, 0), end(ctx), &pkt, &why);
	__builtin_memcpy(view->saddr, pkt.key.saddr, 16);
	__builtin_memcpy(view->daddr, pkt.key.daddr, 16);
	view->sport = pkt.key.sport;
	view->dport = pkt.key.dport;
	view->proto = pkt.key.proto;
	view->ifindex = ctx->ingress_ifindex;
	view->post_lb = 0;
	view->mark = view->action = view->reason = view->svc = view->backend = 0;
	capture(ctx, view);
}

/* Counts what a hook has answered; whether the packet is to be dropped. An answer that is none of
 * the three is counted, and passes. */
static __always_inline bool take_answer(struct hook_view *view, struct hook_state *state,
					enum hook_position position)
{
	__u32 answer = READ_ONCE(view->result), mark = answer >> 8, index = HOOK_INVALID;

	if (answer == HOOK_NO_ANSWER)
		return false; /* this position has no hook */
	if (answer == SHUNT_PASS || answer == SHUNT_DROP) {
		index = answer;
	} else if (mark && mark <= HOOK_MARK_MAX && answer == SHUNT_MARK(mark)) {
		index = HOOK_INVALID + mark;
		state->mark = mark;
	}
	count(&hook_stats, position * HOOK_RESULTS + index, view->len);
	return answer == SHUNT_DROP;
}

/* The mark stands before the frame, for a TC program of this host to read (data_meta). A driver
 * without room for it has it counted, and nothing else. */
static __noinline void write_mark(struct xdp_md *ctx, __u32 mark)
{
	__u32 *meta;

	if (bpf_xdp_adjust_meta(ctx, -(int)sizeof(*meta)))
		return;
	meta = (void *)(long)ctx->data_meta;
	if ((void *)(meta + 1) <= (void *)(long)ctx->data)
		*meta = mark;
}

/* The rest are functions of their own, since beside decide() there is no room on the stack (6.1:
 * "combined stack size of 3 calls is 544. Too large"). */

/* Whether the hook before balancing lets the packet pass, or there is none. */
static __noinline bool passes_pre_lb(void)
{
	struct hook_view *view = find_view();
	struct hook_state *state = find_state();

	return view && state && !take_answer(view, state, HOOK_POSITION_PRE);
}

static __noinline int show_verdict(struct xdp_md *ctx, const struct verdict *v)
{
	struct hook_view *view = find_view();
	struct hook_state *state = find_state();

	if (!view || !state)
		return 0;
	state->action = view->action = v->action;
	state->reason = view->reason = v->reason;
	state->svc = view->svc = v->svc;
	state->backend = view->backend = v->backend;
	view->mark = state->mark;
	view->post_lb = 1;
	capture(ctx, view);
	return 0;
}

static __noinline int leave_as_shown(struct xdp_md *ctx)
{
	struct hook_state *state = find_state();
	struct verdict v;

	if (!state)
		return leave(ctx, verdict(XDP_DROP, REASON_DROP_BAD_TABLE), 0);
	v = (struct verdict){
		.action = state->action,
		.reason = state->reason,
		.svc = state->svc,
		.backend = state->backend,
	};
	if (v.action == XDP_PASS && state->mark)
		write_mark(ctx, state->mark);
	return leave(ctx, v, state->len);
}

static __noinline int leave_by_hook(struct xdp_md *ctx)
{
	struct hook_state *state = find_state();

	return leave(ctx, verdict(XDP_DROP, REASON_DROP_HOOK), state ? state->len : 0);
}

#endif
