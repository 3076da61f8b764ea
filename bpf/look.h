/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Where what is no plain packet goes, by what is known of its flow: later fragments, ICMP errors.
 * A look_*() leaves it in the scratch memory.
 */
#ifndef SHUNT_LOOK_H
#define SHUNT_LOOK_H

#include "nat_pair.h"

/* What a look_*() returns besides a verdict's word, which is neither. */
#define LOOK_NOTHING 0 /* it is the stack's */
#define LOOK_FOUND   1

/* At TC a reply of SCTP comes for whatever port the client has; one of ICMP has no port, and an
 * identifier among nat's. */
static __always_inline bool may_be_reply(const struct flow_key *key)
{
	return (AT_TC && key->proto == IPPROTO_SCTP) || is_port_of_nat(key);
}

static __always_inline bool may_be_ours(const struct flow_key *key)
{
	return (AT_TC && key->proto != IPPROTO_TCP && key->proto != IPPROTO_UDP) || is_served(key);
}

static __always_inline bool fits_frame(struct CONTEXT *ctx, const struct packet *pkt)
{
	return ETH_HLEN + pkt->ip_len <= frame_len(ctx, ctx->data_end - ctx->data);
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
	b = bpf_map_lookup_elem(&backends, &s->backend);
	if (!b || !(b->flags & BACKEND_KNOWN))
		return false;
	__builtin_memcpy(s->to.daddr, b->addr, 16);
	return true;
}

/* And what nat_rev has. */
static __always_inline bool look_reverse(const struct packet *pkt, struct nat_scratch *s)
{
	struct nat_rev_val *rev;
	bool leaves;

	s->key = pkt->key; /* before 6.2 no map takes a key from a function's argument */
	rev = look_back(&s->key, pkt->hash, s);
	if (!rev || is_left_to_tc(rev, pkt->key.proto))
		return false;
	/* A masqueraded flow's are for an address of this host, and routed after that. */
	leaves = is_routed(rev) && !(rev->track & NAT_MASQUERADED);
	if (leaves != (pkt->way == WAY_TC_OUT))
		return false;
	s->svc = 0; /* replies are not counted for it */
	s->backend = 0;
	s->mode = is_routed(rev) ? MODE_LOCAL : MODE_NAT;
	return true;
}

/* What leaves the node with another address: MODE_NONE, since it is no service's. */
static __always_inline bool look_masqueraded(const struct packet *pkt, struct nat_scratch *s)
{
	struct nat_fwd_val *fwd;
	__u64 word;

	if (!AT_TC || pkt->way != WAY_TC_OUT)
		return false;
	s->key = pkt->key;
	fwd = bpf_map_lookup_elem(&nat_fwd, &s->key);
	if (!fwd || !(fwd->track & NAT_MASQUERADED))
		return false;
	word = READ_ONCE(fwd->word);
	s->to = pkt->key;
	__builtin_memcpy(s->to.saddr, fwd->saddr, 16);
	if (word >> 32 != pkt->hash || READ_ONCE(fwd->word) != word)
		return false; /* recycled under us */
	s->svc = 0;
	s->backend = 0;
	s->mode = MODE_NONE;
	return true;
}

static __always_inline enum reason sent_reason(const struct packet *pkt,
					       const struct nat_scratch *s)
{
	if (pkt->quote)
		return s->backend ? REASON_SENT_ERROR_TO_BACKEND : REASON_SENT_ERROR_TO_CLIENT;
	if (AT_TC && s->mode == MODE_NONE)
		return REASON_SENT_MASQUERADED;
	return s->backend ? REASON_SENT_TO_BACKEND : REASON_SENT_TO_CLIENT;
}

#endif
