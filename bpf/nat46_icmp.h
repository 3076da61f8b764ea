/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * ICMP errors about packets that got a header of the other family: made anew in the family of who
 * sent what is quoted, of which the header and 8 bytes are kept.
 */
#ifndef SHUNT_NAT46_ICMP_H
#define SHUNT_NAT46_ICMP_H

#include "nat46_errors.h"

#define QUOTED_BYTES 8

/* The header that an error quotes. */
struct quoted {
	__u32 tos;
	__u32 ttl;
	__u32 payload;
	__u32 ports; /* with it the 8 bytes */
	__u32 rest;
};

static __always_inline bool read_quoted(struct xdp_md *ctx, const struct packet *pkt,
					struct quoted *q)
{
	__u32 ports = pkt->quoted_ports, inner = pkt->l4 + sizeof(struct icmp_error);
	void *header = at_most(ctx, inner, 2 * MAX_L4_OFFSET);
	__be32 *words;

	if (!header)
		return false;
	if (pkt->ipv6) {
		struct ipv6hdr *ip = header;

		if ((void *)(ip + 1) > end(ctx))
			return false;
		words = (__be32 *)ip;
		q->tos = bpf_ntohl(words[0]) >> 20 & 0xff;
		q->ttl = ip->hop_limit;
		q->payload = bpf_ntohs(ip->payload_len) - (ports - inner - sizeof(*ip));
	} else {
		struct iphdr *ip = header;

		if ((void *)(ip + 1) > end(ctx))
			return false;
		q->tos = ip->tos;
		q->ttl = ip->ttl;
		q->payload = bpf_ntohs(ip->tot_len) - (ports - inner);
	}
	words = at_most(ctx, ports, 2 * MAX_L4_OFFSET);
	if (!words || (void *)(words + 2) > end(ctx))
		return false;
	q->ports = words[0];
	q->rest = words[1];
	return true;
}

/* With the tuple reversed, as it went the other way; and the checksum of a datagram for it. */
static __always_inline void turn_quoted(const struct packet *pkt, const struct flow_key *to,
					struct quoted *q)
{
	__u64 ports = (__u64)(__u16)~q->ports + (__u16) ~(q->ports >> 16);

	q->ports = (__u32)to->sport << 16 | to->dport; /* little-endian */
	if (pkt->key.proto == IPPROTO_UDP && q->rest >> 16) {
		__sum16 check = q->rest >> 16;

		swap_check(&check, ports + to->sport + to->dport + address_change(pkt, to));
		q->rest = (q->rest & 0xffff) | (__u32)(check ?: 0xffff) << 16;
	}
}

static __always_inline bool write_error6(struct xdp_md *ctx, const struct packet *pkt,
					 const struct flow_key *to, const struct icmp_words *e,
					 const struct quoted *q, __u32 ttl)
{
	const __u32 size = sizeof(struct icmp_error) + sizeof(struct ipv6hdr) + QUOTED_BYTES;
	struct ethhdr *eth = at(ctx, 0);
	struct ipv6hdr *ip = (void *)(eth + 1), *in;
	struct icmp_error *icmp = (void *)(ip + 1);
	__u32 *words;

	if ((void *)icmp + size > end(ctx))
		return false;
	in = (void *)(icmp + 1);
	words = (void *)(in + 1);
	eth->h_proto = bpf_htons(ETH_P_IPV6);
	put_header6(ip, to->saddr, to->daddr, pkt->tos, ttl, IPPROTO_ICMPV6, size);
	put_header6(in, to->daddr, to->saddr, q->tos, q->ttl, pkt->key.proto, q->payload);
	words[0] = q->ports;
	words[1] = q->rest;
	*icmp = (struct icmp_error){.type = e->type, .code = e->code, .info = bpf_htonl(e->info)};
	icmp->checksum =
		csum_fold(csum_add(pseudo_header(to, IPPROTO_ICMPV6, size), icmp, (int)size / 4));
	return true;
}

static __always_inline bool write_error4(struct xdp_md *ctx, const struct packet *pkt,
					 const struct flow_key *to, const struct icmp_words *e,
					 const struct quoted *q, __u32 ttl)
{
	const __u32 size = sizeof(struct icmp_error) + sizeof(struct iphdr) + QUOTED_BYTES;
	struct ethhdr *eth = at(ctx, 0);
	struct iphdr *ip = (void *)(eth + 1), *in;
	struct icmp_error *icmp = (void *)(ip + 1);
	__u32 *words;

	if ((void *)icmp + size > end(ctx))
		return false;
	in = (void *)(icmp + 1);
	words = (void *)(in + 1);
	eth->h_proto = bpf_htons(ETH_P_IP);
	put_header4(ip, to->saddr, to->daddr, pkt->tos, ttl, IPPROTO_ICMP, size);
	put_header4(in, to->daddr, to->saddr, q->tos, q->ttl, pkt->key.proto, q->payload);
	words[0] = q->ports;
	words[1] = q->rest;
	*icmp = (struct icmp_error){.type = e->type, .code = e->code, .info = bpf_htonl(e->info)};
	icmp->checksum = csum_fold(csum_add(0, icmp, (int)size / 4));
	return true;
}

/* The error, from and to whom the scratch memory's tuple says. 0, or a verdict's word. */
__noinline __u64 cross_quote(struct xdp_md *ctx, struct packet *pkt)
{
	const __u64 broken = word_of(verdict(XDP_DROP, REASON_DROP_BAD_TABLE));
	struct nat_scratch *s = own_scratch();
	struct icmp_error *icmp;
	struct icmp_words e;
	struct quoted q;
	__u32 header, want, ttl;
	long len;

	if (!pkt || !s)
		return broken;
	header = crossed_header(pkt);
	want = ETH_HLEN + 2 * header + sizeof(struct icmp_error) + QUOTED_BYTES;
	ttl = ttl_of(ctx, pkt->ipv6);
	/* clang 14 would take the frame's end over from there through a 32-bit register. */
	barrier();
	icmp = transport(ctx, pkt);
	if (!icmp || (void *)(icmp + 1) > end(ctx) || !read_quoted(ctx, pkt, &q))
		return broken;
	e.type = icmp->type;
	e.code = icmp->code;
	e.info = bpf_ntohl(icmp->info);
	if (pkt->ipv6 ? !to_icmp4(&e) : !to_icmp6(&e, q.payload + sizeof(struct iphdr)))
		return word_of(verdict(XDP_DROP, REASON_DROP_NAT46_NO_EQUAL));
	turn_quoted(pkt, &s->to, &q);
	/* At the front as far as it has to grow, which is where drivers leave room. */
	if (bpf_xdp_adjust_head(ctx, pkt->ipv6 ? 0 : -2 * (int)HEADERS_DIFFER))
		return word_of(verdict(XDP_DROP, REASON_DROP_NO_HEADROOM));
	len = end(ctx) - at(ctx, 0);
	barrier_var(len); /* clang 14 would subtract in 32 bits, which pointers don't do */
	if (bpf_xdp_adjust_tail(ctx, (int)want - (int)len))
		return word_of(verdict(XDP_DROP, REASON_DROP_NO_HEADROOM));
	if (pkt->ipv6 ? !write_error4(ctx, pkt, &s->to, &e, &q, ttl) :
			!write_error6(ctx, pkt, &s->to, &e, &q, ttl))
		return broken;
	pkt->ipv6 = !pkt->ipv6;
	pkt->l4 = ETH_HLEN + header;
	pkt->ip_len = want - ETH_HLEN;
	return 0;
}

#endif
