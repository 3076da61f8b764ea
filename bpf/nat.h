/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Mode nat: source and destination are translated; replies come back here and are restored.
 */
#ifndef SHUNT_NAT_H
#define SHUNT_NAT_H

#include "last_hop.h"
#include "nat46.h"
#include "rewrite.h"
#include "send.h"

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
	begin_pair(pkt, s, p->svc, 0);
	if (!learn_hop(ctx, pkt, &s->rev.back))
		return false;
	/* So late it costs no stack. Earlier, this function's is 72 bytes, which 6.1 counts as 96. */
	*why = REASON_DROP_NAT_OVER_BUDGET;
	if (!spend(BUDGET_INSERTS) || !claim_port(pkt, t, s, why))
		return false;
	step(STEP_NAT_NEW, bpf_ntohs(t->to.sport), t->backend);
	err = complete_pair(pkt, t, s);
	*why = REASON_DROP_NAT_TABLE_FULL;
	return !err || (err == -EEXIST && nat_adopt(pkt, t));
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

/* A flow that TC has made goes on here: from now on TC does not judge it, of which it has not seen all.
 * `to` is the tuple that the packet gets; `back`: whether it is a reply. */
static __noinline void leave_untracked(const struct packet *pkt, const struct flow_key *to,
				       bool back)
{
	struct flow_key key __attribute__((aligned(8)));
	struct nat_fwd_val *fwd;
	struct nat_rev_val *rev;

	reverse(to, &key);
	fwd = bpf_map_lookup_elem(&nat_fwd, back ? &key : &pkt->key);
	rev = bpf_map_lookup_elem(&nat_rev, back ? &pkt->key : &key);
	if (fwd)
		__sync_fetch_and_and(&fwd->track, ~NAT_TRACKED);
	if (rev)
		__sync_fetch_and_and(&rev->track, ~NAT_TRACKED);
}

static __always_inline enum known nat_recall(struct xdp_md *ctx, const struct packet *pkt,
					     struct nat_fwd_val *fwd, struct translation *t)
{
	struct last_hop hop __attribute__((aligned(8)));
	struct backend_val *b;
	__u32 bits;
	__u64 now;

	b = read_forward(pkt, fwd, t, &bits);
	if (!b)
		return KNOWN_NOT;
	/* It left the node before this service was, and its connections go on doing so. */
	if (unlikely(bits & NAT_MASQUERADED))
		return may_begin(pkt) ? KNOWN_ENDED : KNOWN_LEAVING;
	if (!(b->flags & BACKEND_KNOWN))
		return KNOWN_ENDED;
	/* A flow that may begin anew does not stay with a backend that is down; an established connection
	 * has nowhere else to go. */
	if (may_begin(pkt) && !(b->flags & BACKEND_UP))
		return KNOWN_ENDED;
	if (opens(pkt) && pair_over(fwd, &t->to))
		return KNOWN_ENDED;
	if (DRY_RUN)
		return KNOWN;
	if (unlikely(bits & NAT_TRACKED))
		leave_untracked(pkt, &t->to, false);
	note_client(fwd, pkt);
	now = now_ns();
	if ((__s64)(now - fwd->seen_ns) > (__s64)TOUCH_NS)
		WRITE_ONCE(fwd->seen_ns, now);
	if (learn_hop(ctx, pkt, &hop) && !same_hop(&hop, &fwd->from))
		move_last_hop(&t->to, fwd, &hop);
	return KNOWN;
}

static __always_inline struct verdict nat_send(struct xdp_md *ctx, struct packet *pkt,
					       const struct translation *t)
{
	struct backend_val *b = bpf_map_lookup_elem(&backends, &t->backend);
	struct hop hop;

	if (!b)
		return verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
	step(STEP_BACKEND, t->backend, b->flags);
	if (crosses(pkt, &t->to))
		return send_crossed(ctx, pkt, t);
	if (!find_hop(ctx, b, pkt->ip_len, &hop))
		return verdict(XDP_DROP, REASON_DROP_NO_NEXTHOP);
	if (pkt->ip_len > hop.mtu)
		return too_big(ctx, pkt, hop.mtu);
	if (!rewrite(ctx, pkt, &t->to))
		return verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
	return send_l2(ctx, pkt, &hop);
}

static __always_inline struct verdict nat_forward(struct xdp_md *ctx, struct packet *pkt,
						  struct place *p)
{
	struct nat_fwd_val *fwd = bpf_map_lookup_elem(&nat_fwd, &pkt->key);
	struct translation t = {};
	enum known found = fwd ? nat_recall(ctx, pkt, fwd, &t) : KNOWN_NOT;
	struct verdict v;
	enum reason why;

	if (found == KNOWN && p->certain && t.backend != p->named)
		found = KNOWN_ENDED; /* its tuple is another connection's now */
	step(STEP_NAT_FLOW, found, found == KNOWN_NOT ? 0 : t.backend);
	if (found == KNOWN_LEAVING)
		return verdict(XDP_PASS, REASON_PASS_NOT_OURS);
	if (found != KNOWN) {
		if (pkt->key.proto == IPPROTO_TCP && !opens(pkt)) {
			if (!(pkt->tcp_flags & TCP_RST) && answer_rst(ctx, pkt))
				return verdict(XDP_TX, REASON_SENT_RST_NO_FLOW);
			return verdict(XDP_DROP, REASON_DROP_NAT_NO_FLOW);
		}
		choose_new(pkt, p);
		if (!p->cur)
			return refuse(ctx, pkt);
		if (found == KNOWN_ENDED)
			nat_end(pkt, &t);
		if (!nat_create(ctx, pkt, p, &t, &why))
			return verdict(XDP_DROP, why);
	}
	count_backend(t.backend, pkt->len);
	v = nat_send(ctx, pkt, &t);
	v.backend = t.backend;
	return v;
}

enum replied { REPLY_NONE, REPLY_DECIDED, REPLY_CROSSES };

/* A packet to one of nat's ports: a reply? If it is the other family's, the caller sends it. */
static __noinline enum replied nat_reply(struct xdp_md *ctx, const struct packet *pkt,
					 struct verdict *v)
{
	struct nat_scratch *s = own_scratch(); /* 6.1 has no more stack for the tuple */
	struct nat_rev_val *rev = s ? look_back(&pkt->key, pkt->hash, s) : NULL;
	struct hop hop;
	__u64 now;

	step(STEP_NAT_REPLY, rev ? 1 : 0, rev ? rev->svc : 0);
	if (!rev || is_left_to_tc(rev, pkt->key.proto))
		return REPLY_NONE;
	if (!DRY_RUN && unlikely(rev->track & NAT_TRACKED)) {
		s->to.scope = SCOPE_EXTERNAL;
		leave_untracked(pkt, &s->to, true);
	}
	if (!DRY_RUN)
		note_backend(rev, pkt);
	now = now_ns();
	if (!DRY_RUN && (__s64)(now - rev->seen_ns) > (__s64)TOUCH_NS)
		WRITE_ONCE(rev->seen_ns, now);
	if (crosses(pkt, &s->to))
		return REPLY_CROSSES;
	hop = hop_back(&s->back);
	step_hop(&hop);
	if (!rewrite(ctx, pkt, &s->to)) {
		*v = verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
		return REPLY_DECIDED;
	}
	*v = send_l2(ctx, pkt, &hop);
	if (v->reason == REASON_SENT_TO_BACKEND)
		v->reason = REASON_SENT_TO_CLIENT;
	return REPLY_DECIDED;
}

#endif
