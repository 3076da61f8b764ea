/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A packet's tuple, exchanged for another. */
#ifndef SHUNT_REWRITE_H
#define SHUNT_REWRITE_H

#include "checksum.h"
#include "parse.h"

static __always_inline __u64 address_change(const struct packet *pkt, const struct flow_key *to)
{
	return csum_add(csum_sub(0, &pkt->key, 8), to, 8);
}

/* The addresses alone; `change` is what their sum changes by. */
static __always_inline bool write_addresses(struct CONTEXT *ctx, const struct packet *pkt,
					    const struct flow_key *to, __u64 change)
{
	if (pkt->ipv6) {
		struct ipv6hdr *ip = at(ctx, ETH_HLEN);

		if ((void *)(ip + 1) > end(ctx))
			return false;
		__builtin_memcpy(&ip->saddr, to->saddr, 16);
		__builtin_memcpy(&ip->daddr, to->daddr, 16);
	} else {
		struct iphdr *ip = at(ctx, ETH_HLEN);

		if ((void *)(ip + 1) > end(ctx))
			return false;
		ip->saddr = ipv4_of(to->saddr);
		ip->daddr = ipv4_of(to->daddr);
		/* The mapped prefixes cancel out. */
		ip->check = csum_fold((__u64)(__u16)~ip->check + change);
	}
	return true;
}

/* The ports, and the checksum; `addresses` is what their sum changes by. */
static __always_inline bool write_ports(struct CONTEXT *ctx, const struct packet *pkt,
					const struct flow_key *to, __u64 addresses)
{
	__u64 all =
		addresses + (__u16)~pkt->key.sport + (__u16)~pkt->key.dport + to->sport + to->dport;
	void *header = transport(ctx, pkt);
	__u16 *check;

	if (!header)
		return false;
	if (pkt->key.proto == IPPROTO_TCP) {
		struct tcphdr *tcp = header;

		if ((void *)(tcp + 1) > end(ctx))
			return false;
		tcp->source = to->sport;
		tcp->dest = to->dport;
		check = &tcp->check;
	} else {
		struct udphdr *udp = header;

		if ((void *)(udp + 1) > end(ctx))
			return false;
		udp->source = to->sport;
		udp->dest = to->dport;
		if (!udp->check)
			return true; /* the sender computed none (RFC 768, RFC 6935) */
		check = &udp->check;
	}
	*check = csum_fold((__u64)(__u16) ~*check + all);
	if (!*check && pkt->key.proto == IPPROTO_UDP)
		*check = 0xffff;
	return true;
}

/* From the tuple in the packet to another of its family, checksums included. */
static __always_inline bool rewrite(struct CONTEXT *ctx, const struct packet *pkt,
				    const struct flow_key *to)
{
	__u64 addresses = address_change(pkt, to);

	return write_addresses(ctx, pkt, to, addresses) && write_ports(ctx, pkt, to, addresses);
}

/* One hop on, as a router: also what ends a loop between two balancers. */
static __always_inline bool decrement_ttl(struct CONTEXT *ctx, bool ipv6)
{
	if (ipv6) {
		struct ipv6hdr *ip = at(ctx, ETH_HLEN);

		if ((void *)(ip + 1) > end(ctx) || ip->hop_limit <= 1)
			return false;
		ip->hop_limit--;
	} else {
		struct iphdr *ip = at(ctx, ETH_HLEN);

		if ((void *)(ip + 1) > end(ctx) || ip->ttl <= 1)
			return false;
		ip->ttl--;
		ip->check = csum_fold((__u64)(__u16)~ip->check + (__u16)~bpf_htons(0x0100));
	}
	return true;
}

#endif
