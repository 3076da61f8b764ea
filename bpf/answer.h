/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Answers to the sender, instead of silence: TCP RST, ICMP unreachable, ICMP too big. */
#ifndef SHUNT_ANSWER_H
#define SHUNT_ANSWER_H

#include "checksum.h"
#include "room.h"

#define ANSWER_TTL 64

/* <linux/icmp.h> brings in libc's socket headers, which have no BPF flavour. */
struct icmp_error {
	__u8 type;
	__u8 code;
	__be16 checksum;
	__be32 info; /* too big: the MTU */
};

/* Types; after each of those with several meanings, its codes. */
#define ICMP_UNREACHABLE	3
#define ICMP_PORT_UNREACHABLE	3
#define ICMP_TOO_BIG		4
#define ICMP_TIME_EXCEEDED	11
#define ICMP_BAD_HEADER		12
#define ICMPV6_UNREACHABLE	1
#define ICMPV6_PORT_UNREACHABLE 4
#define ICMPV6_TOO_BIG		2
#define ICMPV6_TIME_EXCEEDED	3
#define ICMPV6_BAD_HEADER	4

/* What an error quotes: the IP header and 8 bytes, which is all that stacks look at; of the first of
 * several IPv6 fragments 8 more, for the ports are behind a header of its own. */
#define QUOTE4	     (sizeof(struct iphdr) + 8)
#define QUOTE6	     (sizeof(struct ipv6hdr) + 8)
#define QUOTE6_FIRST (QUOTE6 + 8)

static __always_inline bool swap_macs(struct CONTEXT *ctx)
{
	struct ethhdr *eth = at(ctx, 0);
	__u8 mac[ETH_ALEN];

	if ((void *)(eth + 1) > end(ctx))
		return false;
	__builtin_memcpy(mac, eth->h_dest, ETH_ALEN);
	__builtin_memcpy(eth->h_dest, eth->h_source, ETH_ALEN);
	__builtin_memcpy(eth->h_source, mac, ETH_ALEN);
	return true;
}

/* From the address the packet was sent to, back to its sender. */
static __always_inline void write_ipv4(struct iphdr *ip, const struct flow_key *key, __u8 proto,
				       __u16 payload)
{
	*ip = (struct iphdr){
		.version = 4,
		.ihl = 5,
		.tot_len = bpf_htons(sizeof(*ip) + payload),
		.frag_off = bpf_htons(0x4000),
		.ttl = ANSWER_TTL,
		.protocol = proto,
		.saddr = ipv4_of(key->daddr),
		.daddr = ipv4_of(key->saddr),
	};
	ip->check = csum_fold(csum_add(0, ip, sizeof(*ip) / 4));
}

static __always_inline void write_ipv6(struct ipv6hdr *ip, const struct flow_key *key, __u8 proto,
				       __u16 payload)
{
	*ip = (struct ipv6hdr){
		.version = 6,
		.payload_len = bpf_htons(payload),
		.nexthdr = proto,
		.hop_limit = ANSWER_TTL,
	};
	__builtin_memcpy(&ip->saddr, key->daddr, 16);
	__builtin_memcpy(&ip->daddr, key->saddr, 16);
}

static __always_inline __u64 pseudo_header(const struct flow_key *key, __u8 proto, __u32 len)
{
	__u64 sum = csum_add(0, key->saddr, 4);

	sum = csum_add(sum, key->daddr, 4);
	return sum + bpf_htonl(len) + bpf_htonl((__u32)proto);
}

/* RFC 9293, 3.10.7.1: the reset that a closed port sends. */
static __noinline bool answer_rst(struct CONTEXT *ctx, const struct packet *pkt)
{
	__u32 ip_size = pkt->ipv6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
	__u32 want = ETH_HLEN + ip_size + sizeof(struct tcphdr);
	struct tcphdr *old, reset = {
				    .source = pkt->key.dport,
				    .dest = pkt->key.sport,
				    .doff = sizeof(reset) / 4,
				    .rst = 1,
			    };
	__u64 sum;

	if (pkt->l4 > MAX_L4_OFFSET)
		return false;
	old = at(ctx, pkt->l4);
	if ((void *)(old + 1) > end(ctx))
		return false;
	if (pkt->tcp_flags & TCP_ACK) {
		reset.seq = old->ack_seq;
	} else {
		__u32 len = ETH_HLEN + pkt->ip_len - pkt->l4 - old->doff * 4 +
			    !!(pkt->tcp_flags & TCP_SYN) + !!(pkt->tcp_flags & TCP_FIN);

		reset.ack = 1;
		reset.ack_seq = bpf_htonl(pkt->seq + len);
	}
	if (!renew(ctx, want))
		return false;
	/* An IPv4-mapped address sums like the address plus 0xffff, twice: zero either way. */
	sum = pseudo_header(&pkt->key, IPPROTO_TCP, sizeof(reset));
	reset.check = csum_fold(csum_add(sum, &reset, sizeof(reset) / 4));
	if (pkt->ipv6) {
		struct ipv6hdr *ip = at(ctx, ETH_HLEN);
		struct tcphdr *tcp = (void *)(ip + 1);

		if ((void *)(tcp + 1) > end(ctx))
			return false;
		write_ipv6(ip, &pkt->key, IPPROTO_TCP, sizeof(reset));
		*tcp = reset;
	} else {
		struct iphdr *ip = at(ctx, ETH_HLEN);
		struct tcphdr *tcp = (void *)(ip + 1);

		if ((void *)(tcp + 1) > end(ctx))
			return false;
		write_ipv4(ip, &pkt->key, IPPROTO_TCP, sizeof(reset));
		*tcp = reset;
	}
	return swap_macs(ctx);
}

static __noinline bool answer_icmp4(struct CONTEXT *ctx, const struct packet *pkt, __u8 code,
				    __u16 mtu)
{
	struct iphdr *ip;
	struct icmp_error *icmp;

	/* Options would make the quote's length a variable; nobody sends them. */
	if (pkt->l4 != ETH_HLEN + sizeof(*ip) ||
	    !make_room(ctx, sizeof(*ip) + sizeof(*icmp), QUOTE4) || !swap_macs(ctx))
		return false;
	ip = at(ctx, ETH_HLEN);
	icmp = (void *)(ip + 1);
	if ((void *)(icmp + 1) + QUOTE4 > end(ctx))
		return false;
	write_ipv4(ip, &pkt->key, IPPROTO_ICMP, sizeof(*icmp) + QUOTE4);
	*icmp = (struct icmp_error){.type = ICMP_UNREACHABLE, .code = code, .info = bpf_htonl(mtu)};
	icmp->checksum = csum_fold(csum_add(0, icmp, (sizeof(*icmp) + QUOTE4) / 4));
	return true;
}

static __noinline bool answer_icmp6(struct CONTEXT *ctx, const struct packet *pkt, __u8 type,
				    __u8 code, __u32 mtu)
{
	const __u32 headers = sizeof(struct ipv6hdr) + sizeof(struct icmp_error);
	struct ipv6hdr *ip;
	struct icmp_error *icmp;
	__u32 *more;
	__u64 sum;

	if (pkt->first ? !make_room(ctx, headers, QUOTE6_FIRST) : !make_room(ctx, headers, QUOTE6))
		return false;
	if (!swap_macs(ctx))
		return false;
	ip = at(ctx, ETH_HLEN);
	icmp = (void *)(ip + 1);
	if ((void *)(icmp + 1) + QUOTE6 > end(ctx))
		return false;
	write_ipv6(ip, &pkt->key, IPPROTO_ICMPV6,
		   sizeof(*icmp) + (pkt->first ? QUOTE6_FIRST : QUOTE6));
	*icmp = (struct icmp_error){.type = type, .code = code, .info = bpf_htonl(mtu)};
	/* The addresses, which are part of it, stand before it. */
	sum = csum_add(0, &ip->saddr, (2 * sizeof(ip->saddr) + sizeof(*icmp) + QUOTE6) / 4);
	if (pkt->first) {
		more = (void *)(icmp + 1) + QUOTE6;
		if ((void *)(more + 2) > end(ctx))
			return false;
		sum = csum_add(sum, more, 2);
	}
	sum += bpf_htonl(sizeof(*icmp) + (pkt->first ? QUOTE6_FIRST : QUOTE6)) +
	       bpf_htonl((__u32)IPPROTO_ICMPV6);
	icmp->checksum = csum_fold(sum);
	return true;
}

static __always_inline struct verdict refuse(struct CONTEXT *ctx, const struct packet *pkt)
{
	if (pkt->key.proto == IPPROTO_TCP) {
		if (!(pkt->tcp_flags & TCP_RST) && answer_rst(ctx, pkt))
			return verdict(XDP_TX, REASON_SENT_RST_NO_BACKEND);
	} else if (spend(BUDGET_ANSWERS)) {
		if (pkt->ipv6 ?
			    answer_icmp6(ctx, pkt, ICMPV6_UNREACHABLE, ICMPV6_PORT_UNREACHABLE, 0) :
			    answer_icmp4(ctx, pkt, ICMP_PORT_UNREACHABLE, 0))
			return verdict(XDP_TX, REASON_SENT_UNREACHABLE);
	}
	return verdict(XDP_DROP, REASON_DROP_NO_BACKEND);
}

/* An IPv4 packet whose sender leaves it to routers to make it fit. */
static __always_inline bool may_fragment(struct CONTEXT *ctx)
{
	struct iphdr *ip = at(ctx, ETH_HLEN);

	return (void *)(ip + 1) <= end(ctx) && !(ip->frag_off & bpf_htons(IP_DF));
}

/* Only a sender that has set DF has asked to be told (RFC 1191, 3); and nobody is told of an error
 * about an error (RFC 1122, 3.2.2). */
static __always_inline struct verdict too_big(struct CONTEXT *ctx, const struct packet *pkt,
					      __u32 mtu)
{
	if (!pkt->quote && (pkt->ipv6 || !may_fragment(ctx)) && spend(BUDGET_ANSWERS)) {
		if (pkt->ipv6 ? answer_icmp6(ctx, pkt, ICMPV6_TOO_BIG, 0, mtu) :
				answer_icmp4(ctx, pkt, ICMP_TOO_BIG, mtu))
			return verdict(XDP_TX, REASON_SENT_TOO_BIG);
	}
	return verdict(XDP_DROP, REASON_DROP_TOO_BIG);
}

#endif
