/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Mode nat: source and destination are translated; replies come back here and are restored.
 *
 * A flow is two entries. The reverse one goes in first, with NOEXIST: it claims the port
 * towards that backend. Then the forward one: a processor that finds it there already adopts it
 * and gives its own claim back. The agent's scan removes both, the forward one first, so that no
 * packet is ever sent whose reply would not be known.
 */
#ifndef SHUNT_NAT_H
#define SHUNT_NAT_H

#include "last_hop.h"
#include "rewrite.h"
#include "send.h"
#include "siphash.h"

#define NAT_ATTEMPTS 32
#define EEXIST	     17

struct translation {
	struct flow_key to __attribute__((aligned(8))); /* the tuple as it leaves */
	__u32 backend;
};

static __always_inline void reverse(const struct flow_key *key, struct flow_key *out)
{
	__builtin_memcpy(out->saddr, key->daddr, 16);
	__builtin_memcpy(out->daddr, key->saddr, 16);
	out->sport = key->dport;
	out->dport = key->sport;
	out->proto = key->proto;
	out->scope = key->scope;
	out->kind = FLOW_KIND_FLOW;
	out->pad = 0;
}

/* Claims a port towards the backend; returns whether one was had, else `*why`. */
static __noinline bool claim_port(const struct packet *pkt, struct translation *t,
				  struct nat_scratch *s, enum reason *why)
{
	*why = REASON_DROP_NAT_NO_PORT;
	/* 64 bits wide: a 32-bit counter, spilled, is unknown to the verifier (6.18, clang 14:
	 * "infinite loop detected"). */
	for (__u64 attempt = 0; attempt < NAT_ATTEMPTS; attempt++) {
		__u32 random = port_hash(&pkt->key, attempt) >> 32;
		int err; /* before 6.4 only the lower half of a map function's result is its own */

		t->to.sport = bpf_htons(config.nat_port_min +
					((__u64)random * config.nat_port_count >> 32));
		reverse(&t->to, &s->key);
		s->rev.word = (__u64)whole_hash(&s->key, pkt->ipv6) << 32 | t->backend;
		err = bpf_map_update_elem(&nat_rev, &s->key, &s->rev, BPF_NOEXIST);
		if (!err)
			return true;
		if (err != -EEXIST) {
			*why = REASON_DROP_NAT_TABLE_FULL;
			return false;
		}
		note(EVENT_NAT_COLLISION);
	}
	return false;
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

static __noinline bool nat_create(struct xdp_md *ctx, const struct packet *pkt,
				  const struct place *p, struct translation *t, enum reason *why)
{
	struct backend_val *b = bpf_map_lookup_elem(&backends, &p->cur);
	__u32 hop_index = b ? b->nexthop : 0, zero = 0;
	struct nexthop_val *nh = bpf_map_lookup_elem(&nexthops, &hop_index);
	struct nat_scratch *s = bpf_map_lookup_elem(&scratch, &zero);
	int err;

	*why = REASON_DROP_NAT_NO_SOURCE;
	if (!b || !nh || !s || is_zero(nh->saddr))
		return false;
	t->backend = p->cur;
	__builtin_memcpy(t->to.saddr, nh->saddr, 16);
	__builtin_memcpy(t->to.daddr, b->addr, 16);
	t->to.dport = b->port ?: pkt->key.dport;
	t->to.proto = pkt->key.proto;
	s->rev = (struct nat_rev_val){
		.seen_ns = now_ns(),
		.client_port = pkt->key.sport,
		.vip_port = pkt->key.dport,
		.svc = p->svc,
	};
	__builtin_memcpy(s->rev.client, pkt->key.saddr, 16);
	__builtin_memcpy(s->rev.vip, pkt->key.daddr, 16);
	if (!learn_hop(ctx, pkt, &s->rev.back) || !claim_port(pkt, t, s, why))
		return false;

	s->fwd = (struct nat_fwd_val){
		.word = (__u64)pkt->hash << 32 | t->backend,
		.seen_ns = s->rev.seen_ns,
		.sport = t->to.sport,
		.dport = t->to.dport,
		.svc = p->svc,
		.state = opens(pkt) ? FLOW_OPENING : FLOW_CONFIRMED,
		.from = s->rev.back,
	};
	__builtin_memcpy(s->fwd.saddr, t->to.saddr, 16);
	err = bpf_map_update_elem(&nat_fwd, &pkt->key, &s->fwd, BPF_NOEXIST);
	if (!err) {
		note(EVENT_NAT_CREATED);
		return true;
	}
	bpf_map_delete_elem(&nat_rev, &s->key);
	*why = REASON_DROP_NAT_TABLE_FULL;
	return err == -EEXIST && nat_adopt(pkt, t);
}

/* Removes a flow that has ended, so that a new one may take its tuple. */
static __noinline void nat_end(const struct packet *pkt, const struct translation *t)
{
	struct flow_key key __attribute__((aligned(8)));

	reverse(&t->to, &key);
	bpf_map_delete_elem(&nat_fwd, &pkt->key);
	bpf_map_delete_elem(&nat_rev, &key);
}

/* The client's packets come another way now, so must its replies go. */
static __noinline void move_last_hop(const struct flow_key *to, struct nat_fwd_val *fwd,
				     const struct last_hop *hop)
{
	struct flow_key key __attribute__((aligned(8)));
	struct nat_rev_val *rev;

	reverse(to, &key);
	rev = bpf_map_lookup_elem(&nat_rev, &key);
	if (rev)
		rev->back = *hop;
	fwd->from = *hop;
}

enum recalled { RECALLED, RECALLED_NONE, RECALLED_ENDED };

static __always_inline enum recalled nat_recall(struct xdp_md *ctx, const struct packet *pkt,
						struct nat_fwd_val *fwd, struct translation *t)
{
	__u64 word = READ_ONCE(fwd->word), now;
	struct backend_val *b;
	struct last_hop hop __attribute__((aligned(8)));

	t->backend = word;
	b = bpf_map_lookup_elem(&backends, &t->backend);
	if (word >> 32 != pkt->hash || !b)
		return RECALLED_NONE;
	__builtin_memcpy(t->to.saddr, fwd->saddr, 16);
	__builtin_memcpy(t->to.daddr, b->addr, 16);
	t->to.sport = fwd->sport;
	t->to.dport = fwd->dport;
	t->to.proto = pkt->key.proto;
	/* The kernel may have recycled the element under us; `word` is written first. */
	if (READ_ONCE(fwd->word) != word)
		return RECALLED_NONE;
	if (!(b->flags & BACKEND_KNOWN))
		return RECALLED_ENDED;
	if (pkt->key.proto == IPPROTO_UDP || opens(pkt)) {
		/* A flow that may begin anew does not stay with a backend that is down; an
		 * established connection has nowhere else to go. */
		if (!(b->flags & BACKEND_UP) || fwd->state == FLOW_CLOSING)
			return RECALLED_ENDED;
	} else if (fwd->state == FLOW_OPENING) {
		fwd->state = FLOW_CONFIRMED;
	}
	if (closes(pkt)) {
		fwd->state = FLOW_CLOSING;
		fwd->closed |= pkt->tcp_flags & TCP_RST ? NAT_RST : NAT_FIN_CLIENT;
	}
	now = now_ns();
	if ((__s64)(now - fwd->seen_ns) > (__s64)TOUCH_NS)
		WRITE_ONCE(fwd->seen_ns, now);
	if (learn_hop(ctx, pkt, &hop) && !same_hop(&hop, &fwd->from))
		move_last_hop(&t->to, fwd, &hop);
	return RECALLED;
}

static __always_inline struct verdict nat_send(struct xdp_md *ctx, const struct packet *pkt,
					       const struct translation *t)
{
	struct backend_val *b = bpf_map_lookup_elem(&backends, &t->backend);
	struct hop hop;

	if (!b)
		return verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
	if (!find_hop(ctx, b, pkt->ip_len, &hop))
		return verdict(XDP_DROP, REASON_DROP_NO_NEXTHOP);
	if (pkt->ip_len > hop.mtu)
		return too_big(ctx, pkt, hop.mtu);
	if (!rewrite(ctx, pkt, &t->to))
		return verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
	return send_l2(ctx, pkt, &hop);
}

static __always_inline struct verdict nat_forward(struct xdp_md *ctx, const struct packet *pkt,
						  struct place *p)
{
	struct nat_fwd_val *fwd = bpf_map_lookup_elem(&nat_fwd, &pkt->key);
	struct translation t = {};
	enum recalled found = fwd ? nat_recall(ctx, pkt, fwd, &t) : RECALLED_NONE;
	struct verdict v;
	enum reason why;

	if (found != RECALLED) {
		if (pkt->key.proto == IPPROTO_TCP && !opens(pkt)) {
			if (!(pkt->tcp_flags & TCP_RST) && answer_rst(ctx, pkt))
				return verdict(XDP_TX, REASON_SENT_RST_NO_FLOW);
			return verdict(XDP_DROP, REASON_DROP_NAT_NO_FLOW);
		}
		if (p->flags & SVC_AFFINITY)
			p->cur = affine_backend(pkt, p->svc, p->cur);
		if (!p->cur)
			return refuse(ctx, pkt);
		if (found == RECALLED_ENDED)
			nat_end(pkt, &t);
		if (!nat_create(ctx, pkt, p, &t, &why))
			return verdict(XDP_DROP, why);
	}
	v = nat_send(ctx, pkt, &t);
	v.backend = t.backend;
	return v;
}

/* A packet to one of nat's ports: a reply, or false. */
static __noinline bool nat_reply(struct xdp_md *ctx, const struct packet *pkt, struct verdict *v)
{
	struct nat_rev_val *rev = bpf_map_lookup_elem(&nat_rev, &pkt->key);
	struct nat_scratch *s = own_scratch(); /* 6.1 has no more stack for the tuple */
	struct hop hop = {.mtu = 0xffff};
	__u64 word, now;

	if (!rev || !s)
		return false;
	word = READ_ONCE(rev->word);
	__builtin_memcpy(s->to.saddr, rev->vip, 16);
	__builtin_memcpy(s->to.daddr, rev->client, 16);
	s->to.sport = rev->vip_port;
	s->to.dport = rev->client_port;
	s->to.proto = pkt->key.proto;
	set_macs(&hop, *(__u64 *)rev->back.peer, *(__u64 *)rev->back.own);
	hop.ifindex = rev->back.ifindex;
	hop.tags = rev->back.tags;
	if (word >> 32 != pkt->hash || READ_ONCE(rev->word) != word)
		return false; /* recycled under us */
	if (closes(pkt))
		rev->closed |= pkt->tcp_flags & TCP_RST ? NAT_RST : NAT_FIN_BACKEND;
	now = now_ns();
	if ((__s64)(now - rev->seen_ns) > (__s64)TOUCH_NS)
		WRITE_ONCE(rev->seen_ns, now);
	if (!rewrite(ctx, pkt, &s->to)) {
		*v = verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
		return true;
	}
	*v = send_l2(ctx, pkt, &hop);
	if (v->reason == REASON_SENT_TO_BACKEND)
		v->reason = REASON_SENT_TO_CLIENT;
	return true;
}

#endif
