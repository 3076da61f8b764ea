/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Echo requests to a VIP are answered while the agent has it in map echo, with a service. */
#ifndef SHUNT_ECHO_H
#define SHUNT_ECHO_H

#include "answer.h"
#include "look.h"

#define ICMP_ECHO_REPLY	    0
#define ICMP_ECHO_REQUEST   8
#define ICMPV6_ECHO_REQUEST 128
#define ICMPV6_ECHO_REPLY   129

/* And where its identifier stands: the packet's third 16 bits, since it begins with type, code and
 * checksum. */
#define ECHO_ID 2

/* By type and code, as they stand in the packet. */
static __always_inline bool is_echo_request(__be16 first, bool ipv6)
{
	return first == bpf_htons((ipv6 ? ICMPV6_ECHO_REQUEST : ICMP_ECHO_REQUEST) << 8);
}

static __always_inline bool is_unicast(const struct packet *pkt)
{
	const __u8 *a = pkt->key.saddr;

	if (pkt->ipv6)
		return a[0] != 0xff && !is_zero(a);
	return a[12] != 0 && a[12] != 127 && a[12] < 224;
}

/* In the frame's own bytes: only addresses, type and TTL change. */
static __always_inline bool turn_echo(struct CONTEXT *ctx, const struct packet *pkt)
{
	struct icmp_error *icmp;

	if (pkt->ipv6) {
		struct ipv6hdr *ip = at(ctx, ETH_HLEN);

		icmp = (void *)(ip + 1);
		if ((void *)(icmp + 1) > end(ctx))
			return false;
		__builtin_memcpy(&ip->saddr, pkt->key.daddr, 16);
		__builtin_memcpy(&ip->daddr, pkt->key.saddr, 16);
		ip->hop_limit = ANSWER_TTL;
		icmp->type = ICMPV6_ECHO_REPLY;
		icmp->checksum = csum_fold((__u64)(__u16)~icmp->checksum +
					   (__u16)~bpf_htons(ICMPV6_ECHO_REQUEST << 8) +
					   bpf_htons(ICMPV6_ECHO_REPLY << 8));
	} else {
		struct iphdr *ip = at(ctx, ETH_HLEN);

		icmp = (void *)(ip + 1);
		if ((void *)(icmp + 1) > end(ctx))
			return false;
		ip->saddr = ipv4_of(pkt->key.daddr);
		ip->daddr = ipv4_of(pkt->key.saddr);
		ip->ttl = ANSWER_TTL;
		ip->check = 0;
		ip->check = csum_fold(csum_add(0, ip, sizeof(*ip) / 4));
		icmp->type = ICMP_ECHO_REPLY;
		icmp->checksum = csum_fold((__u64)(__u16)~icmp->checksum +
					   (__u16)~bpf_htons(ICMP_ECHO_REQUEST << 8));
	}
	if (!swap_macs(ctx))
		return false;
	return true;
}

static __always_inline __u64 answer_echo(struct CONTEXT *ctx, const struct packet *pkt)
{
	__u32 plain = ETH_HLEN + (pkt->ipv6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr));
	struct echo_key key __attribute__((aligned(8)));
	struct verdict v = verdict(XDP_TX, REASON_SENT_ECHO_REPLY);
	struct echo_val *vip;
	__u32 svc;

	__builtin_memcpy(key.vip, pkt->key.daddr, 16);
	vip = bpf_map_lookup_elem(&echo, &key);
	svc = vip ? vip->svc & ~VIP_AT_TC : 0;
	/* Options (a route to be recorded, say) are the stack's business. */
	if (!svc || pkt->l4 != plain || !is_unicast(pkt) || !turn_echo(ctx, pkt))
		return 0;
	v.svc = svc;
	return word_of(v);
}

#endif
