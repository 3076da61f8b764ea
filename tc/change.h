/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A packet's tuple exchanged for another, where the checksum may still be the device's to fill in. */
#ifndef SHUNT_CHANGE_H
#define SHUNT_CHANGE_H

#include <linux/pkt_cls.h>

#include "related.h"
#include "rewrite.h"

/* Headers are read directly; what of them is not in the frame's first piece is put there. */
#define HEADER_BYTES 128

/* TCP's data is not looked at, and often lies apart: to have it beside the headers would copy all of
 * them. */
static __always_inline void pull_headers(struct __sk_buff *ctx)
{
	struct iphdr *ip = at(ctx, ETH_HLEN);
	struct ipv6hdr *ip6 = (void *)ip;
	__u32 bytes = HEADER_BYTES;

	if ((void *)(ip6 + 1) <= end(ctx)) {
		if (ctx->protocol == bpf_htons(ETH_P_IP) && ip->ihl == 5 &&
		    ip->protocol == IPPROTO_TCP)
			bytes = ETH_HLEN + sizeof(*ip) + sizeof(struct tcphdr);
		else if (ctx->protocol == bpf_htons(ETH_P_IPV6) && ip6->nexthdr == IPPROTO_TCP)
			bytes = ETH_HLEN + sizeof(*ip6) + sizeof(struct tcphdr);
	}
	pull(ctx, bytes);
}

/* As in mode local, to backends that have their service's ports. */
static __always_inline bool same_ports(const struct packet *pkt, const struct flow_key *to)
{
	return pkt->key.sport == to->sport && pkt->key.dport == to->dport;
}

static __noinline bool change_checksum(struct __sk_buff *ctx, const struct packet *pkt,
				       const struct flow_key *to, __u64 addresses)
{
	__u64 ports =
		(__u64)(__u16)~pkt->key.sport + (__u16)~pkt->key.dport + to->sport + to->dport;
	bool udp = pkt->key.proto == IPPROTO_UDP;
	__u32 offset =
		pkt->l4 + (udp				 ? offsetof(struct udphdr, check) :
			   pkt->key.proto == IPPROTO_TCP ? offsetof(struct tcphdr, check) :
							   offsetof(struct icmp_error, checksum));
	__u64 mangled = udp ? BPF_F_MARK_MANGLED_0 : 0;

	addresses = fold32(addresses);
	/* ICMP's has no pseudo-header, but for IPv6. */
	if ((pkt->key.proto != IPPROTO_ICMP &&
	     bpf_l4_csum_replace(ctx, offset, 0, addresses, BPF_F_PSEUDO_HDR | mangled)) ||
	    (!same_ports(pkt, to) && bpf_l4_csum_replace(ctx, offset, 0, ports, mangled)))
		return false;
	/* Where the device has summed up the whole packet: of IPv4 that sum changes, since the header
	 * has a checksum of its own; of IPv6 it doesn't, and the function thinks it does. */
	if (pkt->ipv6)
		bpf_csum_update(ctx, addresses);
	return true;
}

/* A later fragment has nothing but addresses, and of SCTP nothing else is changed. Where the device
 * has summed it up, that sum changes with those of IPv6, which has no checksum for them. */
static __noinline bool change_rest(struct __sk_buff *ctx, const struct packet *pkt,
				   const struct flow_key *to)
{
	__u64 addresses = fold32(address_change(pkt, to));

	if (pkt->ipv6)
		bpf_csum_update(ctx, addresses);
	return write_addresses(ctx, pkt, to, addresses);
}

/* From the tuple in the packet to another, which of an ICMP error is the scratch memory's. If it returns
 * false, the packet must not go on. */
static __always_inline bool change(struct __sk_buff *ctx, const struct packet *pkt,
				   const struct flow_key *to)
{
	__u64 addresses = address_change(pkt, to);
	__be16 *ports;

	if (pkt->quote)
		return !rewrite_quote(ctx, pkt);
	if (pkt->key.proto == IPPROTO_SCTP && !same_ports(pkt, to))
		return false;
	if (pkt->rest || pkt->key.proto == IPPROTO_SCTP)
		return change_rest(ctx, pkt, to);
	if (!change_checksum(ctx, pkt, to, addresses) || !write_addresses(ctx, pkt, to, addresses))
		return false;
	ports = transport(ctx, pkt);
	if (!ports || (void *)(ports + ECHO_ID + 1) > end(ctx))
		return false;
	if (is_icmp(pkt)) {
		ports[ECHO_ID] = to->sport | to->dport; /* one is 0 */
		return true;
	}
	ports[0] = to->sport;
	ports[1] = to->dport;
	return true;
}

#endif
