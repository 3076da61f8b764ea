/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * A translated flow in the maps, for XDP and TC alike.
 *
 * A flow is two entries. The reverse one goes in first, with NOEXIST: it claims the port
 * towards that backend. Then the forward one: a processor that finds it there already adopts it
 * and gives its own claim back. The agent's scan removes both, the forward one first, so that no
 * packet is ever sent whose reply would not be known.
 */
#ifndef SHUNT_NAT_PAIR_H
#define SHUNT_NAT_PAIR_H

#include "claim.h"
#include "flow.h"

/* Whether the tuple that a packet is to get is of the other family. Its source says so, an address of
 * this host or a VIP: a client may write an IPv4-mapped one into an IPv6 header. */
static __always_inline bool crosses(const struct packet *pkt, const struct flow_key *to)
{
	return pkt->ipv6 == is_mapped(to->saddr);
}

/* Makes `cur` the backend of a new flow; 0 = none. */
static __always_inline void choose_new(const struct packet *pkt, struct place *p)
{
	if (p->named)
		p->cur = p->named;
	else if (p->flags & SVC_AFFINITY)
		p->cur = affine_backend(pkt, p->svc, p->cur);
}

/* A new flow's reverse entry, in the scratch memory, where complete_pair() expects it. */
static __always_inline void begin_pair(const struct packet *pkt, struct nat_scratch *s, __u32 svc,
				       __u32 track)
{
	s->rev = (struct nat_rev_val){
		.seen_ns = now_ns(),
		.client_port = pkt->key.sport,
		.vip_port = pkt->key.dport,
		.svc = svc,
		.track = track,
	};
	__builtin_memcpy(s->rev.client, pkt->key.saddr, 16);
	__builtin_memcpy(s->rev.vip, pkt->key.daddr, 16);
}

/* The forward entry beside the reverse one, which has been claimed and is given back if this one does
 * not go in. Returns 0, or -EEXIST if another processor was faster, or another error. */
static __always_inline int complete_pair(const struct packet *pkt, const struct translation *t,
					 struct nat_scratch *s)
{
	int err;

	s->fwd = (struct nat_fwd_val){
		.word = (__u64)pkt->hash << 32 | t->backend,
		.seen_ns = s->rev.seen_ns,
		.sport = t->to.sport,
		.dport = t->to.dport,
		.svc = s->rev.svc,
		.track = s->rev.track,
		.state = opens(pkt) ? FLOW_OPENING : FLOW_CONFIRMED,
		.from = s->rev.back,
	};
	__builtin_memcpy(s->fwd.saddr, t->to.saddr, 16);
	err = DRY_RUN ? 0 : bpf_map_update_elem(&nat_fwd, &pkt->key, &s->fwd, BPF_NOEXIST);
	if (!err)
		note(EVENT_NAT_CREATED);
	else
		bpf_map_delete_elem(&nat_rev, &s->key);
	return err;
}

/* What is known of a packet's flow. Leaving: it is masqueraded, and no service's; refused: TC's alone. */
enum known { KNOWN, KNOWN_NOT, KNOWN_ENDED, KNOWN_REFUSED, KNOWN_LEAVING };

/* What a forward entry says of its packet, and in `bits` its track. Returns its backend, or NULL if the
 * entry is none of this flow's: the kernel recycles a deleted element's memory under its readers. */
static __always_inline struct backend_val *read_forward(const struct packet *pkt,
							const struct nat_fwd_val *fwd,
							struct translation *t, __u32 *bits)
{
	__u64 word = READ_ONCE(fwd->word); /* it is written first */
	struct backend_val *b;

	t->backend = word;
	b = bpf_map_lookup_elem(&backends, &t->backend);
	if (word >> 32 != pkt->hash || !b)
		return NULL;
	*bits = READ_ONCE(fwd->track);
	__builtin_memcpy(t->to.saddr, fwd->saddr, 16);
	if (*bits & NAT_MASQUERADED) /* which keeps whom it is for */
		__builtin_memcpy(t->to.daddr, pkt->key.daddr, 16);
	else
		__builtin_memcpy(t->to.daddr, b->addr, 16);
	t->to.sport = fwd->sport;
	t->to.dport = fwd->dport;
	t->to.proto = pkt->key.proto;
	return READ_ONCE(fwd->word) == word ? b : NULL;
}

/* Another processor translated this flow first: use its translation. */
static __noinline bool nat_adopt(const struct packet *pkt, struct translation *t)
{
	struct nat_fwd_val *winner = bpf_map_lookup_elem(&nat_fwd, &pkt->key);
	struct backend_val *b;

	if (!winner)
		return false;
	note(EVENT_NAT_ADOPTED);
	t->backend = READ_ONCE(winner->word);
	__builtin_memcpy(t->to.saddr, winner->saddr, 16);
	t->to.sport = winner->sport;
	t->to.dport = winner->dport;
	b = bpf_map_lookup_elem(&backends, &t->backend);
	if (b)
		__builtin_memcpy(t->to.daddr, b->addr, 16);
	return b;
}

/* Whether it is none that a side sends that has reset the connection: see bpf/track.h. */
static __always_inline bool goes_on(const struct packet *pkt)
{
	if (pkt->key.proto == IPPROTO_SCTP)
		return !(pkt->tcp_flags & (TCP_SYN | TCP_RST | TCP_FIN | TCP_ACK));
	return (pkt->tcp_flags & (TCP_SYN | TCP_RST | TCP_ACK)) == TCP_ACK; /* a FIN, too */
}

/* What a client's packet says of a flow's state, */
static __always_inline void note_client(struct nat_fwd_val *fwd, const struct packet *pkt)
{
	if (fwd->closed & NAT_RST && goes_on(pkt)) {
		fwd->closed &= ~NAT_RST;
		fwd->state = fwd->closed ? FLOW_CLOSING : FLOW_CONFIRMED;
	}
	if (closes(pkt)) {
		fwd->state = FLOW_CLOSING;
		fwd->closed |= pkt->tcp_flags & TCP_RST ? NAT_RST : NAT_FIN_CLIENT;
	} else if (fwd->state == FLOW_OPENING && !opens(pkt)) {
		fwd->state = FLOW_CONFIRMED;
	}
}

/* and one of its backend's. */
static __always_inline void note_backend(struct nat_rev_val *rev, const struct packet *pkt)
{
	if (rev->closed & NAT_RST && goes_on(pkt))
		rev->closed &= ~NAT_RST;
	if (closes(pkt))
		rev->closed |= pkt->tcp_flags & TCP_RST ? NAT_RST : NAT_FIN_BACKEND;
}

/* Whether both sides have closed a flow, or one has broken it, so that a SYN in its tuple is another's:
 * as track_over() has it, of a flow that TC does not judge. `to` is the tuple as it leaves. */
static __noinline bool pair_over(const struct nat_fwd_val *fwd, const struct flow_key *to)
{
	const __u8 both = NAT_FIN_CLIENT | NAT_FIN_BACKEND;
	struct flow_key key __attribute__((aligned(8)));
	struct nat_rev_val *rev;
	__u8 closed;

	reverse(to, &key);
	rev = bpf_map_lookup_elem(&nat_rev, &key);
	closed = fwd->closed | (rev ? rev->closed : 0);
	return closed & NAT_RST || (closed & both) == both;
}

/* Removes a flow that has ended, so that a new one may take its tuple. */
static __noinline void nat_end(const struct packet *pkt, const struct translation *t)
{
	struct flow_key key __attribute__((aligned(8)));

	if (DRY_RUN)
		return;
	reverse(&t->to, &key);
	bpf_map_delete_elem(&nat_fwd, &pkt->key);
	bpf_map_delete_elem(&nat_rev, &key);
}

/* Replies of a backend on this node, which the stack has the way for. */
static __always_inline bool is_routed(const struct nat_rev_val *rev)
{
	return !rev->back.ifindex || rev->handed;
}

static __always_inline bool is_left_to_tc(const struct nat_rev_val *rev, __u8 proto)
{
	return !AT_TC && (is_routed(rev) || rev->hairpin || proto == IPPROTO_SCTP);
}

/* How a packet of a backend goes back to its client: `to` and `back` of the scratch memory. NULL if
 * nobody is known for it. */
static __always_inline struct nat_rev_val *look_back(const struct flow_key *key, __u32 hash,
						     struct nat_scratch *s)
{
	struct nat_rev_val *rev = bpf_map_lookup_elem(&nat_rev, key);
	__u64 word;

	if (!rev)
		return NULL;
	word = READ_ONCE(rev->word);
	__builtin_memcpy(s->to.saddr, rev->vip, 16);
	__builtin_memcpy(s->to.daddr, rev->client, 16);
	s->to.sport = rev->vip_port;
	s->to.dport = rev->client_port;
	s->to.proto = key->proto;
	s->back = rev->back;
	/* Not if the kernel has recycled the element under us. */
	return word >> 32 == hash && READ_ONCE(rev->word) == word ? rev : NULL;
}

#endif
