/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The load balancer. For a direct-server-return service in steady state a packet costs: parse,
 * one hash look-up (services), one flow hash, array reads (svc, slots, backends, nexthops),
 * encapsulate, transmit. No flow table, no clock, no FIB.
 */
#include "hooks.h"
#include "nat.h"
#include "options.h"

static __always_inline bool is_served(const struct packet *pkt)
{
	__u32 port = bpf_ntohs(pkt->key.dport);
	__u32 index = (pkt->key.proto == IPPROTO_UDP) << 10 | port >> 6;
	struct ports_val *p = bpf_map_lookup_elem(&ports, &index);

	return p && p->bits >> (port & 63) & 1;
}

/* The service of the frontend with this port, protocol and scope; 0 = none. */
static __always_inline __u32 find_frontend(const struct packet *pkt, __u32 tail, __u32 hash)
{
	const __u64 *vip = (const __u64 *)pkt->key.daddr;
	__u32 reach = 0;

	for (__u32 n = 0; n <= SVC_REACH_MAX; n++) {
		__u32 index = (hash + n) & config.services_mask;
		struct svc_line *line = bpf_map_lookup_elem(&services, &index);

		if (!line)
			return 0;
		if (!n)
			reach = READ_ONCE(line->entry[0].reach);
		for (int i = 0; i < SVC_LINE_ENTRIES; i++) {
			const __u64 *words = (const __u64 *)&line->entry[i];
			/* Key and service in one load, as they are written. Little-endian. */
			__u64 last = READ_ONCE(words[2]);

			if ((__u32)last == tail && words[0] == vip[0] && words[1] == vip[1])
				return last >> 32;
		}
		if (n >= reach)
			break;
	}
	return 0;
}

/* Of a frontend that has every port of its VIP. */
static __noinline __u32 find_any_port(const struct packet *pkt)
{
	__u32 zero = 0, tail = dport_proto_scope(&pkt->key) & ~0xffffU; /* little-endian */
	struct meta_val *m = bpf_map_lookup_elem(&meta, &zero);

	if (!m || !(m->any_port & (pkt->key.proto == IPPROTO_UDP ? ANY_PORT_UDP : ANY_PORT_TCP)))
		return 0;
	return find_frontend(pkt, tail, frontend_hash(&pkt->key, pkt->ipv6, tail));
}

static __always_inline __u32 find_service(const struct packet *pkt)
{
	__u32 svc = find_frontend(pkt, dport_proto_scope(&pkt->key), pkt->frontend);

	return svc ?: find_any_port(pkt);
}

/* Where the packet falls; false if the tables contradict each other. */
static __always_inline bool find_place(const struct packet *pkt, const struct svc_val *service,
				       struct place *p)
{
	__u64 region = READ_ONCE(service->region);
	__u32 log2 = region & ((1 << REGION_LOG2_BITS) - 1);
	struct slot_val *s;
	__u64 word;

	p->slot = (__u32)(region >> REGION_LOG2_BITS) + (__u32)((__u64)pkt->hash << log2 >> 32);
	s = bpf_map_lookup_elem(&slots, &p->slot);
	if (!s)
		return false;
	word = READ_ONCE(s->word);
	p->cur = word & SLOT_BACKEND_MASK;
	p->prev = word >> SLOT_BACKEND_BITS & SLOT_BACKEND_MASK;
	p->state = word >> SLOT_STATE_SHIFT;
	p->idle_ns = service->idle_ns;
	p->flags = service->flags;
	return true;
}

static __always_inline struct verdict balance(struct xdp_md *ctx, struct packet *pkt, __u32 svc_id)
{
	struct svc_val *service = bpf_map_lookup_elem(&svc, &svc_id);
	struct place p = {.svc = svc_id};
	struct backend_val *b;
	struct verdict v;
	enum reason why;
	struct hop hop;
	__u32 id, outer;

	if (!service || service->mode == MODE_NONE)
		return verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
	if (service->flags && !apply_options(pkt, svc_id, service->flags, &why))
		return verdict(XDP_DROP, why);
	if (!find_place(pkt, service, &p))
		return verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
	if (service->mode == MODE_NAT)
		return nat_forward(ctx, pkt, &p);
	id = p.state == SLOT_SETTLED && !(p.flags & SVC_AFFINITY) ? p.cur : track(pkt, &p);
	if (!id)
		return refuse(ctx, pkt);
	b = bpf_map_lookup_elem(&backends, &id);
	if (!b || !(b->flags & BACKEND_KNOWN))
		return verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
	outer = service->mode == MODE_DSR_IPIP ? outer_size(b) : 0;
	if (!find_hop(ctx, b, pkt->ip_len + outer, &hop))
		v = verdict(XDP_DROP, REASON_DROP_NO_NEXTHOP);
	else if (service->mode == MODE_DSR_IPIP)
		v = send_ipip(ctx, pkt, b, &hop);
	else
		v = send_l2(ctx, pkt, &hop);
	v.backend = id;
	return v;
}

static __always_inline struct verdict decide(struct xdp_md *ctx)
{
	struct packet pkt = {};
	struct verdict v;
	enum reason why;
	__u32 svc_id;

	if (!parse(ctx, &pkt, &why))
		return verdict(XDP_PASS, why);
	if (!is_served(&pkt))
		return verdict(XDP_PASS, REASON_PASS_NOT_OURS);
	pkt.frontend = frontend_hash(&pkt.key, pkt.ipv6, dport_proto_scope(&pkt.key));
	pkt.hash = flow_hash(&pkt.key, pkt.ipv6, pkt.frontend);
	if ((__u16)(bpf_ntohs(pkt.key.dport) - config.nat_port_min) < config.nat_port_count &&
	    nat_reply(ctx, &pkt, &v))
		return v;
	svc_id = find_service(&pkt);
	if (!svc_id)
		return verdict(XDP_PASS, REASON_PASS_NOT_OURS);
	v = balance(ctx, &pkt, svc_id);
	v.svc = svc_id;
	return v;
}

SEC("xdp")
int shunt_lb(struct xdp_md *ctx)
{
	__u32 len = ctx->data_end - ctx->data;

	bpf_tail_call_static(ctx, &hooks, HOOK_ENTRY);
	return leave(ctx, decide(ctx), len);
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
	struct verdict v;

	if (!passes_pre_lb())
		return leave_by_hook(ctx);
	v = decide(ctx);
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
