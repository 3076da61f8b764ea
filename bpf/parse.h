/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* From a frame to the tuple the tables are asked about. */
#ifndef SHUNT_PARSE_H
#define SHUNT_PARSE_H

#include <linux/tcp.h>
#include <linux/udp.h>

#include "packet.h"
#include "verdict.h"

/* Extension headers looked through; a packet with more is the stack's. */
#define MAX_EXTENSIONS 4

/* The largest offset of a transport header looked at; longer chains are the stack's. */
#define MAX_L4_OFFSET 512

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

struct packet {
	struct flow_key key __attribute__((aligned(8)));
	__u64 frontend; /* frontend_hash() of key */
	__u32 hash;	/* flow_hash() of key */
	__u32 ip_len;	/* bytes from the IP header to the end of its payload */
	__u32 seq;	/* TCP only, host order */
	__u16 l4;	/* offset of the transport header in the frame */
	__u8 tcp_flags;
	bool ipv6;
	bool quote;	    /* an ICMP error; key is of the packet it quotes, reversed */
	bool first;	    /* the first of several fragments */
	__u16 quoted_ports; /* where the quote has them in the frame */
	__u32 fragment_id;
	__u32 tag[2]; /* VLAN tags as they stood in the frame, the outer one first; 0 = none */
};

static __always_inline bool is_zero(const __u8 *addr)
{
	const __u64 *half = (const __u64 *)addr;

	return !(half[0] | half[1]);
}

/* Half of MurmurHash3's 64-bit finalizer (public domain): three operations a word. */
static __always_inline __u64 stir(__u64 x)
{
	x ^= x >> 33;
	x *= 0xff51afd7ed558ccdULL;
	return x ^ x >> 33;
}

/* Stored as one word, since words are what is read of it. Little-endian. */
static __always_inline void set_ports(struct flow_key *key, __be16 sport, __be16 dport, __u8 proto)
{
	*(__u64 *)&key->dport =
		(__u64)sport << 32 | (__u32)SCOPE_EXTERNAL << 24 | (__u32)proto << 16 | dport;
}

static __always_inline __u32 dport_proto_scope(const struct flow_key *key)
{
	return *(const __u64 *)&key->dport;
}

/* Of the frontend with this port, protocol and scope: where map services has it. lb/frontends.py
 * computes the same. */
static __always_inline __u64 frontend_hash(const struct flow_key *key, bool ipv6, __u32 tail)
{
	const __u64 *d = (const __u64 *)key->daddr;

	if (!ipv6)
		return stir((__u64)ipv4_of(key->daddr) << 32 | tail);
	return stir(stir(stir(d[0]) ^ d[1]) ^ tail);
}

/* Equal on every node with the same seed. The slot is its top bits. */
static __always_inline __u32 flow_hash(const struct flow_key *key, bool ipv6, __u64 frontend)
{
	const __u64 *s = (const __u64 *)key->saddr;
	__u64 x = frontend ^ config.hash_seed;

	if (ipv6)
		x = stir(stir(x ^ s[0]) ^ s[1]) ^ key->sport;
	else
		x ^= (__u64)ipv4_of(key->saddr) << 32 | key->sport;
	return stir(x) * 0xc4ceb9fe1a85ec53ULL >> 32;
}

static __always_inline __u32 whole_hash(const struct flow_key *key, bool ipv6)
{
	return flow_hash(key, ipv6, frontend_hash(key, ipv6, dport_proto_scope(key)));
}

/* Of the client alone, and of whatever it is to be told apart by. */
static __always_inline __u32 client_hash(const struct flow_key *key, __u64 what)
{
	const __u64 *s = (const __u64 *)key->saddr;

	return stir(stir(what ^ config.hash_seed ^ s[0]) ^ s[1]) * 0xc4ceb9fe1a85ec53ULL >> 32;
}

/* Returns whether to go on; if not, `*why` says why the stack gets the packet. */
static __always_inline bool parse_ipv4(struct xdp_md *ctx, struct packet *pkt, enum reason *why)
{
	struct iphdr *ip = at(ctx, ETH_HLEN);

	*why = REASON_PASS_MALFORMED;
	if ((void *)(ip + 1) > end(ctx) || ip->version != 4 || ip->ihl < 5)
		return false;
	pkt->ipv6 = false;
	pkt->ip_len = bpf_ntohs(ip->tot_len);
	pkt->l4 = ETH_HLEN + ip->ihl * 4;
	pkt->key.proto = ip->protocol;
	map_ipv4(pkt->key.saddr, ip->saddr);
	map_ipv4(pkt->key.daddr, ip->daddr);
	if (ip->frag_off & bpf_htons(IP_MF | IP_OFFSET)) {
		pkt->fragment_id = ip->id;
		pkt->first = !(ip->frag_off & bpf_htons(IP_OFFSET));
		*why = REASON_PASS_FRAGMENT;
		return pkt->first;
	}
	return true;
}

/* From the first extension header of IPv6, of type `next`, to the transport header. Returns what the
 * packet has there, or -1. Not static: verified once. */
__noinline int skip_extensions(struct xdp_md *ctx, struct packet *pkt, __u32 next)
{
	__u32 offset = ETH_HLEN + sizeof(struct ipv6hdr);

	if (!pkt)
		return -1;
	for (int i = 0; i < MAX_EXTENSIONS; i++) {
		__u8 *ext;

		if (next != NEXTHDR_FRAGMENT && next != NEXTHDR_HOP && next != NEXTHDR_ROUTING &&
		    next != NEXTHDR_DEST)
			break;
		if (offset > MAX_L4_OFFSET)
			return -1;
		ext = at(ctx, offset);
		if ((void *)(ext + 8) > end(ctx))
			return -1;
		if (next == NEXTHDR_FRAGMENT) {
			__be16 where = *(__be16 *)(ext + 2);

			pkt->fragment_id = *(__be32 *)(ext + 4);
			if (where & bpf_htons(IPV6_OFFSET))
				return NEXTHDR_FRAGMENT;
			pkt->first = where & bpf_htons(IPV6_MF) ? 1 : 0;
			offset += 8;
		} else {
			offset += (ext[1] + 1) * 8;
		}
		next = ext[0];
	}
	pkt->l4 = offset;
	return next;
}

static __always_inline bool parse_ipv6(struct xdp_md *ctx, struct packet *pkt, enum reason *why)
{
	struct ipv6hdr *ip = at(ctx, ETH_HLEN);
	int next;

	*why = REASON_PASS_MALFORMED;
	if ((void *)(ip + 1) > end(ctx) || ip->version != 6)
		return false;
	pkt->ipv6 = true;
	pkt->ip_len = sizeof(*ip) + bpf_ntohs(ip->payload_len);
	__builtin_memcpy(pkt->key.saddr, &ip->saddr, 16);
	__builtin_memcpy(pkt->key.daddr, &ip->daddr, 16);
	pkt->l4 = ETH_HLEN + sizeof(*ip);
	next = ip->nexthdr;
	if (next != IPPROTO_TCP && next != IPPROTO_UDP && next != IPPROTO_ICMPV6) {
		next = skip_extensions(ctx, pkt, next);
		if (next < 0)
			return false;
		if (next == NEXTHDR_FRAGMENT) {
			*why = REASON_PASS_FRAGMENT;
			return false;
		}
	}
	pkt->key.proto = next;
	return true;
}

static __always_inline bool parse_ports(struct xdp_md *ctx, struct packet *pkt)
{
	__u32 offset = pkt->l4, header = sizeof(struct udphdr);

	if (offset > MAX_L4_OFFSET)
		return false;
	if (pkt->key.proto == IPPROTO_TCP) {
		struct tcphdr *tcp = at(ctx, offset);

		if ((void *)(tcp + 1) > end(ctx))
			return false;
		set_ports(&pkt->key, tcp->source, tcp->dest, IPPROTO_TCP);
		pkt->seq = bpf_ntohl(tcp->seq);
		pkt->tcp_flags = ((__u8 *)tcp)[13];
		header = tcp->doff * 4;
		if (header < sizeof(*tcp))
			return false;
	} else {
		struct udphdr *udp = at(ctx, offset);

		if ((void *)(udp + 1) > end(ctx))
			return false;
		set_ports(&pkt->key, udp->source, udp->dest, IPPROTO_UDP);
	}
	/* A frame may be padded, but never shorter than its IP header says; and what it says has
	 * room for the header whose ports we have read. */
	return ETH_HLEN + pkt->ip_len <= (__u32)(ctx->data_end - ctx->data) &&
	       offset + header <= ETH_HLEN + pkt->ip_len;
}

static __always_inline bool parse(struct xdp_md *ctx, struct packet *pkt, enum reason *why)
{
	struct ethhdr *eth = at(ctx, 0);

	*why = REASON_PASS_NOT_IP;
	if ((void *)(eth + 1) > end(ctx))
		return false;
	if (eth->h_proto == bpf_htons(ETH_P_IP)) {
		if (!parse_ipv4(ctx, pkt, why))
			return false;
	} else if (eth->h_proto == bpf_htons(ETH_P_IPV6)) {
		if (!parse_ipv6(ctx, pkt, why))
			return false;
	} else {
		return false;
	}
	if (pkt->key.proto != IPPROTO_TCP && pkt->key.proto != IPPROTO_UDP) {
		*why = REASON_PASS_NOT_OURS;
		return false;
	}
	*why = REASON_PASS_MALFORMED;
	return parse_ports(ctx, pkt);
}

/* A SYN that opens a connection. */
static __always_inline bool opens(const struct packet *pkt)
{
	return (pkt->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN;
}

static __always_inline bool closes(const struct packet *pkt)
{
	return pkt->tcp_flags & (TCP_FIN | TCP_RST);
}

#endif
