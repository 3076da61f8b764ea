/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Mode nat to and from a backend of the other family: the packet gets a header of that one
 * (RFC 7915). DSCP, ECN and the payload stay, and the TTL is one less.
 *
 *   left out  options, and extension headers
 *   dropped   fragments; what its sender has routed (4.1, 5.1); of IPv4, too: what is without DF and
 *             does not fit, as a program cannot make two frames of one
 *   made up   the checksum of a datagram that has none, which IPv6 does not allow
 *
 * In steps, as in bpf/other.h; the tuple that the packet gets and its backend (0: to a client, by
 * `back`) stand in the scratch memory.
 */
#ifndef SHUNT_NAT46_H
#define SHUNT_NAT46_H

#include "nat46_sum.h"
#include "nat_pair.h"
#include "send.h"

/* 5.1: an IPv4 packet from an IPv6 one of at most 1280 bytes may be fragmented on its way. */
#define IPV4_WITHOUT_DF_MAX 1260
#define HEADERS_DIFFER	    (sizeof(struct ipv6hdr) - sizeof(struct iphdr))

#define IPV4_OPTION_END		 0
#define IPV4_OPTION_NONE	 1
#define IPV4_OPTION_LOOSE_ROUTE	 131
#define IPV4_OPTION_STRICT_ROUTE 137

_Static_assert(sizeof(struct hop) <= sizeof(((struct nat_scratch *)0)->hop), "it has its place");

/* Of the header that the packet gets. */
static __always_inline __u32 crossed_header(const struct packet *pkt)
{
	return pkt->ipv6 ? sizeof(struct iphdr) : sizeof(struct ipv6hdr);
}

/* What a sender of the family that is not `ipv6` is to be told of an MTU in this one. */
static __always_inline __u32 crossed_mtu(bool ipv6, __u32 mtu)
{
	if (ipv6)
		return mtu - HEADERS_DIFFER;
	mtu += HEADERS_DIFFER;
	return mtu < IPV6_MTU_MIN ? IPV6_MTU_MIN : mtu;
}

/* The fields as one word each, since that is how a checksum sees them. */
static __always_inline void put_header4(struct iphdr *ip, const __u8 *from, const __u8 *to,
					__u32 tos, __u32 ttl, __u32 proto, __u32 payload)
{
	__u32 len = sizeof(*ip) + payload, *words = (__u32 *)ip;

	words[0] = bpf_htonl(0x45U << 24 | tos << 16 | len);
	/* As in wrap_for_stack(). */
	words[1] = len > IPV4_WITHOUT_DF_MAX ? bpf_htonl(IP_DF) :
					       bpf_get_prandom_u32() & bpf_htonl(0xffff0000);
	words[2] = bpf_htonl(ttl << 24 | proto << 16);
	words[3] = ipv4_of(from);
	words[4] = ipv4_of(to);
	ip->check = csum_fold(csum_add(0, words, sizeof(*ip) / 4));
}

static __always_inline void put_header6(struct ipv6hdr *ip, const __u8 *from, const __u8 *to,
					__u32 tos, __u32 ttl, __u32 proto, __u32 payload)
{
	__u32 *words = (__u32 *)ip;

	words[0] = bpf_htonl(6U << 28 | tos << 20);
	words[1] = bpf_htonl(payload << 16 | proto << 8 | ttl);
	__builtin_memcpy(&ip->saddr, from, 16);
	__builtin_memcpy(&ip->daddr, to, 16);
	barrier(); /* or clang 14 loads both headers of an error first, for which there is no stack */
}

static __always_inline __u32 ttl_of(struct xdp_md *ctx, bool ipv6)
{
	if (ipv6) {
		struct ipv6hdr *ip = at(ctx, ETH_HLEN);

		return (void *)(ip + 1) <= end(ctx) ? ip->hop_limit : 0;
	} else {
		struct iphdr *ip = at(ctx, ETH_HLEN);

		return (void *)(ip + 1) <= end(ctx) ? ip->ttl : 0;
	}
}

/* Whether IPv4 options name hops that the packet has not seen yet, or cannot be read. */
__noinline int is_routed4(struct xdp_md *ctx, const struct packet *pkt)
{
	struct nat_scratch *s = own_scratch();
	__u32 size, at = 0;

	if (!pkt || !s)
		return 1;
	size = pkt->l4 - ETH_HLEN - sizeof(struct iphdr);
	if (!size)
		return 0;
	/* Options are whole words. Between the comparisons a barrier, as in take_sample(). */
	barrier_var(size);
	if (size < 4)
		return 1;
	barrier_var(size);
	if (size > 40 || bpf_xdp_load_bytes(ctx, ETH_HLEN + sizeof(struct iphdr), s->bytes, size))
		return 1;
	for (int i = 0; i < 40; i++) {
		const __u8 *option;

		if (at >= size)
			return 0;
		/* Smaller than that already, which 6.1 does not see: it would try every sum. */
		barrier_var(at);
		at &= 63;
		option = &s->bytes[at];
		if (option[0] == IPV4_OPTION_END)
			return 0;
		if (option[0] == IPV4_OPTION_NONE) {
			at++;
			continue;
		}
		if (option[1] < 2)
			return 1;
		if (option[0] == IPV4_OPTION_LOOSE_ROUTE || option[0] == IPV4_OPTION_STRICT_ROUTE)
			return option[2] <= option[1];
		at += option[1];
	}
	return 0;
}

/* The largest packet that an interface sends. */
static __always_inline __u32 mtu_of(struct xdp_md *ctx, __u32 ifindex)
{
	__u32 mtu = 0;

	return bpf_check_mtu(ctx, ifindex, &mtu, 0, 0) < 0 || mtu > 0xffff ? 0xffff : mtu;
}

/* Whether the packet can go where it is to go, as it will be then. 0, or a verdict's word. */
__noinline __u64 cross_fits(struct xdp_md *ctx, const struct packet *pkt)
{
	struct nat_scratch *s = own_scratch();
	struct backend_val *b;
	struct hop *hop;
	__u32 len;

	if (!pkt || !s)
		return word_of(verdict(XDP_DROP, REASON_DROP_BAD_TABLE));
	hop = (struct hop *)s->hop;
	if (pkt->first)
		return word_of(verdict(XDP_DROP, REASON_DROP_NAT46_FRAGMENT));
	len = payload_of(pkt) + crossed_header(pkt);
	b = bpf_map_lookup_elem(&backends, &s->backend);
	if (s->backend) {
		if (!b || !find_hop(ctx, b, len, hop))
			return word_of(verdict(XDP_DROP, REASON_DROP_NO_NEXTHOP));
	} else {
		*hop = hop_back(&s->back);
		/* A reply grows beyond what its client has sent by this way. */
		hop->mtu = mtu_of(ctx, hop->ifindex);
		step_hop(hop);
	}
	if (len > hop->mtu)
		return word_of(too_big(ctx, pkt, crossed_mtu(!pkt->ipv6, hop->mtu)));
	return 0;
}

/* The packet with a header of the other family, and out with it. A verdict's word. */
__noinline __u64 cross(struct xdp_md *ctx, struct packet *pkt)
{
	const __u64 broken = word_of(verdict(XDP_DROP, REASON_DROP_BAD_TABLE));
	struct nat_scratch *s = own_scratch();
	__u32 payload, ttl, proto;
	struct verdict v;
	struct udphdr *udp;
	struct ethhdr *eth;

	if (!pkt || !s)
		return broken;
	ttl = ttl_of(ctx, pkt->ipv6);
	if (ttl <= 1)
		return word_of(verdict(XDP_DROP, REASON_DROP_TTL_EXPIRED));
	if (pkt->ipv6 ? pkt->routed : is_routed4(ctx, pkt))
		return word_of(verdict(XDP_DROP, REASON_DROP_NAT46_NO_EQUAL));
	payload = payload_of(pkt);
	proto = pkt->key.proto;
	if (!write_ports(ctx, pkt, &s->to, address_change(pkt, &s->to)))
		return broken;
	if (!pkt->ipv6 && proto == IPPROTO_UDP) {
		udp = transport(ctx, pkt);
		if (!udp || (void *)(udp + 1) > end(ctx))
			return broken;
		if (!udp->check && !fill_checksum(ctx, pkt))
			return word_of(verdict(XDP_DROP, REASON_DROP_NAT46_NO_EQUAL));
	}
	if (bpf_xdp_adjust_head(ctx, (int)pkt->l4 - (int)(ETH_HLEN + crossed_header(pkt))))
		return word_of(verdict(XDP_DROP, REASON_DROP_NO_HEADROOM));
	eth = at(ctx, 0);
	if (pkt->ipv6) {
		struct iphdr *ip = (void *)(eth + 1);

		if ((void *)(ip + 1) > end(ctx))
			return broken;
		eth->h_proto = bpf_htons(ETH_P_IP);
		put_header4(ip, s->to.saddr, s->to.daddr, pkt->tos, ttl - 1, proto, payload);
	} else {
		struct ipv6hdr *ip = (void *)(eth + 1);

		if ((void *)(ip + 1) > end(ctx))
			return broken;
		eth->h_proto = bpf_htons(ETH_P_IPV6);
		put_header6(ip, s->to.saddr, s->to.daddr, pkt->tos, ttl - 1, proto, payload);
	}
	write_macs(eth, (struct hop *)s->hop);
	v = send(ctx, pkt, (struct hop *)s->hop);
	if (v.reason == REASON_SENT_TO_BACKEND && !s->backend)
		v.reason = REASON_SENT_TO_CLIENT;
	return word_of(v);
}

/* `t`: to a backend; without it to a client, as look_back() has left it. */
static __always_inline struct verdict send_crossed(struct xdp_md *ctx, struct packet *pkt,
						   const struct translation *t)
{
	struct nat_scratch *s = own_scratch();
	__u64 word;

	if (!s)
		return verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
	if (t)
		s->to = t->to;
	s->backend = t ? t->backend : 0;
	word = cross_fits(ctx, pkt);
	return verdict_of(word ?: cross(ctx, pkt));
}

#endif
