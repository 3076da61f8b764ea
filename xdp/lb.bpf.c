/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The load balancer. For a direct-server-return service in steady state a packet costs: parse,
 * one hash look-up (services), one flow hash, array reads (svc, slots, backends, nexthops),
 * encapsulate, transmit. No flow table, no clock, no FIB.
 */
#include "hooks.h"
#include "nat.h"
#include "options.h"
#include "quic.h"
#include "select.h"

#include "other.h"
#include "related.h"

/* Of a service that is none of XDP's. */
static __always_inline struct verdict not_sent(const struct svc_val *service)
{
	if (!service || service->mode == MODE_NONE)
		return verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
	step(STEP_SERVICE, service->mode, service->flags);
	return verdict(XDP_PASS, REASON_PASS_TO_TC);
}

/* The backend by the service's own record, and the service's mode. False: `*v` is the verdict. */
static __always_inline bool choose(struct xdp_md *ctx, struct packet *pkt, __u32 svc_id, __u32 *id,
				   enum mode *mode, struct verdict *v)
{
	struct svc_val *service = bpf_map_lookup_elem(&svc, &svc_id);
	struct slot_val *s;
	enum reason why;
	struct place p;
	__u32 slot;
	__u64 word;

	if (!service || service->mode <= MODE_LOCAL || /* one comparison for the two */
	    (service->mode == MODE_NAT && service->proto == IPPROTO_SCTP)) {
		*v = not_sent(service);
		return false;
	}
	*mode = service->mode;
	step(STEP_SERVICE, *mode, service->flags);
	if (service->flags && !apply_options(pkt, svc_id, service->flags, &why)) {
		*v = verdict(XDP_DROP, why);
		return false;
	}
	s = find_slot(pkt, service, &slot);
	if (!s) {
		*v = verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
		return false;
	}
	word = READ_ONCE(s->word);
	if (*mode != MODE_NAT && is_settled(word) &&
	    !(service->flags & (SVC_AFFINITY | SVC_QUIC))) {
		*id = word & SLOT_BACKEND_MASK;
		return true;
	}
	p = place_of(svc_id, service, slot, word);
	if (p.flags & SVC_QUIC)
		find_by_id(ctx, pkt, &p);
	if (*mode == MODE_NAT) {
		*v = nat_forward(ctx, pkt, &p);
		return false;
	}
	*id = p.named ?: keeps_state(&p) ? track(pkt, &p) : p.cur;
	return true;
}

static __always_inline struct verdict balance(struct xdp_md *ctx, struct packet *pkt, __u32 svc_id,
					      __u64 shortcut)
{
	enum mode mode = shortcut_mode(shortcut);
	__u32 id, outer;
	struct backend_val *b = backend_at_once(pkt, svc_id, shortcut, &id);
	struct verdict v;
	struct hop hop;

	if (!b) {
		if (!choose(ctx, pkt, svc_id, &id, &mode, &v))
			return v;
		if (!id)
			return refuse(ctx, pkt);
		b = bpf_map_lookup_elem(&backends, &id);
		if (!b || !(b->flags & BACKEND_KNOWN))
			return verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
	}
	step(STEP_BACKEND, id, b->flags);
	count_backend(id, pkt->len);
	outer = mode == MODE_DSR_IPIP ? outer_size(b) : 0;
	if (mode == MODE_DSR_GENEVE)
		v = verdict_of(send_geneve(ctx, pkt, id));
	else if (!find_hop(ctx, b, pkt->ip_len + outer, &hop))
		v = verdict(XDP_DROP, REASON_DROP_NO_NEXTHOP);
	else if (mode == MODE_DSR_IPIP)
		v = send_ipip(ctx, pkt, b, &hop);
	else
		v = send_l2(ctx, pkt, &hop);
	v.backend = id;
	return v;
}

/* None of the protocols with ports, or a fragment without them. */
static __always_inline struct verdict decide_other(struct xdp_md *ctx, struct packet *pkt,
						   enum reason why)
{
	__u64 found = look_related(ctx, pkt, why), word;
	struct nat_scratch *s;

	if (found == LOOK_NOTHING)
		return verdict(XDP_PASS, why);
	if (found != LOOK_FOUND)
		return verdict_of(found);
	s = own_scratch();
	step(pkt->quote ? STEP_QUOTE : STEP_FRAGMENT, s ? s->svc : 0, s ? s->backend : 0);
	word = pkt->quote && s ? translate_quote(ctx, pkt, s) : 0;
	if (!word && s && s->backend && s->mode == MODE_DSR_GENEVE)
		return send_other_geneve(ctx, pkt, s);
	return verdict_of(word ?: send_other(ctx, pkt));
}

static __always_inline struct verdict decide(struct xdp_md *ctx, void *from, void *to,
					     struct packet *pkt)
{
	struct verdict v, reply;
	__u64 shortcut = 0;
	enum reason why;
	__u32 svc_id;

	if (unlikely(!parse(ctx, from, to, pkt, &why)))
		return decide_other(ctx, pkt, why);
	step(STEP_PORT, is_served(&pkt->key), 0);
	if (unlikely(!is_served(&pkt->key)))
		return verdict(XDP_PASS, REASON_PASS_NOT_OURS);
	pkt->frontend = frontend_hash(&pkt->key, pkt->ipv6, dport_proto_scope(&pkt->key));
	pkt->hash = flow_hash(&pkt->key, pkt->ipv6, pkt->frontend);
	if (unlikely(is_port_of_nat(&pkt->key))) {
		enum replied found = nat_reply(ctx, pkt, &reply);

		if (found == REPLY_DECIDED)
			return reply;
		if (found == REPLY_CROSSES)
			return send_crossed(ctx, pkt, NULL);
	}
	svc_id = look_up_service(&pkt->key, pkt->ipv6, pkt->frontend, config.services_mask,
				 &shortcut);
	/* No entry of a loopback address has a shortcut. */
	if (!svc_id || (!shortcut && is_loopback(pkt->key.daddr, pkt->ipv6)))
		return verdict(XDP_PASS, REASON_PASS_NOT_OURS);
	v = balance(ctx, pkt, svc_id, shortcut);
	v.svc = svc_id;
	return v;
}

/* With the frame's VLAN tags off meanwhile. */
static __always_inline struct verdict handle(struct xdp_md *ctx, struct packet *pkt)
{
	void *from = at(ctx, 0), *to = end(ctx);
	struct verdict v;

	/* clang 14 would spill half of a packet pointer (as in take_sample()). */
	asm volatile("" : "+r"(from), "+r"(to));
	pkt->len = to - from;
	if (unlikely(is_tagged(from, to))) {
		if (!untag(ctx, pkt))
			return verdict(XDP_PASS, REASON_PASS_MALFORMED);
		from = at(ctx, 0);
		to = end(ctx);
		asm volatile("" : "+r"(from), "+r"(to));
	}
	v = decide(ctx, from, to, pkt);
	if (unlikely(pkt->first) && (sent_on(v.reason) || v.reason == REASON_PASS_TO_FRAGMENT))
		remember_first(pkt, v.svc, v.backend);
	return unlikely(pkt->tag[0]) ? retag(ctx, pkt, v) : v;
}

SEC("xdp")
int shunt_lb(struct xdp_md *ctx)
{
	struct packet pkt;
	struct verdict v;

	bpf_tail_call_static(ctx, &hooks, HOOK_ENTRY);
	pkt = (struct packet){}; /* not before the call, which would need all of it written */
	v = handle(ctx, &pkt);
	return leave(ctx, v, pkt.len);
}

/* With a user's hook loaded, a packet takes this way instead: bpf/hooks.h. */
SEC("xdp")
int shunt_hook_enter(struct xdp_md *ctx)
{
	struct hook_view *view = find_view();
	struct hook_state *state = find_state();

	if (view && state) {
		state->len = ctx->data_end - ctx->data;
		state->mark = 0;
		describe(ctx, view);
		bpf_tail_call_static(ctx, &hooks, HOOK_PRE_LB);
		bpf_tail_call_static(ctx, &hooks, HOOK_BALANCE);
	}
	return leave(ctx, verdict(XDP_DROP, REASON_DROP_BAD_TABLE), 0);
}

SEC("xdp")
int shunt_hook_bal(struct xdp_md *ctx)
{
	struct packet pkt = {};
	struct verdict v;

	if (!passes_pre_lb())
		return leave_by_hook(ctx);
	v = handle(ctx, &pkt);
	show_verdict(ctx, &v);
	bpf_tail_call_static(ctx, &hooks, HOOK_POST_LB);
	return leave_as_shown(ctx);
}

SEC("xdp")
int shunt_hook_exit(struct xdp_md *ctx)
{
	struct hook_view *view = find_view();
	struct hook_state *state = find_state();

	if (view && state && take_answer(view, state, HOOK_POSITION_POST)) {
		state->action = XDP_DROP;
		state->reason = REASON_DROP_HOOK;
	}
	return leave_as_shown(ctx);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
