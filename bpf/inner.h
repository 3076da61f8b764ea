/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The headers of a packet that decap has opened, or of what answers it, as map ways_back asks for them. */
#ifndef SHUNT_INNER_H
#define SHUNT_INNER_H

#include <linux/udp.h>

#include "way_back.h"

#define MAX_EXTENSIONS 4
#define MAX_L4_OFFSET  512

#define ICMP_HEADER_BYTES 8

struct inner {
	struct way_key key __attribute__((aligned(8)));
	__u32 l4; /* where the transport header is in the frame */
	__u32 id; /* of a fragment */
	__u8 tcp_flags;
	bool ipv6;
	bool first;   /* the first of several fragments */
	bool rest;    /* a later one, which has no ports */
	bool quote;   /* an ICMP error; the ports are those of the packet it quotes */
	__u32 quoted; /* where that packet's IP header is */
	__u32 ports;  /* and its ports, or the packet's own */
};

/* As an answer has them they are the other way round. */
static __always_inline void set_ends4(struct way_key *key, __be32 saddr, __be32 daddr, bool answer)
{
	map_ipv4(key->client, answer ? daddr : saddr);
	map_ipv4(key->addr, answer ? saddr : daddr);
}

static __always_inline void set_ends6(struct way_key *key, const struct in6_addr *saddr,
				      const struct in6_addr *daddr, bool answer)
{
	__builtin_memcpy(key->client, answer ? daddr : saddr, 16);
	__builtin_memcpy(key->addr, answer ? saddr : daddr, 16);
}

static __always_inline bool read_inner4(struct CONTEXT *ctx, struct inner *in, bool answer)
{
	struct iphdr *ip = at(ctx, ETH_HLEN);

	if ((void *)(ip + 1) > end(ctx) || ip->version != 4 || ip->ihl < 5)
		return false;
	set_ends4(&in->key, ip->saddr, ip->daddr, answer);
	in->key.proto = ip->protocol;
	in->l4 = ETH_HLEN + ip->ihl * 4;
	in->id = ip->id;
	in->rest = ip->frag_off & bpf_htons(IP_OFFSET);
	in->first = !in->rest && ip->frag_off & bpf_htons(IP_MF);
	return true;
}

static __always_inline bool read_inner6(struct CONTEXT *ctx, struct inner *in, bool answer)
{
	struct ipv6hdr *ip = at(ctx, ETH_HLEN);
	__u32 offset = ETH_HLEN + sizeof(*ip);
	__u8 next;

	if ((void *)(ip + 1) > end(ctx) || ip->version != 6)
		return false;
	in->ipv6 = true;
	set_ends6(&in->key, &ip->saddr, &ip->daddr, answer);
	next = ip->nexthdr;
	for (int i = 0; i < MAX_EXTENSIONS && !in->rest; i++) {
		__u8 *ext;

		if (next != NEXTHDR_FRAGMENT && next != NEXTHDR_HOP && next != NEXTHDR_ROUTING &&
		    next != NEXTHDR_DEST)
			break;
		ext = at_most(ctx, offset, MAX_L4_OFFSET);
		if (!ext || (void *)(ext + 8) > end(ctx))
			return false;
		if (next == NEXTHDR_FRAGMENT) {
			__be16 where = *(__be16 *)(ext + 2);

			in->id = *(__be32 *)(ext + 4);
			in->rest = where & bpf_htons(IPV6_OFFSET);
			in->first = !in->rest && where & bpf_htons(IPV6_MF);
			offset += 8;
		} else {
			offset += (ext[1] + 1) * 8;
		}
		next = ext[0];
	}
	in->key.proto = next;
	in->l4 = offset;
	return true;
}

/* Where the ports are, the source's and the destination's. */
static __always_inline bool read_ports(struct CONTEXT *ctx, struct inner *in, __u32 offset,
				       bool answer)
{
	__be16 *port = at_most(ctx, offset, 2 * MAX_L4_OFFSET);

	if (!port || (void *)port + 8 > end(ctx))
		return false;
	in->ports = offset;
	in->key.client_port = answer ? port[1] : port[0];
	in->key.port = answer ? port[0] : port[1];
	return true;
}

static __always_inline bool is_error(__u8 type, bool ipv6)
{
	if (ipv6)
		return type >= 1 && type <= 4;
	return type == 3 || type == 11 || type == 12; /* a redirect is none */
}

/* An ICMP error is about a packet that went the other way. */
static __always_inline bool read_quote(struct CONTEXT *ctx, struct inner *in, bool answer)
{
	__u32 quoted = in->l4 + ICMP_HEADER_BYTES;
	__u8 *icmp = at_most(ctx, in->l4, MAX_L4_OFFSET);
	__u8 to[16] __attribute__((aligned(8)));
	bool ipv6 = in->ipv6;
	__u32 header;

	if (!icmp || (void *)(icmp + ICMP_HEADER_BYTES) > end(ctx) || !is_error(icmp[0], ipv6))
		return false;
	in->quoted = quoted;
	__builtin_memcpy(to, in->key.addr, 16);
	if (ipv6) {
		struct ipv6hdr *ip = at_most(ctx, quoted, 2 * MAX_L4_OFFSET);

		if (!ip || (void *)(ip + 1) > end(ctx))
			return false;
		set_ends6(&in->key, &ip->saddr, &ip->daddr, !answer);
		in->key.proto = ip->nexthdr;
		header = sizeof(*ip);
	} else {
		struct iphdr *ip = at_most(ctx, quoted, 2 * MAX_L4_OFFSET);

		if (!ip || (void *)(ip + 1) > end(ctx) || ip->ihl < 5 ||
		    ip->frag_off & bpf_htons(IP_OFFSET))
			return false;
		set_ends4(&in->key, ip->saddr, ip->daddr, !answer);
		in->key.proto = ip->protocol;
		header = ip->ihl * 4;
	}
	/* One that comes in is for who has sent what it quotes: else to ask whose that address is
	 * would say nothing of where the error goes. */
	if (!answer && !same_address(in->key.addr, to))
		return false;
	in->quote = true;
	return (in->key.proto == IPPROTO_TCP || in->key.proto == IPPROTO_UDP) &&
	       read_ports(ctx, in, quoted + header, !answer);
}

/* False if it has no ports that could be a flow's: neither TCP nor UDP, nor an error about them. */
static __noinline bool read_inner(struct CONTEXT *ctx, struct inner *in, bool answer)
{
	struct ethhdr *eth = at(ctx, 0);
	struct tcphdr *tcp;

	if ((void *)(eth + 1) > end(ctx))
		return false;
	if (eth->h_proto == bpf_htons(ETH_P_IP) ?
		    !read_inner4(ctx, in, answer) :
		    eth->h_proto != bpf_htons(ETH_P_IPV6) || !read_inner6(ctx, in, answer))
		return false;
	if (in->rest)
		return true;
	if (in->key.proto == (in->ipv6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP))
		return !in->first && read_quote(ctx, in, answer);
	if (in->key.proto == IPPROTO_UDP)
		return read_ports(ctx, in, in->l4, answer);
	if (in->key.proto != IPPROTO_TCP)
		return false;
	tcp = at_most(ctx, in->l4, MAX_L4_OFFSET);
	if (!tcp || (void *)(tcp + 1) > end(ctx))
		return false;
	in->tcp_flags = ((__u8 *)tcp)[13];
	return read_ports(ctx, in, in->l4, answer);
}

static __always_inline bool opens(const struct inner *in)
{
	return in->key.proto == IPPROTO_TCP && !in->rest &&
	       (in->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN;
}

#endif
