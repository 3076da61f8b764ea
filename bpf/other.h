/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Sending what is no plain packet: later fragments, and ICMP errors. In steps, each a function that
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

#include "nat.h"

/* What a look_*() returns besides a verdict's word, which is neither. */
#define LOOK_NOTHING 0 /* it is the stack's */
#define LOOK_FOUND   1

static __always_inline bool fits_frame(struct xdp_md *ctx, const struct packet *pkt)
{
	return ETH_HLEN + pkt->ip_len <= (__u32)(ctx->data_end - ctx->data);
}

/* What nat_fwd has for the tuple, to look at only. */
static __always_inline bool look_forward(const struct packet *pkt, struct nat_scratch *s)
{
	struct nat_fwd_val *fwd;
	struct backend_val *b;
	__u64 word;

	s->key = pkt->key;
	fwd = bpf_map_lookup_elem(&nat_fwd, &s->key);
	if (!fwd)
		return false;
	word = READ_ONCE(fwd->word);
	__builtin_memcpy(s->to.saddr, fwd->saddr, 16);
	s->to.sport = fwd->sport;
	s->to.dport = fwd->dport;
	s->to.proto = pkt->key.proto;
	if (word >> 32 != pkt->hash || READ_ONCE(fwd->word) != word)
		return false; /* recycled under us */
	s->backend = word;
	s->mode = MODE_NAT;
	b = bpf_map_lookup_elem(&backends, &s->backend);
	if (!b || !(b->flags & BACKEND_KNOWN))
		return false;
	__builtin_memcpy(s->to.daddr, b->addr, 16);
	return true;
}

/* And nat_rev: how a packet from a backend goes back to its client. */
static __always_inline bool look_back(const struct packet *pkt, struct nat_scratch *s)
{
	struct nat_rev_val *rev;
	__u64 word;

	s->key = pkt->key;
	rev = bpf_map_lookup_elem(&nat_rev, &s->key);
	if (!rev)
		return false;
	word = READ_ONCE(rev->word);
	__builtin_memcpy(s->to.saddr, rev->vip, 16);
	__builtin_memcpy(s->to.daddr, rev->client, 16);
	s->to.sport = rev->vip_port;
	s->to.dport = rev->client_port;
	s->to.proto = pkt->key.proto;
	s->back = rev->back;
	s->svc = 0; /* replies are not counted for it */
	s->backend = 0;
	s->mode = MODE_NAT;
	return word >> 32 == pkt->hash && READ_ONCE(rev->word) == word;
}

/* In mode nat every fragment has its addresses translated, and the first one its ports and the
 * checksum, which is the whole datagram's. */
static __always_inline struct verdict send_rest(struct xdp_md *ctx, const struct packet *pkt,
						const struct flow_key *to, const struct hop *hop)
{
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
	struct hop hop = {.mtu = 0xffff};
	struct verdict v;

	if (!pkt || !s)
		return word_of(verdict(XDP_DROP, REASON_DROP_BAD_TABLE));
	b = bpf_map_lookup_elem(&backends, &s->backend);
	if (!s->backend) {
		set_macs(&hop, *(__u64 *)s->back.peer, *(__u64 *)s->back.own);
		hop.ifindex = s->back.ifindex;
		hop.tags = s->back.tags;
	}
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
	if (v.reason == REASON_SENT_TO_BACKEND) {
		if (pkt->quote)
			v.reason = s->backend ? REASON_SENT_ERROR_TO_BACKEND :
						REASON_SENT_ERROR_TO_CLIENT;
		else if (!s->backend)
			v.reason = REASON_SENT_TO_CLIENT;
	}
	v.svc = s->svc;
	v.backend = s->backend;
	return word_of(v);
}

#endif
