/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * The backend's side of dsr-ipip, for hosts without the kernel's tunnel modules: strips the outer
 * header of 4in4, 6in6, 4in6 and 6in4 packets that are addressed to this host and come from an
 * accepted source, before GRO, so that the inner packets are merged as if they had come bare.
 * Everything else passes untouched.
 */
#include <stdbool.h>

#include "checksum.h"
#include "count.h"
#include "packet.h"

#define ECN_MASK  3
#define ECN_ECT_1 1
#define ECN_ECT_0 2
#define ECN_CE	  3

const volatile struct decap_config config = {};

PERCPU_MAP(decap_reasons, struct count, DECAP_COUNT);

/* See abi_types in maps.h. */
enum decap_reason decap_types SEC(".data.layout");

struct outer {
	__u32 len;   /* of the header */
	__u32 total; /* of the whole packet, as the header says */
	__u8 ecn;
	bool inner6;
};

static __always_inline bool accepted4(__be32 saddr)
{
	for (__u32 i = 0; i < DECAP_SOURCES && i < config.count4; i++) {
		__be32 mask = *(const volatile __be32 *)(config.source4[i].mask + 12);

		if ((saddr & mask) == *(const volatile __be32 *)(config.source4[i].addr + 12))
			return true;
	}
	return false;
}

static __always_inline bool accepted6(const struct in6_addr *saddr)
{
	for (__u32 i = 0; i < DECAP_SOURCES && i < config.count6; i++) {
		const volatile __be32 *addr = (const volatile __be32 *)config.source6[i].addr;
		const volatile __be32 *mask = (const volatile __be32 *)config.source6[i].mask;
		__be32 differs = 0;

		for (int word = 0; word < 4; word++)
			differs |= (saddr->in6_u.u6_addr32[word] & mask[word]) ^ addr[word];
		if (!differs)
			return true;
	}
	return false;
}

/* Whether the stack, left alone, would send this packet on: then it is another host's. An address
 * of our own is no destination to forward to, and where forwarding is off nothing is. */
static __always_inline bool is_forwarded(struct xdp_md *ctx, struct bpf_fib_lookup *fib)
{
	fib->ifindex = ctx->ingress_ifindex;
	switch (bpf_fib_lookup(ctx, fib, sizeof(*fib), 0)) {
	case BPF_FIB_LKUP_RET_SUCCESS:
	case BPF_FIB_LKUP_RET_NO_NEIGH:
	case BPF_FIB_LKUP_RET_FRAG_NEEDED:
	case BPF_FIB_LKUP_RET_UNSUPP_LWT:
		return true;
	default:
		return false;
	}
}

/* DECAP_UNWRAPPED if nothing speaks against it so far. */
static __always_inline enum decap_reason parse_outer4(struct xdp_md *ctx, struct outer *outer)
{
	struct bpf_fib_lookup fib = {.family = AF_INET};
	struct iphdr *ip = at(ctx, ETH_HLEN);

	if ((void *)(ip + 1) > end(ctx))
		return DECAP_PASS_MALFORMED;
	if (ip->protocol != IPPROTO_IPIP && ip->protocol != IPPROTO_IPV6)
		return DECAP_PASS_NOT_TUNNEL;
	if (!accepted4(ip->saddr))
		return DECAP_PASS_SOURCE;
	if (ip->frag_off & bpf_htons(IP_MF | IP_OFFSET))
		return DECAP_PASS_FRAGMENT;
	if (ip->version == 4 && ip->ihl > 5)
		return DECAP_PASS_OPTIONS;
	/* Nobody looks at this header after us: its checksum is ours to verify. */
	if (ip->version != 4 || ip->ihl != 5 || csum_fold(csum_add(0, ip, sizeof(*ip) / 4)))
		return DECAP_PASS_MALFORMED;
	outer->len = sizeof(*ip);
	outer->total = bpf_ntohs(ip->tot_len);
	outer->ecn = ip->tos & ECN_MASK;
	outer->inner6 = ip->protocol == IPPROTO_IPV6;
	fib.ipv4_src = ip->saddr;
	fib.ipv4_dst = ip->daddr;
	return is_forwarded(ctx, &fib) ? DECAP_PASS_NOT_OURS : DECAP_UNWRAPPED;
}

static __always_inline enum decap_reason parse_outer6(struct xdp_md *ctx, struct outer *outer)
{
	struct bpf_fib_lookup fib = {.family = AF_INET6};
	struct ipv6hdr *ip = at(ctx, ETH_HLEN);
	bool accepted;

	if ((void *)(ip + 1) > end(ctx))
		return DECAP_PASS_MALFORMED;
	accepted = accepted6(&ip->saddr);
	switch (ip->nexthdr) {
	case IPPROTO_IPIP:
	case IPPROTO_IPV6:
		if (!accepted)
			return DECAP_PASS_SOURCE;
		break;
	/* A tunnel may stand behind these; from an accepted source it most likely does. */
	case NEXTHDR_FRAGMENT:
		return accepted ? DECAP_PASS_FRAGMENT : DECAP_PASS_NOT_TUNNEL;
	case NEXTHDR_HOP:
	case NEXTHDR_ROUTING:
	case NEXTHDR_DEST:
		return accepted ? DECAP_PASS_OPTIONS : DECAP_PASS_NOT_TUNNEL;
	default:
		return DECAP_PASS_NOT_TUNNEL;
	}
	if (ip->version != 6)
		return DECAP_PASS_MALFORMED;
	outer->len = sizeof(*ip);
	outer->total = sizeof(*ip) + bpf_ntohs(ip->payload_len);
	outer->ecn = bpf_ntohl(*(__be32 *)ip) >> 20 & ECN_MASK;
	outer->inner6 = ip->nexthdr == IPPROTO_IPV6;
	__builtin_memcpy(fib.ipv6_src, &ip->saddr, 16);
	__builtin_memcpy(fib.ipv6_dst, &ip->daddr, 16);
	return is_forwarded(ctx, &fib) ? DECAP_PASS_NOT_OURS : DECAP_UNWRAPPED;
}

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
	struct iphdr *ip = at(ctx, ETH_HLEN + len);
	__be16 *first = (__be16 *)ip, old;
	int ecn;

	if ((void *)(ip + 1) > end(ctx) || ip->version != 4 || ip->ihl < 5 ||
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
	struct ipv6hdr *ip = at(ctx, ETH_HLEN + len);
	__be32 *first = (__be32 *)ip;
	__u32 word;
	int ecn;

	if ((void *)(ip + 1) > end(ctx) || ip->version != 6 ||
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
	room = outer.total - outer.len;
	why = outer.inner6 ? merge_inner6(ctx, outer.len, room, outer.ecn) :
			     merge_inner4(ctx, outer.len, room, outer.ecn);
	if (why != DECAP_UNWRAPPED)
		return why;
	return strip(ctx, outer.len, bpf_htons(outer.inner6 ? ETH_P_IPV6 : ETH_P_IP));
}

/* The one exit. */
SEC("xdp")
int shunt_decap(struct xdp_md *ctx)
{
	__u32 len = ctx->data_end - ctx->data;
	enum decap_reason reason = unwrap(ctx);

	count(&decap_reasons, reason, len);
	return reason == DECAP_DROP_CONGESTED ? XDP_DROP : XDP_PASS;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
