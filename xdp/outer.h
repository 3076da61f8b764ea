/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The outer headers that decap takes off: whose they are, and what is behind them. */
#ifndef SHUNT_OUTER_H
#define SHUNT_OUTER_H

#include "checksum.h"
#include "geneve.h"
#include "way_back.h"

/* What a client has sent its packet to. */
struct frontend {
	__u8 vip[16];
	__be16 port;
	__u16 outer_bytes;
	__u32 pad;
} __attribute__((aligned(8)));

#define ECN_MASK 3

/* Where the longest outer headers end. */
#define OUTER_END_MAX (ETH_HLEN + sizeof(struct ipv6hdr) + sizeof(struct geneve_headers))

struct outer {
	__u32 len;   /* of the headers */
	__u32 total; /* of the whole packet, as the header says */
	__u8 ecn;
	bool inner6;
	bool geneve;
	struct frontend frontend;
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

/* Addresses of this host's were named. */
static __always_inline bool opens_geneve(void)
{
	return config.own4 || config.own6;
}

/* `header` is the outer IP header's length. */
static __always_inline bool is_geneve(struct xdp_md *ctx, __u32 header)
{
	struct udphdr *udp = at(ctx, ETH_HLEN + header);

	return opens_geneve() && (void *)(udp + 1) <= end(ctx) &&
	       udp->dest == bpf_htons(GENEVE_PORT);
}

/* DECAP_UNWRAPPED if nothing speaks against it so far. */
static __always_inline enum decap_reason parse_outer4(struct xdp_md *ctx, struct outer *outer)
{
	struct bpf_fib_lookup fib = {.family = AF_INET};
	struct iphdr *ip = at(ctx, ETH_HLEN);

	if ((void *)(ip + 1) > end(ctx))
		return DECAP_PASS_MALFORMED;
	if (ip->protocol == IPPROTO_UDP) {
		bool odd = ip->frag_off & bpf_htons(IP_MF | IP_OFFSET) || ip->ihl > 5;

		/* Where its ports are cannot be told: a tunnel's, if from an accepted source. */
		if (odd ? !opens_geneve() || !accepted4(ip->saddr) : !is_geneve(ctx, sizeof(*ip)))
			return DECAP_PASS_NOT_TUNNEL;
		outer->geneve = true;
	} else if (ip->protocol != IPPROTO_IPIP && ip->protocol != IPPROTO_IPV6) {
		return DECAP_PASS_NOT_TUNNEL;
	}
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
	case IPPROTO_UDP:
		if (!is_geneve(ctx, sizeof(*ip)))
			return DECAP_PASS_NOT_TUNNEL;
		outer->geneve = true;
		if (!accepted)
			return DECAP_PASS_SOURCE;
		break;
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

/* The headers between: as the balancer writes them (bpf/geneve.h), and in no other way. */
static __always_inline enum decap_reason parse_geneve(struct xdp_md *ctx, struct outer *outer)
{
	struct geneve_headers *g = at_most(ctx, ETH_HLEN + outer->len, OUTER_END_MAX);

	if (!g || (void *)(g + 1) > end(ctx) || outer->total < outer->len + sizeof(*g) ||
	    bpf_ntohs(g->udp.len) != outer->total - outer->len)
		return DECAP_PASS_MALFORMED;
	if (g->udp.check || g->words != GENEVE_WORDS || g->flags != GENEVE_CRITICAL ||
	    (g->proto != bpf_htons(ETH_P_IP) && g->proto != bpf_htons(ETH_P_IPV6)) ||
	    g->frontend.opt_class != bpf_htons(GENEVE_CLASS) ||
	    g->frontend.type != GENEVE_TYPE_FRONTEND || g->frontend.words != GENEVE_OPTION_WORDS)
		return DECAP_PASS_GENEVE;
	outer->len += sizeof(*g);
	outer->inner6 = g->proto == bpf_htons(ETH_P_IPV6);
	__builtin_memcpy(outer->frontend.vip, g->frontend.vip, 16);
	outer->frontend.port = g->frontend.port;
	outer->frontend.outer_bytes = outer->len;
	return DECAP_UNWRAPPED;
}

#endif
