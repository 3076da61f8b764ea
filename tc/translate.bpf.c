/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Translation for the stack of this host, on its devices' way in and out: to backends on this node
 * (mode local), and where no XDP program did it before, to others (mode nat). The same tables and
 * the same choice as XDP's (bpf/select.h).
 *
 *   ingress   client -> VIP         local:  client -> backend, and on into the stack, or (handover: peer) to
 *                                           its veth's other end
 *                                   nat:    own -> backend, out of the backend's device
 *             backend -> own        nat:    VIP -> client, out of the client's device
 *   egress    backend -> client     local:  VIP -> client
 *
 * What leaves the node by certain devices gets this host's address there (masquerade.h).
 *
 * ICMP errors and later fragments go the way of their flow, at either hook. An answer (RST, ICMP) goes
 * back out of the device that the packet came in by.
 *
 * A packet is translated as a whole at one hook, or dropped. What is none of ours goes on, uncounted
 * here: XDP and the stack count it.
 */
#define CONTEXT __sk_buff

#include "chunks.h"
#include "forward.h"
#include "masquerade.h"
#include "options.h"
#include "reply.h"
#include "select.h"
#include "send_related.h"

static __always_inline struct verdict not_ours(void)
{
	return verdict(XDP_PASS, REASON_PASS_NOT_OURS);
}

/* A client speaks to a backend itself, with the ports of a flow to a VIP: the backend's replies to
 * both would look the same. A flow that has ended makes way. */
static __noinline bool clashes(const struct packet *pkt, struct nat_scratch *s)
{
	struct nat_rev_val *rev;
	struct nat_fwd_val *fwd;

	reverse(&pkt->key, &s->key);
	rev = bpf_map_lookup_elem(&nat_rev, &s->key);
	if (!rev || !(rev->track & NAT_TRACKED))
		return false;
	s->to = pkt->key;
	__builtin_memcpy(s->to.daddr, rev->vip, 16);
	s->to.sport = rev->client_port;
	s->to.dport = rev->vip_port;
	fwd = bpf_map_lookup_elem(&nat_fwd, &s->to);
	if (!track_over(rev->track | (fwd ? fwd->track : 0)))
		return true;
	if (!may_begin(pkt) || DRY_RUN)
		return false;
	bpf_map_delete_elem(&nat_fwd, &s->to);
	bpf_map_delete_elem(&nat_rev, &s->key);
	return false;
}

static __always_inline struct verdict balance(struct __sk_buff *ctx, struct packet *pkt,
					      __u32 svc_id, struct nat_scratch *s)
{
	struct svc_val *service = bpf_map_lookup_elem(&svc, &svc_id);
	enum reason why;

	if (!service || service->mode == MODE_NONE)
		return verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
	step(STEP_SERVICE, service->mode, service->flags);
	if (service->mode != MODE_LOCAL && service->mode != MODE_NAT)
		return not_ours();
	s->mode = service->mode;
	if (service->flags && !apply_options(pkt, svc_id, service->flags, &why))
		return verdict(XDP_DROP, why);
	return forward(ctx, pkt, svc_id, service, s);
}

static __always_inline bool parse_headers(struct __sk_buff *ctx, struct packet *pkt,
					  enum reason *why)
{
	void *from = at(ctx, 0), *to = end(ctx);

	/* clang 14 would spill half of a packet pointer (as in take_sample()). */
	asm volatile("" : "+r"(from), "+r"(to));
	if (!parse(ctx, from, to, pkt, why))
		return false;
	if (pkt->key.proto == IPPROTO_SCTP)
		pkt->chunks = see_chunks(ctx, pkt);
	return true;
}

/* From a backend of mode local, whose replies go back past the stack as its client's packets came. */
static __always_inline bool may_be_handed_back(const struct packet *pkt)
{
	return config.handover_peer && !pkt->first &&
	       is_port_of_ours(pkt->key.proto, bpf_ntohs(pkt->key.sport));
}

static __always_inline struct verdict decide_ingress(struct __sk_buff *ctx, struct packet *pkt,
						     struct nat_scratch *s)
{
	struct verdict v;
	enum reason why;
	__u32 svc_id;
	bool back;

	if (!parse_headers(ctx, pkt, &why) && (why != REASON_PASS_NOT_OURS || !read_echo(ctx, pkt)))
		return decide_related(ctx, pkt, why);
	back = may_be_handed_back(pkt);
	step(STEP_PORT, back || may_be_ours(&pkt->key), 0);
	if (!back && !may_be_ours(&pkt->key))
		return not_ours();
	pkt->frontend = frontend_hash(&pkt->key, pkt->ipv6, dport_proto_scope(&pkt->key));
	pkt->hash = flow_hash(&pkt->key, pkt->ipv6, pkt->frontend);
	if ((back || may_be_reply(&pkt->key)) && reply(ctx, pkt, s, false, &v))
		return v;
	svc_id = find_service(pkt);
	if (!svc_id)
		return clashes(pkt, s) ? verdict(XDP_DROP, REASON_DROP_NAT_CLASH) : not_ours();
	v = balance(ctx, pkt, svc_id, s);
	v.svc = svc_id;
	return v;
}

static __always_inline struct verdict decide_egress(struct __sk_buff *ctx, struct packet *pkt,
						    struct nat_scratch *s)
{
	struct verdict v;
	enum reason why;

	if (!parse_headers(ctx, pkt, &why) &&
	    (why != REASON_PASS_NOT_OURS || !read_echo(ctx, pkt))) {
		v = decide_related(ctx, pkt, why);
		if (v.reason == REASON_PASS_NOT_OURS && why == REASON_PASS_FRAGMENT &&
		    may_not_leave(ctx, pkt))
			return verdict(XDP_DROP, REASON_DROP_NAT_FRAGMENT);
		return v;
	}
	/* The ports of local backends are in the set, too. */
	if (is_port_of_ours(pkt->key.proto, bpf_ntohs(pkt->key.sport))) {
		pkt->hash = whole_hash(&pkt->key, pkt->ipv6);
		if (reply(ctx, pkt, s, true, &v))
			return v;
	}
	return masquerade(ctx, pkt, s, &v) ? v : not_ours();
}

static __always_inline bool sent_by_us(struct __sk_buff *ctx)
{
	if (ctx->tc_index != SENT_BY_US)
		return false;
	ctx->tc_index = 0;
	return true;
}

/* The one exit. TC_ACT_UNSPEC, which is TCX_NEXT, lets other programs see the packet. */
static __always_inline int leave_tc(struct __sk_buff *ctx, const struct packet *pkt,
				    struct verdict v)
{
	if (v.reason == REASON_PASS_NOT_OURS) {
		step(STEP_VERDICT, v.action, v.reason);
		return TC_ACT_UNSPEC;
	}
	if (pkt->first && sent_on(v.reason))
		remember_first(pkt, v.svc, v.backend);
	switch (leave(ctx, v, pkt->len)) {
	case XDP_DROP:
		return TC_ACT_SHOT;
	case XDP_TX: /* an answer */
		ctx->tc_index = SENT_BY_US;
		return bpf_redirect(ctx->ifindex, 0);
	case TC_ACT_REDIRECT:
		return TC_ACT_REDIRECT;
	default:
		return TC_ACT_UNSPEC;
	}
}

/* Whether the packet may be ours. A tagged frame is its VLAN device's; a check by way of a VIP has a
 * way of its own (xdp/check.bpf.c). */
static __always_inline bool is_eligible(const struct __sk_buff *ctx)
{
	return !ctx->vlan_present && (ctx->mark & ~SLOT_BACKEND_MASK) != config.check_mark;
}

SEC("tc")
int shunt_ingress(struct __sk_buff *ctx)
{
	struct packet pkt = {.len = ctx->len, .way = WAY_TC_IN};
	struct nat_scratch *s = own_scratch();

	sent_by_us(ctx); /* it may have been another namespace's */
	if (!s || !is_eligible(ctx))
		return leave_tc(ctx, &pkt, not_ours());
	pull_headers(ctx);
	return leave_tc(ctx, &pkt, decide_ingress(ctx, &pkt, s));
}

SEC("tc")
int shunt_egress(struct __sk_buff *ctx)
{
	struct packet pkt = {.len = ctx->len, .way = WAY_TC_OUT};
	struct nat_scratch *s = own_scratch();

	if (sent_by_us(ctx) || !s || !is_eligible(ctx))
		return leave_tc(ctx, &pkt, not_ours());
	pull_headers(ctx);
	return leave_tc(ctx, &pkt, decide_egress(ctx, &pkt, s));
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
