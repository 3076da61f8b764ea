/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* From a frame to the tuple the tables are asked about. */
#ifndef SHUNT_PARSE_H
#define SHUNT_PARSE_H

#include <linux/tcp.h>
#include <linux/udp.h>

#include "frontend.h"
#include "sctp.h"
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
	__u32 len;	/* of the frame as it came */
	__u32 ip_len;	/* bytes from the IP header to the end of its payload */
	union {
		__u32 seq;    /* TCP, host order. SCTP: 0 as an association opens, or SCTP_LATER */
		__u32 chunks; /* SCTP, at TC: see_chunks() */
	};
	__u16 l4;	/* offset of the transport header in the frame */
	__u8 tcp_flags; /* SCTP: what means the same to a flow */
	bool ipv6;
	bool quote;	    /* an ICMP error; key is of the packet it quotes, reversed */
	bool first;	    /* the first of several fragments */
	__u8 tos;	    /* DSCP and ECN */
	bool routed;	    /* IPv6: its last destination is another */
	__u16 quoted_ports; /* where the quote has them in the frame */
	__u8 way;	    /* enum way */
	bool rest;	    /* a later fragment; key has its first one's ports */
	__u32 fragment_id;
	__u32 tag[2]; /* VLAN tags as they stood in the frame, the outer one first; 0 = none */
};

/* The transport header, of which the caller checks how much is there. */
static __always_inline void *transport(struct CONTEXT *ctx, const struct packet *pkt)
{
	return at_most(ctx, pkt->l4, MAX_L4_OFFSET);
}

static __always_inline bool is_zero(const __u8 *addr)
{
	const __u64 *half = (const __u64 *)addr;

	return !(half[0] | half[1]);
}

static __always_inline bool same_address(const __u8 *a, const __u8 *b)
{
	const __u64 *x = (const __u64 *)a, *y = (const __u64 *)b;

	return x[0] == y[0] && x[1] == y[1];
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
static __always_inline bool parse_ipv4(void *from, void *to, struct packet *pkt, enum reason *why)
{
	struct iphdr *ip = from + ETH_HLEN;
	__u32 version_ihl;

	*why = REASON_PASS_MALFORMED;
	if ((void *)(ip + 1) > to)
		return false;
	version_ihl = *(__u8 *)ip;
	if (version_ihl < 0x45 || version_ihl > 0x4f)
		return false;
	pkt->tos = ip->tos;
	pkt->ip_len = bpf_ntohs(ip->tot_len);
	pkt->l4 = ETH_HLEN + (version_ihl - 0x40) * 4;
	pkt->key.proto = ip->protocol;
	map_ipv4(pkt->key.saddr, ip->saddr);
	map_ipv4(pkt->key.daddr, ip->daddr);
	if (unlikely(ip->frag_off & bpf_htons(IP_MF | IP_OFFSET))) {
		pkt->fragment_id = ip->id;
		pkt->first = !(ip->frag_off & bpf_htons(IP_OFFSET));
		*why = REASON_PASS_FRAGMENT;
		return pkt->first;
	}
	return true;
}

/* From the first extension header of IPv6, of type `next`, to the transport header. Returns what the
 * packet has there, or -1. Not static: verified once. */
__noinline int skip_extensions(struct CONTEXT *ctx, struct packet *pkt, __u32 next)
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
			pkt->key.proto = ext[0]; /* all that a later one says of it */
			if (where & bpf_htons(IPV6_OFFSET))
				return NEXTHDR_FRAGMENT;
			pkt->first = where & bpf_htons(IPV6_MF) ? 1 : 0;
			offset += 8;
		} else {
			if (next == NEXTHDR_ROUTING && ext[3])
				pkt->routed = true;
			offset += (ext[1] + 1) * 8;
		}
		next = ext[0];
	}
	pkt->l4 = offset;
	return next;
}

static __always_inline bool parse_ipv6(struct CONTEXT *ctx, void *from, void *to,
				       struct packet *pkt, enum reason *why)
{
	struct ipv6hdr *ip = from + ETH_HLEN;
	const __u8 *bytes = (const __u8 *)ip;
	int next;

	*why = REASON_PASS_MALFORMED;
	if ((void *)(ip + 1) > to || bytes[0] >> 4 != 6)
		return false;
	pkt->ipv6 = true;
	pkt->tos = bytes[0] << 4 | bytes[1] >> 4;
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

/* What the first chunk means to a flow. After its INIT an association's next packet begins with COOKIE
 * ECHO (RFC 9260, 5.1): any other is of an older one with the same tuple. */
static __always_inline void read_first_chunk(const struct sctp_start *sctp, struct packet *pkt)
{
	__u8 type = sctp->chunk.type;

	pkt->seq = SCTP_LATER;
	if (type == SCTP_INIT && !sctp->tag) {
		pkt->tcp_flags = TCP_SYN;
		pkt->seq = 0;
	} else if (type == SCTP_COOKIE_ECHO) {
		pkt->seq = 0;
	} else if (type == SCTP_ABORT) {
		pkt->tcp_flags = TCP_RST;
	} else if (type == SCTP_SHUTDOWN_ACK || type == SCTP_SHUTDOWN_COMPLETE) {
		pkt->tcp_flags = TCP_FIN;
	}
}

static __always_inline bool parse_ports(struct CONTEXT *ctx, void *from, void *to,
					struct packet *pkt)
{
	__u32 offset = pkt->l4, header = sizeof(struct udphdr);

	if (unlikely(offset > MAX_L4_OFFSET))
		return false;
	if (likely(pkt->key.proto == IPPROTO_TCP)) {
		struct tcphdr *tcp = from + offset;

		if ((void *)(tcp + 1) > to)
			return false;
		set_ports(&pkt->key, tcp->source, tcp->dest, IPPROTO_TCP);
		pkt->seq = bpf_ntohl(tcp->seq);
		pkt->tcp_flags = ((__u8 *)tcp)[13];
		header = tcp->doff * 4;
		if (header < sizeof(*tcp))
			return false;
	} else if (pkt->key.proto == IPPROTO_SCTP) {
		struct sctp_start *sctp = from + offset;

		if ((void *)(sctp + 1) > to)
			return false;
		set_ports(&pkt->key, sctp->source, sctp->dest, IPPROTO_SCTP);
		read_first_chunk(sctp, pkt);
		header = sizeof(*sctp);
	} else {
		struct udphdr *udp = from + offset;

		if ((void *)(udp + 1) > to)
			return false;
		set_ports(&pkt->key, udp->source, udp->dest, IPPROTO_UDP);
	}
	/* A frame may be padded, but never shorter than its IP header says; and what it says has
	 * room for the header whose ports we have read. */
	return ETH_HLEN + pkt->ip_len <= frame_len(ctx, to - from) &&
	       offset + header <= ETH_HLEN + pkt->ip_len;
}

/* Of the protocols that services have. */
static __always_inline bool has_ports(__u8 proto)
{
	return proto == IPPROTO_TCP || proto == IPPROTO_UDP || proto == IPPROTO_SCTP;
}

/* `from` and `to` are where the frame begins and ends, or what of it can be read ends. */
static __always_inline bool parse(struct CONTEXT *ctx, void *from, void *to, struct packet *pkt,
				  enum reason *why)
{
	*why = REASON_PASS_NOT_IP;
	if (from + ETH_HLEN > to)
		return false;
	if (likely(eth_type(from) == bpf_htons(ETH_P_IP))) {
		if (!parse_ipv4(from, to, pkt, why))
			return false;
	} else if (eth_type(from) == bpf_htons(ETH_P_IPV6)) {
		if (!parse_ipv6(ctx, from, to, pkt, why))
			return false;
	} else {
		return false;
	}
	if (unlikely(!has_ports(pkt->key.proto))) {
		*why = REASON_PASS_NOT_OURS;
		return false;
	}
	*why = REASON_PASS_MALFORMED;
	return parse_ports(ctx, from, to, pkt);
}

static __always_inline bool is_port_of_nat(const struct flow_key *key)
{
	return (__u16)(bpf_ntohs(key->dport) - config.nat_port_min) < config.nat_port_count;
}

/* A SYN that opens a connection, or an INIT that opens an association. */
static __always_inline bool opens(const struct packet *pkt)
{
	return (pkt->tcp_flags & (TCP_SYN | TCP_ACK | TCP_RST | TCP_FIN)) == TCP_SYN;
}

/* Whether it may be the first packet of a flow: of datagrams, any. */
static __always_inline bool may_begin(const struct packet *pkt)
{
	return (pkt->key.proto != IPPROTO_TCP && pkt->key.proto != IPPROTO_SCTP) || opens(pkt);
}

static __always_inline bool closes(const struct packet *pkt)
{
	return pkt->tcp_flags & (TCP_FIN | TCP_RST);
}

#endif
