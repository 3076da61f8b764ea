/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* From a client: a flow's translation, found or made. */
#ifndef SHUNT_FORWARD_H
#define SHUNT_FORWARD_H

#include "flow.h"
#include "nat_pair.h"
#include "quic.h"
#include "select.h"
#include "send_on.h"
#include "track.h"

/* What both entries say, this one and the other: `next`, where it was `bits`. */
static __always_inline void keep_track(__u32 *track, __u32 *other, __u32 bits, __u32 next)
{
	if (DRY_RUN)
		return;
	__sync_fetch_and_or(track, next);
	if (other)
		__sync_fetch_and_or(other, next);
	bits &= ~next;
	if (!bits)
		return;
	__sync_fetch_and_and(track, ~bits);
	if (other)
		__sync_fetch_and_and(other, ~bits);
}

static __noinline void track_forward(struct nat_fwd_val *fwd, const struct flow_key *to, __u32 bits,
				     __u32 next, struct nat_scratch *s)
{
	struct nat_rev_val *rev = NULL;

	/* Of TCP and UDP a backend's packets are judged by what the backend itself has said. */
	if (to->proto == IPPROTO_SCTP) {
		reverse(to, &s->key);
		rev = bpf_map_lookup_elem(&nat_rev, &s->key);
	}
	keep_track(&fwd->track, rev ? &rev->track : NULL, bits, next);
}

/* The client's side of a flow goes on with this packet; false if it must not. `bits` are its track. */
static __always_inline bool go_on(struct nat_fwd_val *fwd, const struct packet *pkt,
				  const struct flow_key *to, __u32 bits, struct nat_scratch *s)
{
	__u32 next = bits & NAT_TRACKED ? track_step(bits, pkt, false) : bits;
	__u64 now;

	if (next & NAT_INVALID)
		return false;
	if (next != bits)
		track_forward(fwd, to, bits, next, s);
	if (!DRY_RUN) /* what XDP knows of a flow, too: it may go on with it */
		note_client(fwd, pkt);
	now = now_ns();
	if (!DRY_RUN && (__s64)(now - fwd->seen_ns) > (__s64)TOUCH_NS)
		WRITE_ONCE(fwd->seen_ns, now);
	return true;
}

static __noinline enum known recall_flow(const struct packet *pkt, struct translation *t,
					 struct nat_scratch *s)
{
	struct nat_fwd_val *fwd = bpf_map_lookup_elem(&nat_fwd, &pkt->key);
	struct backend_val *b;
	__u32 bits;

	b = fwd ? read_forward(pkt, fwd, t, &bits) : NULL;
	if (!b)
		return KNOWN_NOT;
	/* It left the node before this service was, and its connections go on doing so. */
	if (bits & NAT_MASQUERADED)
		return may_begin(pkt) ? KNOWN_ENDED : KNOWN_LEAVING;
	if (!(b->flags & BACKEND_KNOWN))
		return KNOWN_ENDED;
	/* As in XDP: what may begin anew does not stay with a backend that is down. */
	if (may_begin(pkt) && !(b->flags & BACKEND_UP))
		return KNOWN_ENDED;
	if (opens(pkt) && (bits & NAT_TRACKED ? track_over(bits) : pair_over(fwd, &t->to)))
		return KNOWN_ENDED;
	return go_on(fwd, pkt, &t->to, bits, s) ? KNOWN : KNOWN_REFUSED;
}

/* Claims the reverse tuple: the client's own port if the client's address is kept and nobody has it
 * (it may have come by another VIP), else one of ours. */
static __always_inline bool claim_tuple(const struct packet *pkt, struct translation *t,
					struct nat_scratch *s, bool local, enum reason *why)
{
	int err;

	if (local) {
		t->to.sport = pkt->key.sport;
		err = claim(pkt, t, s);
		if (!err)
			return true;
		*why = REASON_DROP_NAT_TABLE_FULL;
		if (err != -EEXIST)
			return false;
		note(EVENT_NAT_COLLISION);
	}
	return claim_port(pkt, t, s, why);
}

static __noinline bool create_flow(struct __sk_buff *ctx, const struct packet *pkt,
				   const struct place *p, struct translation *t, enum reason *why)
{
	struct backend_val *b = bpf_map_lookup_elem(&backends, &p->cur);
	struct nat_scratch *s = own_scratch();
	bool hairpin = s && b && s->mode == MODE_LOCAL && same_address(b->addr, pkt->key.saddr);
	bool local = s && s->mode == MODE_LOCAL;
	__u32 hop_index = b ? b->nexthop : 0;
	struct nexthop_val *nh = bpf_map_lookup_elem(&nexthops, &hop_index);
	int err;

	*why = REASON_DROP_NAT_NO_SOURCE;
	if (!s || !b || !nh || (!local && is_zero(nh->saddr)))
		return false;
	*why = REASON_DROP_NAT46_NOT_XDP;
	if (pkt->ipv6 == is_mapped(b->addr))
		return false;
	*why = REASON_DROP_NAT_OVER_BUDGET;
	if (!spend(BUDGET_INSERTS))
		return false;
	t->backend = p->cur;
	__builtin_memcpy(t->to.saddr,
			 hairpin ? pkt->key.daddr :
			 local	 ? pkt->key.saddr :
				   nh->saddr,
			 16);
	__builtin_memcpy(t->to.daddr, b->addr, 16);
	t->to.dport = b->port ?: pkt->key.dport;
	t->to.proto = pkt->key.proto;
	begin_pair(pkt, s, p->svc, NAT_TRACKED);
	s->rev.hairpin = hairpin;
	s->rev.handed = local && !hairpin && may_hand_over(pkt, nh);
	if ((!local || hairpin || s->rev.handed) && !way_back(ctx, &s->rev.back))
		return false;
	if (!claim_tuple(pkt, t, s, local && !hairpin, why))
		return false;
	step(STEP_NAT_NEW, bpf_ntohs(t->to.sport), t->backend);
	err = complete_pair(pkt, t, s);
	*why = REASON_DROP_NAT_TABLE_FULL;
	return !err || (err == -EEXIST && nat_adopt(pkt, t));
}

/* To the service's backend, of whatever mode of the two. Where a flow is known, its slot matters only if its
 * packets may name another backend. */
static __always_inline struct verdict forward(struct __sk_buff *ctx, const struct packet *pkt,
					      __u32 svc_id, const struct svc_val *service,
					      struct nat_scratch *s)
{
	bool by_id = service->flags & SVC_QUIC;
	struct translation t = {};
	enum known found = recall_flow(pkt, &t, s);
	struct place p = {};
	struct verdict v;
	enum reason why;

	step(STEP_NAT_FLOW, found, found == KNOWN_NOT ? 0 : t.backend);
	if (found == KNOWN_REFUSED)
		return verdict(XDP_DROP, REASON_DROP_NAT_INVALID);
	if (found == KNOWN_LEAVING)
		return verdict(XDP_PASS, REASON_PASS_NOT_OURS);
	if ((by_id || found != KNOWN) && !find_place(pkt, svc_id, service, &p))
		return verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
	if (by_id)
		find_by_id(ctx, pkt, &p);
	if (found == KNOWN && p.certain && t.backend != p.named)
		found = KNOWN_ENDED; /* its tuple is another connection's now */
	if (found != KNOWN) {
		if (!may_begin(pkt))
			return verdict(XDP_DROP, REASON_DROP_NAT_NO_FLOW);
		choose_new(pkt, &p);
		if (!p.cur)
			return refuse(ctx, pkt);
		if (found == KNOWN_ENDED)
			nat_end(pkt, &t);
		if (!create_flow(ctx, pkt, &p, &t, &why))
			return verdict(XDP_DROP, why);
	}
	count_backend(t.backend, pkt->len);
	if (same_address(t.to.saddr, pkt->key.saddr)) /* no hairpin */
		s->mode = way_of_sending(pkt, s->mode, t.backend);
	v = send_forward(ctx, pkt, s, t.backend, &t.to);
	v.backend = t.backend;
	return v;
}

#endif
