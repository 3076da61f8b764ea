/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Later fragments and ICMP errors, the way of their flow; echo requests are answered. What is damaged
 * goes no way at all if it is ours. */
#ifndef SHUNT_SEND_RELATED_H
#define SHUNT_SEND_RELATED_H

#include "malformed.h"
#include "related.h"
#include "send_on.h"

/* An ICMP header and what it quotes, behind the longest headers looked at. */
#define ICMP_BYTES (2 * MAX_L4_OFFSET)

static __noinline __u64 send_related(struct __sk_buff *ctx, const struct packet *pkt)
{
	struct nat_scratch *s = own_scratch();
	struct verdict v;

	if (!s)
		return word_of(verdict(XDP_DROP, REASON_DROP_BAD_TABLE));
	if (s->backend)
		v = send_forward(ctx, pkt, s, s->backend, &s->to);
	else if (s->mode == MODE_NAT)
		v = send_back(ctx, pkt, &s->back, &s->to);
	else
		v = pass_on(ctx, pkt, &s->to);
	if (v.reason == REASON_SENT_TO_BACKEND || v.reason == REASON_SENT_TO_CLIENT)
		v.reason = sent_reason(pkt, s);
	if (s->backend)
		count_backend(s->backend, pkt->len);
	v.svc = s->svc;
	v.backend = s->backend;
	return word_of(v);
}

static __always_inline struct verdict decide_related(struct __sk_buff *ctx, struct packet *pkt,
						     enum reason why)
{
	__u64 found;

	if (why == REASON_PASS_MALFORMED && refuses_malformed(ctx, pkt))
		return verdict(XDP_DROP, REASON_DROP_NAT_MALFORMED);
	if (is_icmp(pkt))
		pull(ctx, ICMP_BYTES);
	found = look_related(ctx, pkt, why);
	if (found == LOOK_NOTHING)
		return verdict(XDP_PASS, REASON_PASS_NOT_OURS);
	return verdict_of(found == LOOK_FOUND ? send_related(ctx, pkt) : found);
}

#endif
