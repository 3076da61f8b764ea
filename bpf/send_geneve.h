/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Mode dsr-geneve: addressed to the backend itself, with the VIP in an option beside it. */
#ifndef SHUNT_SEND_GENEVE_H
#define SHUNT_SEND_GENEVE_H

#include "geneve.h"
#include "icmp.h"
#include "send.h"

/* As the backend gets it. Of the other family it has an address that only its own host knows, which
 * puts that one in the VIP's place. */
static __always_inline void geneve_tuple(const struct packet *pkt, const struct backend_val *b,
					 struct flow_key *to)
{
	*to = pkt->key;
	if (pkt->ipv6 == !!(b->flags & BACKEND_IPV6))
		__builtin_memcpy(to->daddr, b->addr, 16);
	to->dport = b->port ?: pkt->key.dport;
}

/* An error's is written before: translate_quote(). */
static __noinline bool readdress(struct xdp_md *ctx, const struct packet *pkt,
				 const struct flow_key *to)
{
	if (pkt->quote)
		return true;
	if (pkt->rest)
		return write_addresses(ctx, pkt, to, address_change(pkt, to));
	return rewrite(ctx, pkt, to);
}

static __always_inline void write_geneve(struct geneve_headers *g, const struct packet *pkt)
{
	__u64 *vip = (__u64 *)pkt->key.daddr;

	g->udp.source = bpf_htons(GENEVE_SPORT_MIN | (pkt->hash & GENEVE_SPORT_MASK));
	g->udp.dest = bpf_htons(GENEVE_PORT);
	g->udp.len = bpf_htons(sizeof(*g) + pkt->ip_len);
	g->udp.check = 0; /* the inner packet has one; for IPv6: RFC 6935, 6936 */
	g->words = GENEVE_WORDS;
	g->flags = GENEVE_CRITICAL;
	g->proto = bpf_htons(pkt->ipv6 ? ETH_P_IPV6 : ETH_P_IP);
	g->vni = 0;
	g->frontend.opt_class = bpf_htons(GENEVE_CLASS);
	g->frontend.type = GENEVE_TYPE_FRONTEND;
	g->frontend.words = GENEVE_OPTION_WORDS;
	__builtin_memcpy(g->frontend.vip, vip, 16);
	g->frontend.port = pkt->key.dport;
	g->frontend.pad = 0;
}

/* 0, or a verdict's word. */
static __noinline __u64 wrap_geneve(struct xdp_md *ctx, const struct packet *pkt,
				    const struct backend_val *b)
{
	const __u32 inner = sizeof(struct geneve_headers);
	bool outer6 = b->flags & BACKEND_IPV6;
	struct ethhdr *eth;

	if (bpf_xdp_adjust_head(ctx, -(int)(outer_size(b) + inner)))
		return word_of(verdict(XDP_DROP, REASON_DROP_NO_HEADROOM));
	eth = at(ctx, 0);
	if (outer6) {
		struct ipv6hdr *ip = (void *)(eth + 1);

		if ((void *)(ip + 1) + inner > end(ctx))
			return word_of(verdict(XDP_DROP, REASON_DROP_BAD_TABLE));
		write_outer6(ip, pkt, b, IPPROTO_UDP, inner);
		write_geneve((void *)(ip + 1), pkt);
		eth->h_proto = bpf_htons(ETH_P_IPV6);
	} else {
		struct iphdr *ip = (void *)(eth + 1);

		if ((void *)(ip + 1) + inner > end(ctx))
			return word_of(verdict(XDP_DROP, REASON_DROP_BAD_TABLE));
		write_outer4(ip, pkt, b, IPPROTO_UDP, inner);
		write_geneve((void *)(ip + 1), pkt);
		eth->h_proto = bpf_htons(ETH_P_IP);
	}
	return 0;
}

/* Nobody on the way can make this packet fit: the backend's node opens whole ones alone. So its
 * sender is told, also one that has not set DF; it is the first fragment that names the flow. */
static __always_inline struct verdict tell_too_big(struct xdp_md *ctx, const struct packet *pkt,
						   __u32 mtu)
{
	if (!pkt->quote && !pkt->rest && spend(BUDGET_ANSWERS)) {
		if (pkt->ipv6 ? answer_icmp6(ctx, pkt, ICMPV6_TOO_BIG, 0, mtu) :
				answer_icmp4(ctx, pkt, ICMP_TOO_BIG, mtu))
			return verdict(XDP_TX, REASON_SENT_TOO_BIG);
	}
	return verdict(XDP_DROP, REASON_DROP_TOO_BIG);
}

/* Returns a verdict's word. Not static: verified once. */
__noinline __u64 send_geneve(struct xdp_md *ctx, const struct packet *pkt, __u32 id)
{
	struct backend_val *b = bpf_map_lookup_elem(&backends, &id);
	struct nat_scratch *s = own_scratch();
	struct hop *hop;
	void *frame;
	__u32 outer;
	__u64 word;

	if (!pkt || !s || !b || !(b->flags & BACKEND_KNOWN))
		return word_of(verdict(XDP_DROP, REASON_DROP_BAD_TABLE));
	hop = (struct hop *)s->hop; /* there is no stack for it */
	outer = outer_size(b) + sizeof(struct geneve_headers);
	if (!find_hop(ctx, b, pkt->ip_len + outer, hop))
		return word_of(verdict(XDP_DROP, REASON_DROP_NO_NEXTHOP));
	if (pkt->ip_len + outer > hop->mtu)
		return word_of(tell_too_big(ctx, pkt, hop->mtu - outer));
	geneve_tuple(pkt, b, &s->to);
	if (!readdress(ctx, pkt, &s->to))
		return word_of(verdict(XDP_DROP, REASON_DROP_BAD_TABLE));
	word = wrap_geneve(ctx, pkt, b);
	if (word)
		return word;
	frame = at(ctx, 0);
	if (frame + ETH_HLEN > end(ctx))
		return word_of(verdict(XDP_DROP, REASON_DROP_BAD_TABLE));
	write_macs(frame, hop);
	return word_of(send(ctx, pkt, hop));
}

#endif
