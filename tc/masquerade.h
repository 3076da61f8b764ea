/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What leaves the node gets this host's address, so that its replies come back here:
 *
 *   egress    client -> backend elsewhere, or pod -> world   becomes   own -> the same
 *   ingress   backend or world -> own                        becomes   the same -> client or pod
 *
 * The first for services of mode local, whose client was let alone on its way in: that the stack
 * routed the packet to such a device says that its backend is elsewhere. It is a flow of its own beside
 * that of the service, so either side's entries are as ever.
 */
#ifndef SHUNT_MASQUERADE_H
#define SHUNT_MASQUERADE_H

#include "echo.h"
#include "forward.h"

/* An echo request on its way out, or a reply on its way in: the packet has its tuple from now on, of
 * which the requester's port is the identifier, and the other is 0. Not static: verified once. */
__noinline int read_echo(struct __sk_buff *ctx, struct packet *pkt)
{
	__be16 *icmp;
	__u8 wanted;

	if (!pkt || !config.masquerade || !is_icmp(pkt) || !fits_frame(ctx, pkt))
		return false;
	icmp = transport(ctx, pkt);
	if (!icmp || (void *)(icmp + 4) > end(ctx))
		return false;
	if (pkt->way == WAY_TC_OUT)
		wanted = pkt->ipv6 ? ICMPV6_ECHO_REQUEST : ICMP_ECHO_REQUEST;
	else
		wanted = pkt->ipv6 ? ICMPV6_ECHO_REPLY : ICMP_ECHO_REPLY;
	if (icmp[0] != bpf_htons(wanted << 8)) /* its code is 0 */
		return false;
	if (pkt->way == WAY_TC_OUT)
		set_ports(&pkt->key, icmp[ECHO_ID], 0, pkt->key.proto);
	else
		set_ports(&pkt->key, 0, icmp[ECHO_ID], pkt->key.proto);
	return true;
}

/* enum masq_net */
static __noinline __u32 kinds_of(const __u8 *addr)
{
	struct masq_net_key key = {.prefix_bits = 128};
	struct masq_net_val *found;

	__builtin_memcpy(key.addr, addr, 16);
	found = bpf_map_lookup_elem(&masq_nets, &key);
	return found ? found->kinds : 0;
}

/* Whether it is a client's packet, translated on its way in: whose then stands in the scratch memory.
 * Mode nat's have this host's address already. */
static __noinline bool is_to_backend(const struct packet *pkt, struct nat_scratch *s)
{
	struct nat_rev_val *rev;

	reverse(&pkt->key, &s->key);
	rev = bpf_map_lookup_elem(&nat_rev, &s->key);
	if (!rev || (rev->track & (NAT_TRACKED | NAT_MASQUERADED)) != NAT_TRACKED ||
	    rev->back.ifindex)
		return false;
	s->svc = rev->svc;
	s->backend = READ_ONCE(rev->word);
	return true;
}

static __noinline enum known recall_masqueraded(const struct packet *pkt, struct translation *t,
						struct nat_scratch *s)
{
	struct nat_fwd_val *fwd = bpf_map_lookup_elem(&nat_fwd, &pkt->key);
	__u32 bits;

	if (!fwd || !read_forward(pkt, fwd, t, &bits))
		return KNOWN_NOT;
	/* A service's whose VIP this is no more: */
	if (!(bits & NAT_MASQUERADED))
		return KNOWN_ENDED;
	if (may_begin(pkt) && track_over(bits))
		return KNOWN_ENDED;
	return go_on(fwd, pkt, &t->to, bits, s) ? KNOWN : KNOWN_REFUSED;
}

static __noinline bool create_masqueraded(const struct packet *pkt, const struct masq_val *own,
					  struct translation *t, enum reason *why)
{
	struct nat_scratch *s = own_scratch();
	int err;

	*why = REASON_DROP_NAT_NO_SOURCE;
	t->to = pkt->key;
	__builtin_memcpy(t->to.saddr, pkt->ipv6 ? own->saddr6 : own->saddr4, 16);
	if (!s || is_zero(t->to.saddr))
		return false;
	t->backend = s->backend;
	*why = REASON_DROP_NAT_OVER_BUDGET;
	if (!spend(BUDGET_INSERTS))
		return false;
	begin_pair(pkt, s, s->svc, NAT_TRACKED | NAT_MASQUERADED);
	if (!claim_port(pkt, t, s, why))
		return false;
	step(STEP_MASQUERADE, bpf_ntohs(t->to.sport), KNOWN_NOT);
	err = complete_pair(pkt, t, s);
	if (!err)
		return true;
	*why = REASON_DROP_NAT_TABLE_FULL;
	if (err != -EEXIST || recall_masqueraded(pkt, t, s) != KNOWN)
		return false;
	note(EVENT_NAT_ADOPTED);
	return true;
}

/* By its device and its addresses alone. */
static __always_inline bool is_masqueraded(struct __sk_buff *ctx, const struct packet *pkt)
{
	struct masq_key device = {.ifindex = ctx->ifindex};

	return config.masquerade && bpf_map_lookup_elem(&masq, &device) &&
	       kinds_of(pkt->key.saddr) & MASQ_NET_SOURCE &&
	       !(kinds_of(pkt->key.daddr) & MASQ_NET_NOT_TO);
}

/* A later fragment of which nothing is known: with its own address it must not leave either. */
static __always_inline bool may_not_leave(struct __sk_buff *ctx, const struct packet *pkt)
{
	return has_ports(pkt->key.proto) && is_masqueraded(ctx, pkt);
}

/* False if the packet leaves as it is. */
static __always_inline bool masquerade(struct __sk_buff *ctx, struct packet *pkt,
				       struct nat_scratch *s, struct verdict *v)
{
	struct masq_key device = {.ifindex = ctx->ifindex};
	struct masq_val *own;
	struct translation t = {};
	enum known found;
	enum reason why;
	bool source;

	if (!config.masquerade)
		return false;
	own = bpf_map_lookup_elem(&masq, &device);
	if (!own)
		return false;
	source = kinds_of(pkt->key.saddr) & MASQ_NET_SOURCE;
	if (!source && !is_port_of_ours(pkt->key.proto, bpf_ntohs(pkt->key.dport)))
		return false;
	s->svc = s->backend = 0;
	pkt->hash = whole_hash(&pkt->key, pkt->ipv6);
	found = recall_masqueraded(pkt, &t, s);
	if (found == KNOWN_NOT || found == KNOWN_ENDED) {
		if (source ? kinds_of(pkt->key.daddr) & MASQ_NET_NOT_TO : !is_to_backend(pkt, s))
			return false;
		*v = verdict(XDP_DROP, REASON_DROP_NAT_NO_FLOW);
		if (!may_begin(pkt))
			return true;
		if (found == KNOWN_ENDED)
			nat_end(pkt, &t);
		if (!create_masqueraded(pkt, own, &t, &why)) {
			*v = verdict(XDP_DROP, why);
			return true;
		}
	}
	if (found == KNOWN || found == KNOWN_REFUSED)
		step(STEP_MASQUERADE, bpf_ntohs(t.to.sport), found);
	if (found == KNOWN_REFUSED)
		*v = verdict(XDP_DROP, REASON_DROP_NAT_INVALID);
	else if (!change(ctx, pkt, &t.to))
		*v = verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
	else
		*v = verdict(XDP_PASS, REASON_SENT_MASQUERADED);
	return true;
}

#endif
