/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The way of one packet, step by step, for `shunt explain`. xdp/dry.bpf.c is the balancer compiled
 * with DRY_RUN, and tc/dry.bpf.c TC's programs: they note each step, and write to no map that
 * anybody else uses. In the programs themselves a step is nothing at all.
 */
#ifndef SHUNT_STEP_H
#define SHUNT_STEP_H

#include <linux/types.h>

#ifndef DRY_RUN
#define DRY_RUN 0
#endif

#define STEPS_MAX 128 /* a power of two; no packet takes half as many */

/* Behind each, what a step's `a` and `b` are. */
enum step_kind {
	STEP_PORT,	/* whether anybody serves the packet's port */
	STEP_NODE_PORT, /* of a bind(): whether a service has it on this node's addresses; 1: IPv6's */
	STEP_FRONTEND, /* the service, 0 = none; 1: of a frontend with every port */
	STEP_SERVICE,  /* enum mode; enum svc_flag */
	STEP_SOURCE,   /* whether the client is served; the set in map sources */
	STEP_RATE,     /* whether the client's network is within its rate */
	STEP_HASH,     /* of the flow, as its service wants it; log2 of the service's slots */
	STEP_SLOT,     /* its index; its word */
	STEP_FLOW,     /* the backend it speaks for, 0 = none; the word of an entry, 0 = none */
	STEP_FLOW_FORGOTTEN,
	STEP_CLIENT,	     /* the backend of the client; 1: it was remembered */
	STEP_RESTART,	     /* the slot whose quiet window begins anew */
	STEP_NAT_REPLY,	     /* whether a translation is known; its service */
	STEP_NAT_FLOW,	     /* enum known; its backend */
	STEP_NAT_NEW,	     /* this host's port; the backend */
	STEP_MASQUERADE,     /* this host's port; enum known */
	STEP_FRAGMENT_FIRST, /* the others will follow it: the service; the backend */
	STEP_FRAGMENT,	     /* it follows its first one: the service; the backend */
	STEP_QUOTE,	     /* what an ICMP error quotes: the service; the backend */
	STEP_BACKEND,	     /* its id; enum backend_flag */
	STEP_HOP,	     /* the interface; MTU, and tags << 32 */
	STEP_HOP_MAC,	     /* nothing; the first bytes of a frame */
	STEP_EVENT,	     /* enum event */
	STEP_VERDICT,	     /* the action; reason, service << 8, backend << 32 */
};

struct step {
	enum step_kind kind;
	__u32 a;
	__u64 b;
};

struct trace {
	__u32 count;
	__u32 pad;
	struct step step[STEPS_MAX];
};

#if DRY_RUN
struct trace trace; /* of the last packet; one runs at a time */

static __always_inline void step(enum step_kind kind, __u32 a, __u64 b)
{
	struct step *s = &trace.step[trace.count++ & (STEPS_MAX - 1)];

	s->kind = kind;
	s->a = a;
	s->b = b;
}
#else
#define step(kind, a, b)           \
	do {                       \
		if (0) {           \
			(void)(a); \
			(void)(b); \
		}                  \
	} while (0)
#endif

#endif
