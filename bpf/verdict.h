/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The one exit: every packet leaves through leave(), which counts its reason. */
#ifndef SHUNT_VERDICT_H
#define SHUNT_VERDICT_H

#include <stdbool.h>

#include "likely.h"
#include "maps.h"
#include "memory.h"
#include "step.h"

#define NS_PER_S 1000000000ULL

const volatile struct lb_config config = {};

__u64 test_now_ns; /* read only when config.test_clock is set */

/* The time as it was read last, and when that was. On processors that must mispredict a kernel
 * function's return (safe RET), asking for the time costs as much as a cache miss; the verifier
 * replaces bpf_jiffies64() by a load. */
__u64 clock_jiffy, clock_ns;

static __always_inline __u64 now_ns(void)
{
	__u64 jiffy;

	if (config.test_clock)
		return READ_ONCE(test_now_ns);
	jiffy = bpf_jiffies64();
	if (unlikely(jiffy != READ_ONCE(clock_jiffy))) {
		WRITE_ONCE(clock_ns, bpf_ktime_get_coarse_ns());
		WRITE_ONCE(clock_jiffy, jiffy);
	}
	return READ_ONCE(clock_ns);
}

struct verdict {
	int action;
	__u32 reason;
	__u32 svc;     /* 0 = none */
	__u32 backend; /* 0 = none */
};

static __always_inline struct verdict verdict(int action, enum reason reason)
{
	return (struct verdict){.action = action, .reason = reason};
}

/* A verdict in one word, for functions that are verified once: those return a number. 0 is none. */
static __always_inline __u64 word_of(struct verdict v)
{
	return 1 | (__u64)v.action << 1 | (__u64)v.reason << 4 | (__u64)v.svc << 12 |
	       (__u64)v.backend << 36;
}

static __always_inline struct verdict verdict_of(__u64 word)
{
	return (struct verdict){
		.action = word >> 1 & 7,
		.reason = word >> 4 & 0xff,
		.svc = word >> 12 & 0xffffff,
		.backend = word >> 36,
	};
}

static __always_inline bool sent_on(__u32 reason)
{
	return reason == REASON_SENT_TO_BACKEND || reason == REASON_SENT_TO_CLIENT ||
	       reason == REASON_SENT_ERROR_TO_BACKEND || reason == REASON_SENT_ERROR_TO_CLIENT ||
	       reason == REASON_SENT_MASQUERADED;
}

/* A backend's packets are counted where it is known who it is, long before the packet leaves: by
 * then the counter's memory, one of many, has come. A service's total is its own and these. */
static __always_inline void count_backend(__u32 id, __u32 len)
{
	if (!DRY_RUN)
		count(&backend_stats, bpf_get_smp_processor_id() * config.backends + id, len);
}

static __always_inline void note(__u32 event)
{
	struct event_count *n = bpf_map_lookup_elem(&events, &event);

	step(STEP_EVENT, event, 0);
	if (n)
		n->times++;
}

/* Memory for what does not fit on the stack, of which a program has 512 bytes. */
static __always_inline struct nat_scratch *own_scratch(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&scratch, &zero);
}

enum budget { BUDGET_INSERTS, BUDGET_ANSWERS, BUDGET_SAMPLES };

/* Takes a token; false if this processor has used up its share of this second. */
static __always_inline bool spend(enum budget kind)
{
	__u64 now = now_ns();
	__u32 zero = 0;
	struct budget_val *b = bpf_map_lookup_elem(&budget, &zero);

	if (!b)
		return false;
	if (now - b->since_ns >= NS_PER_S) {
		b->since_ns = now;
		b->inserts = b->answers = b->samples = 0;
	}
	switch (kind) {
	case BUDGET_INSERTS:
		return b->inserts++ < config.inserts_per_s;
	case BUDGET_ANSWERS:
		return b->answers++ < config.answers_per_s;
	default:
		return b->samples++ < config.samples_per_s;
	}
}

static __noinline void take_sample(struct CONTEXT *ctx, struct verdict *v)
{
	void *from = (void *)(long)ctx->data, *to = (void *)(long)ctx->data_end;
	__u32 len, captured;
	struct sample *s;

	/* clang 14 would spill half of a packet pointer (6.18: "invalid size of register spill"). */
	asm volatile("" : "+r"(from), "+r"(to));
	len = frame_len(ctx, to - from);
	captured = len;
	if (!spend(BUDGET_SAMPLES))
		return;
	s = bpf_ringbuf_reserve(&samples, sizeof(*s), 0);
	if (!s) {
		note(EVENT_SAMPLE_LOST);
		return;
	}
	if (captured > SAMPLE_BYTES)
		captured = SAMPLE_BYTES;
	s->time_ns = now_ns();
	s->reason = v->reason;
	s->ifindex = ctx->ingress_ifindex;
	s->svc = v->svc;
	s->backend = v->backend;
	s->len = len;
	s->captured = 0;
	__builtin_memset(s->data, 0, sizeof(s->data));
	/* clang 14 knows the upper bound and drops its check, and makes one of the two checks,
	 * captured - 14 <= 82, of a copy: either way the verifier has no bound for `captured`
	 * itself (6.18: "R4 unbounded memory access"; 6.1: "R3 min value is outside of the allowed
	 * memory range"; 6.12: "R4 invalid zero-sized read"). Hence a barrier before each. */
	barrier_var(captured);
	if (captured >= ETH_HLEN) {
		barrier_var(captured);
		if (captured <= SAMPLE_BYTES && !load_frame(ctx, 0, s->data, captured))
			s->captured = captured;
	}
	bpf_ringbuf_submit(s, 0);
}

static __always_inline int leave(struct CONTEXT *ctx, struct verdict v, __u32 len)
{
	step(STEP_VERDICT, v.action, v.reason | (__u64)v.svc << 8 | (__u64)v.backend << 32);
	if (DRY_RUN)
		return v.action;
	count(&reasons, v.reason, len);
	if (unlikely(v.svc && !v.backend))
		count(&svc_stats, bpf_get_smp_processor_id() * config.services + v.svc, len);
	if (unlikely(v.action == XDP_DROP)) {
		struct verdict dropped = v; /* so that `v` itself can stay in registers */

		take_sample(ctx, &dropped);
	}
	return v.action;
}

#endif
