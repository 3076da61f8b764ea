/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The backend's side of dsr-ipip, for hosts without the kernel's tunnel modules, and of dsr-geneve:
 * strips the outer headers of 4in4, 6in6, 4in6 and 6in4 packets that are addressed to this host and
 * come from an accepted source, before GRO, so that the inner packets are merged as if they had come
 * bare. What comes through Geneve is remembered for its answers (xdp/answer.bpf.c). Everything else
 * passes untouched.
 */
#include "outer.h"
#include "receive.h"

#define ECN_ECT_1 1
#define ECN_ECT_0 2
#define ECN_CE	  3

/* The inner's ECN field after the outer's is merged in (RFC 6040, figure 4); -1: drop. */
static __always_inline int merged_ecn(__u8 outer, __u8 inner)
{
	if (outer == ECN_CE)
		return inner ? ECN_CE : -1;
	if (outer == ECN_ECT_1 && inner == ECN_ECT_0)
		return ECN_ECT_1;
	return inner;
}

static __always_inline enum decap_reason merge_inner4(struct xdp_md *ctx, __u32 len, __u32 room,
						      __u8 outer_ecn)
{
	struct iphdr *ip = at_most(ctx, ETH_HLEN + len, OUTER_END_MAX);
	__be16 *first = (__be16 *)ip, old;
	int ecn;

	if (!ip || (void *)(ip + 1) > end(ctx) || ip->version != 4 || ip->ihl < 5 ||
	    bpf_ntohs(ip->tot_len) < ip->ihl * 4 || bpf_ntohs(ip->tot_len) > room)
		return DECAP_PASS_INNER;
	ecn = merged_ecn(outer_ecn, ip->tos & ECN_MASK);
	if (ecn < 0)
		return DECAP_DROP_CONGESTED;
	if (ecn != (ip->tos & ECN_MASK)) {
		old = *first;
		ip->tos = (ip->tos & ~ECN_MASK) | ecn;
		ip->check = csum_fold((__u64)(__u16)~ip->check + (__u16)~old + *first);
	}
	return DECAP_UNWRAPPED;
}

static __always_inline enum decap_reason merge_inner6(struct xdp_md *ctx, __u32 len, __u32 room,
						      __u8 outer_ecn)
{
	struct ipv6hdr *ip = at_most(ctx, ETH_HLEN + len, OUTER_END_MAX);
	__be32 *first = (__be32 *)ip;
	__u32 word;
	int ecn;

	if (!ip || (void *)(ip + 1) > end(ctx) || ip->version != 6 ||
	    sizeof(*ip) + bpf_ntohs(ip->payload_len) > room)
		return DECAP_PASS_INNER;
	word = bpf_ntohl(*first);
	ecn = merged_ecn(outer_ecn, word >> 20 & ECN_MASK);
	if (ecn < 0)
		return DECAP_DROP_CONGESTED;
	*first = bpf_htonl((word & ~(ECN_MASK << 20)) | (__u32)ecn << 20);
	return DECAP_UNWRAPPED;
}

static __always_inline enum decap_reason strip(struct xdp_md *ctx, __u32 len, __be16 proto)
{
	__u8 macs[2 * ETH_ALEN];
	struct ethhdr *eth = at(ctx, 0);

	if ((void *)(eth + 1) > end(ctx))
		return DECAP_PASS_MALFORMED;
	__builtin_memcpy(macs, eth, sizeof(macs));
	if (bpf_xdp_adjust_head(ctx, (int)len))
		return DECAP_PASS_MALFORMED;
	eth = at(ctx, 0);
	if ((void *)(eth + 1) > end(ctx))
		return DECAP_PASS_MALFORMED;
	__builtin_memcpy(eth, macs, sizeof(macs));
	eth->h_proto = proto;
	return DECAP_UNWRAPPED;
}

static __always_inline enum decap_reason unwrap(struct xdp_md *ctx)
{
	struct ethhdr *eth = at(ctx, 0);
	struct outer outer = {};
	enum decap_reason why;
	__u32 room;

	if ((void *)(eth + 1) > end(ctx))
		return DECAP_PASS_NOT_TUNNEL;
	if (eth->h_proto == bpf_htons(ETH_P_IP))
		why = parse_outer4(ctx, &outer);
	else if (eth->h_proto == bpf_htons(ETH_P_IPV6))
		why = parse_outer6(ctx, &outer);
	else
		return DECAP_PASS_NOT_TUNNEL;
	if (why != DECAP_UNWRAPPED)
		return why;
	if (outer.total < outer.len || ETH_HLEN + outer.total > (__u32)(ctx->data_end - ctx->data))
		return DECAP_PASS_MALFORMED;
	if (outer.geneve) {
		why = parse_geneve(ctx, &outer);
		if (why != DECAP_UNWRAPPED)
			return why;
	}
	room = outer.total - outer.len;
	why = outer.inner6 ? merge_inner6(ctx, outer.len, room, outer.ecn) :
			     merge_inner4(ctx, outer.len, room, outer.ecn);
	if (why == DECAP_UNWRAPPED)
		why = strip(ctx, outer.len, bpf_htons(outer.inner6 ? ETH_P_IPV6 : ETH_P_IP));
	if (why != DECAP_UNWRAPPED)
		return why;
	if (outer.geneve)
		return receive(ctx, &outer.frontend);
	note_tunneled(ctx, outer.len);
	return DECAP_UNWRAPPED;
}

static __always_inline bool is_dropped(enum decap_reason reason)
{
	switch (reason) {
	case DECAP_DROP_CONGESTED:
	case DECAP_DROP_ADDRESS:
	case DECAP_DROP_PROTOCOL:
	case DECAP_DROP_CLASH:
	case DECAP_DROP_FULL:
		return true;
	default:
		return false;
	}
}

/* The one exit. */
SEC("xdp")
int shunt_decap(struct xdp_md *ctx)
{
	__u32 len = ctx->data_end - ctx->data;
	enum decap_reason reason = unwrap(ctx);

	if (reason == DECAP_PASS_NOT_TUNNEL && clashes(ctx))
		reason = DECAP_DROP_CLASH;
	count(&decap_reasons, reason, len);
	return is_dropped(reason) ? XDP_DROP : XDP_PASS;
}

/* For who wants to know how many flows there are: run by them, and attached nowhere. */
SEC("xdp")
int shunt_sweep(struct xdp_md *ctx)
{
	struct sweeping all = {.now = bpf_ktime_get_ns(),
			       .left = ~READ_ONCE(sweep_enough)}; /* more than there are */

	(void)ctx;
	end_ways(&all);
	return XDP_PASS;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
