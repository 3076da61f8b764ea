/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Next hops, and sending: encapsulated (dsr-ipip; dsr-geneve: send_geneve.h), to another MAC (dsr-l2),
 * translated (nat). */
#ifndef SHUNT_SEND_H
#define SHUNT_SEND_H

#include "answer.h"
#include "checksum.h"
#include "flow.h"
#include "rewrite.h"
#include "last_hop.h"

#define OUTER_TTL 64

/* As words, since a copy of bytes into a frame is compiled byte by byte. Little-endian. */
struct hop {
	__u64 head; /* destination, and the source's first two bytes: as a frame begins */
	__u32 rest; /* the source's last four */
	__u16 mtu;
	__u32 ifindex;
	__u32 tags;
};

static __always_inline void set_macs(struct hop *hop, __u64 dmac, __u64 smac)
{
	hop->head = (dmac << 16 >> 16) | smac << 48;
	hop->rest = smac >> 16;
}

/* The caller has checked that the frame has a header. */
static __always_inline void write_macs(void *frame, const struct hop *hop)
{
	*(__u64 *)frame = hop->head;
	*(__u32 *)(frame + 8) = hop->rest;
}

static __always_inline void step_hop(const struct hop *hop)
{
	step(STEP_HOP, hop->ifindex, hop->mtu | (__u64)hop->tags << 32);
	step(STEP_HOP_MAC, 0, hop->head << 16 >> 16);
}

/* To a client. The link was good for its packets. */
static __always_inline struct hop hop_back(const struct last_hop *back)
{
	struct hop hop = {.mtu = 0xffff, .ifindex = back->ifindex, .tags = back->tags};

	set_macs(&hop, *(__u64 *)back->peer, *(__u64 *)back->own);
	return hop;
}

/* The agent does not know the neighbour (yet): ask the kernel. */
static __noinline bool fib_hop(struct xdp_md *ctx, const struct backend_val *b, __u32 ip_len,
			       struct hop *hop)
{
	struct nat_scratch *s = own_scratch();
	__u64 dmac = 0, smac = 0;
	struct bpf_fib_lookup *fib;
	long ret;

	if (!s)
		return false;
	fib = (struct bpf_fib_lookup *)s->fib;
	*fib = (struct bpf_fib_lookup){
		.ifindex = came_in_by(ctx),
		.tot_len = ip_len,
	};
	if (b->flags & BACKEND_IPV6) {
		fib->family = AF_INET6;
		__builtin_memcpy(fib->ipv6_dst, b->addr, 16);
	} else {
		fib->family = AF_INET;
		fib->ipv4_dst = ipv4_of(b->addr);
	}
	/* As a packet that came in is routed: with BPF_FIB_LOOKUP_OUTPUT only routes that lead out
	 * of the interface it came in on would count. */
	ret = bpf_fib_lookup(ctx, fib, sizeof(*fib), 0);
	if (ret == BPF_FIB_LKUP_RET_FRAG_NEEDED) {
		hop->mtu = fib->mtu_result; /* the caller refuses before it looks at the rest */
		return true;
	}
	if (ret != BPF_FIB_LKUP_RET_SUCCESS)
		return false;
	note(EVENT_FIB_FALLBACK);
	__builtin_memcpy(&dmac, fib->dmac, ETH_ALEN);
	__builtin_memcpy(&smac, fib->smac, ETH_ALEN);
	set_macs(hop, dmac, smac);
	hop->mtu = 0xffff;
	hop->ifindex = fib->ifindex;
	hop->tags = 0;
	step_hop(hop);
	return true;
}

/* `ip_len` is the packet's as it will leave. */
static __always_inline bool find_hop(struct xdp_md *ctx, const struct backend_val *b, __u32 ip_len,
				     struct hop *hop)
{
	__u32 index = b->nexthop;
	struct nexthop_val *nh = bpf_map_lookup_elem(&nexthops, &index);
	/* MAC and MTU change together, so they are read together. Little-endian. */
	__u64 word = nh ? READ_ONCE(*(__u64 *)nh) : 0;

	if (unlikely(!(word << 16))) {
		struct hop found; /* so that `hop` itself can stay in registers */

		if (!fib_hop(ctx, b, ip_len, &found))
			return false;
		*hop = found;
		if (nh && nh->ifindex) {
			/* The FIB names a VLAN device, which takes no frames from a program. */
			hop->ifindex = nh->ifindex;
			hop->tags = nh->tags;
		}
		return true;
	}
	set_macs(hop, word, *(__u64 *)nh->smac);
	hop->mtu = word >> 48;
	hop->ifindex = nh->ifindex;
	hop->tags = nh->tags;
	step_hop(hop);
	return true;
}

static __always_inline struct verdict send(struct xdp_md *ctx, const struct packet *pkt,
					   const struct hop *hop)
{
	if (unlikely(hop->tags) && !tag(ctx, pkt, hop->tags))
		return verdict(XDP_DROP, REASON_DROP_NO_HEADROOM);
	/* XDP_TX from a bond leaves by the part that the bond chooses. */
	return verdict(hop->ifindex == came_in_by(ctx) ? XDP_TX : bpf_redirect(hop->ifindex, 0),
		       REASON_SENT_TO_BACKEND);
}

static __always_inline __u32 outer_size(const struct backend_val *b)
{
	return b->flags & BACKEND_IPV6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
}

static __always_inline struct verdict send_l2(struct xdp_md *ctx, const struct packet *pkt,
					      const struct hop *hop)
{
	void *frame;

	if (unlikely(pkt->ip_len > hop->mtu))
		return too_big(ctx, pkt, hop->mtu);
	if (!decrement_ttl(ctx, pkt->ipv6))
		return verdict(XDP_DROP, REASON_DROP_TTL_EXPIRED);
	frame = at(ctx, 0);
	if (frame + ETH_HLEN > end(ctx))
		return verdict(XDP_DROP, REASON_DROP_BAD_TABLE); /* parsed before: cannot be */
	write_macs(frame, hop);
	return send(ctx, pkt, hop);
}

/* A word of an address in `config`, read as volatile as it is declared: through a plain pointer
 * the compiler takes it for the zero it is initialised with. */
static __always_inline __be32 source_word(const volatile __u8 *addr, int word)
{
	return ((const volatile __be32 *)addr)[word];
}

static __always_inline __u8 ipip_proto(const struct packet *pkt)
{
	return pkt->ipv6 ? IPPROTO_IPV6 : IPPROTO_IPIP;
}

/* DSCP and ECN go on the outer header too (RFC 6040, normal mode). `between` are the bytes of headers
 * of `proto` before the packet. */
static __always_inline void write_outer4(struct iphdr *ip, const struct packet *pkt,
					 const struct backend_val *b, __u8 proto, __u32 between)
{
	__u32 *words = (__u32 *)ip;
	__u32 len = sizeof(*ip) + between + pkt->ip_len;
	__u32 first = 0x45 | (__u32)pkt->tos << 8 | (__u32)bpf_htons(len) << 16;
	__u32 second = bpf_htonl(IP_DF);
	__u32 third = OUTER_TTL | (__u32)proto << 8;
	__u32 saddr =
		source_word(config.ipip_saddr4, 3) | bpf_htonl(pkt->hash & config.ipip_spread4);
	__u32 daddr = ipv4_of(b->addr);

	words[0] = first;
	words[1] = second;
	words[2] = third | (__u32)csum_fold((__u64)first + second + third + saddr + daddr) << 16;
	words[3] = saddr;
	words[4] = daddr;
}

static __always_inline void write_outer6(struct ipv6hdr *ip, const struct packet *pkt,
					 const struct backend_val *b, __u8 proto, __u32 between)
{
	__be32 *word = (__be32 *)ip;

	word[0] = bpf_htonl(6U << 28 | (__u32)pkt->tos << 20 | (pkt->hash & 0xfffff));
	ip->payload_len = bpf_htons(between + pkt->ip_len);
	ip->nexthdr = proto;
	ip->hop_limit = OUTER_TTL;
	for (int i = 0; i < 4; i++)
		ip->saddr.in6_u.u6_addr32[i] = source_word(config.ipip_saddr6, i);
	ip->saddr.in6_u.u6_addr32[3] |= bpf_htonl(pkt->hash & config.ipip_spread6);
	__builtin_memcpy(&ip->daddr, b->addr, 16);
}

/* RFC 2003, 5.1: a packet that may be fragmented is wrapped without DF. A program cannot make two
 * frames of one, but the stack can, on the way to the backend. */
static __noinline bool wrap_for_stack(struct xdp_md *ctx, const struct packet *pkt,
				      const struct backend_val *b)
{
	struct ethhdr *from, *eth;
	struct iphdr *ip;

	if (bpf_xdp_adjust_head(ctx, -(int)sizeof(*ip)))
		return false;
	eth = at(ctx, 0);
	from = at(ctx, sizeof(*ip));
	ip = (void *)(eth + 1);
	if ((void *)(from + 1) > end(ctx))
		return false;
	*eth = *from;
	write_outer4(ip, pkt, b, ipip_proto(pkt), 0);
	/* Two that share an identifier within some seconds may be mixed up; chance is the best
	 * that there is without a counter for each backend. */
	ip->id = bpf_get_prandom_u32();
	ip->frag_off = 0;
	ip->check = 0;
	ip->check = csum_fold(csum_add(0, ip, sizeof(*ip) / 4));
	return true;
}

/* Returns a verdict's word. */
static __noinline __u64 outer_too_big(struct xdp_md *ctx, const struct packet *pkt,
				      const struct backend_val *b, __u32 mtu)
{
	if (pkt->ipv6 || b->flags & BACKEND_IPV6 || !may_fragment(ctx))
		return word_of(too_big(ctx, pkt, mtu));
	if (!wrap_for_stack(ctx, pkt, b))
		return word_of(verdict(XDP_DROP, REASON_DROP_NO_HEADROOM));
	return word_of(verdict(XDP_PASS, REASON_PASS_TO_FRAGMENT));
}

static __always_inline struct verdict send_ipip(struct xdp_md *ctx, const struct packet *pkt,
						const struct backend_val *b, const struct hop *hop)
{
	bool outer6 = b->flags & BACKEND_IPV6;
	__u32 outer = outer_size(b);
	struct ethhdr *eth;

	if (unlikely(pkt->ip_len + outer > hop->mtu))
		return verdict_of(outer_too_big(ctx, pkt, b, hop->mtu - outer));
	if (outer6) {
		if (bpf_xdp_adjust_head(ctx, -(int)sizeof(struct ipv6hdr)))
			return verdict(XDP_DROP, REASON_DROP_NO_HEADROOM);
		eth = at(ctx, 0);
		if ((void *)(eth + 1) + sizeof(struct ipv6hdr) > end(ctx))
			return verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
		write_outer6((void *)(eth + 1), pkt, b, ipip_proto(pkt), 0);
		eth->h_proto = bpf_htons(ETH_P_IPV6);
	} else {
		if (bpf_xdp_adjust_head(ctx, -(int)sizeof(struct iphdr)))
			return verdict(XDP_DROP, REASON_DROP_NO_HEADROOM);
		eth = at(ctx, 0);
		if ((void *)(eth + 1) + sizeof(struct iphdr) > end(ctx))
			return verdict(XDP_DROP, REASON_DROP_BAD_TABLE);
		write_outer4((void *)(eth + 1), pkt, b, ipip_proto(pkt), 0);
		eth->h_proto = bpf_htons(ETH_P_IP);
	}
	write_macs(eth, hop);
	return send(ctx, pkt, hop);
}

#endif
