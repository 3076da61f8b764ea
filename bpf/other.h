/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * XDP: sending what is no plain packet: later fragments, and ICMP errors. In steps, each a function that
 * is verified once and called by the program itself: nested, they would not fit on the stack.
 *
 *   look_*()       find out to whom, and put it into the scratch memory
 *   rewrite_quote  mode nat: translate what an ICMP error quotes
 *   send_other     send it
 *
 * A step returns 0, or the word of a verdict where it ends.
 */
#ifndef SHUNT_OTHER_H
#define SHUNT_OTHER_H

#include "icmp.h"
#include "nat.h"
#include "nat46_icmp.h"
#include "send_geneve.h"

/* Modes nat and dsr-geneve: 0, or a verdict's word. */
static __always_inline __u64 translate_quote(struct xdp_md *ctx, struct packet *pkt,
					     struct nat_scratch *s)
{
	if (s->mode == MODE_DSR_GENEVE) {
		struct backend_val *b = bpf_map_lookup_elem(&backends, &s->backend);

		if (!b)
			return word_of(verdict(XDP_DROP, REASON_DROP_BAD_TABLE));
		geneve_tuple(pkt, b, &s->to);
		return rewrite_quote(ctx, pkt);
	}
	if (s->mode != MODE_NAT)
		return 0;
	return crosses(pkt, &s->to) ? cross_quote(ctx, pkt) : rewrite_quote(ctx, pkt);
}

/* In mode nat every fragment has its addresses translated, and the first one its ports and the
 * checksum, which is the whole datagram's. */
static __always_inline struct verdict send_rest(struct xdp_md *ctx, const struct packet *pkt,
						const struct flow_key *to, const struct hop *hop)
{
	if (crosses(pkt, to)) /* now: its first fragment went elsewhere */
		return verdict(XDP_DROP, REASON_DROP_NAT46_FRAGMENT);
	if (pkt->ip_len > hop->mtu)
		return too_big(ctx, pkt, hop->mtu);
	if (!write_addresses(ctx, pkt, to, address_change(pkt, to)))
		return verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
	return send_l2(ctx, pkt, hop);
}

__noinline __u64 send_other(struct xdp_md *ctx, const struct packet *pkt)
{
	struct nat_scratch *s = own_scratch();
	struct backend_val *b;
	struct verdict v;
	struct hop hop = {};

	if (!pkt || !s)
		return word_of(verdict(XDP_DROP, REASON_DROP_BAD_TABLE));
	b = bpf_map_lookup_elem(&backends, &s->backend);
	if (!s->backend)
		hop = hop_back(&s->back);
	step(STEP_BACKEND, s->backend, b ? b->flags : 0);
	if (!b || (s->backend && !(b->flags & BACKEND_KNOWN)))
		v = verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
	else if (s->backend &&
		 !find_hop(ctx, b, pkt->ip_len + (s->mode == MODE_DSR_IPIP ? outer_size(b) : 0),
			   &hop))
		v = verdict(XDP_DROP, REASON_DROP_NO_NEXTHOP);
	else if (s->mode == MODE_DSR_IPIP)
		v = send_ipip(ctx, pkt, b, &hop);
	else if (s->mode == MODE_NAT && !pkt->quote)
		v = send_rest(ctx, pkt, &s->to, &hop);
	else
		v = send_l2(ctx, pkt, &hop);
	if (v.reason == REASON_SENT_TO_BACKEND)
		v.reason = sent_reason(pkt, s);
	if (s->backend)
		count_backend(s->backend, pkt->len);
	v.svc = s->svc;
	v.backend = s->backend;
	return word_of(v);
}

/* The same in mode dsr-geneve, called by the program itself for want of stack. */
static __always_inline struct verdict send_other_geneve(struct xdp_md *ctx,
							const struct packet *pkt,
							const struct nat_scratch *s)
{
	__u32 id = s->backend, svc_id = s->svc;
	struct backend_val *b = bpf_map_lookup_elem(&backends, &id);
	struct verdict v;

	step(STEP_BACKEND, id, b ? b->flags : 0);
	count_backend(id, pkt->len);
	v = verdict_of(send_geneve(ctx, pkt, id));
	if (v.reason == REASON_SENT_TO_BACKEND)
		v.reason = sent_reason(pkt, s);
	v.svc = svc_id;
	v.backend = id;
	return v;
}

#endif
