/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Health checks by way of the VIP: a check's packet for a VIP, whose mark names a backend, is sent
 * to that one as clients' packets are: wrapped (dsr-ipip), or to its MAC (dsr-l2). A rule has such
 * packets routed to the loopback device, and this runs on its way out: nothing has been asked of
 * the VIP's neighbours, and no device is needed that a host may not have.
 */
#include <stdbool.h>
#include <linux/pkt_cls.h>

#include "abi.h"
#include "array_map.h"
#include "checksum.h"
#include "count.h"
#include "packet.h"

#define OUTER_TTL    64
#define TAG_PROVIDER 0x1000 /* bpf/vlan.h */
#define TAG_BITS     16

const volatile struct check_config config = {};

PERCPU_MAP(reasons, struct count, REASON_COUNT);
ARRAY_MAP(svc, struct svc_val, 1024, BPF_F_MMAPABLE);
ARRAY_MAP(backends, struct backend_val, 1024, BPF_F_MMAPABLE);
ARRAY_MAP(nexthops, struct nexthop_val, 1024, BPF_F_MMAPABLE);

static __always_inline __be32 source_word(const volatile __u8 *addr, int word)
{
	return ((const volatile __be32 *)addr)[word];
}

static __always_inline long wrap4(struct __sk_buff *skb, const struct backend_val *b, __u32 len)
{
	bool inner6 = skb->protocol == bpf_htons(ETH_P_IPV6);
	__u32 spread = bpf_htonl(bpf_get_hash_recalc(skb) & config.spread4);
	struct iphdr ip = {
		.version = 4,
		.ihl = 5,
		.ttl = OUTER_TTL,
		.protocol = inner6 ? IPPROTO_IPV6 : IPPROTO_IPIP,
		.tot_len = bpf_htons(len + sizeof(ip)),
		.frag_off = bpf_htons(IP_DF),
		.saddr = source_word(config.saddr4, 3) | spread,
		.daddr = ipv4_of(b->addr),
	};
	__be16 type = bpf_htons(ETH_P_IP);

	ip.check = csum_fold(csum_add(0, &ip, sizeof(ip) / 4));
	return bpf_skb_adjust_room(skb, sizeof(ip), BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4) ?:
		       bpf_skb_store_bytes(skb, ETH_HLEN, &ip, sizeof(ip), 0) ?:
		       bpf_skb_store_bytes(skb, offsetof(struct ethhdr, h_proto), &type,
					   sizeof(type), 0);
}

static __always_inline long wrap6(struct __sk_buff *skb, const struct backend_val *b, __u32 len)
{
	bool inner6 = skb->protocol == bpf_htons(ETH_P_IPV6);
	__u32 spread = bpf_htonl(bpf_get_hash_recalc(skb) & config.spread6);
	struct ipv6hdr ip = {
		.version = 6,
		.nexthdr = inner6 ? IPPROTO_IPV6 : IPPROTO_IPIP,
		.hop_limit = OUTER_TTL,
		.payload_len = bpf_htons(len),
	};
	__be16 type = bpf_htons(ETH_P_IPV6);

	for (int i = 0; i < 4; i++)
		ip.saddr.in6_u.u6_addr32[i] = source_word(config.saddr6, i);
	ip.saddr.in6_u.u6_addr32[3] |= spread;
	__builtin_memcpy(&ip.daddr, b->addr, 16);
	return bpf_skb_adjust_room(skb, sizeof(ip), BPF_ADJ_ROOM_MAC, BPF_F_ADJ_ROOM_ENCAP_L3_IPV6) ?:
		       bpf_skb_store_bytes(skb, ETH_HLEN, &ip, sizeof(ip), 0) ?:
		       bpf_skb_store_bytes(skb, offsetof(struct ethhdr, h_proto), &type,
					   sizeof(type), 0);
}

static __always_inline long push_tag(struct __sk_buff *skb, __u32 tag)
{
	__u16 type = tag & TAG_PROVIDER ? ETH_P_8021AD : ETH_P_8021Q;

	return tag ? bpf_skb_vlan_push(skb, bpf_htons(type), tag & ~TAG_PROVIDER) : 0;
}

static __always_inline int drop(const struct __sk_buff *skb, enum reason why)
{
	count(&reasons, why, skb->len);
	return TC_ACT_SHOT;
}

/* Dropped also where the next hop has no MAC: clients' packets do not get there either. */
static __always_inline int send(struct __sk_buff *skb, __u32 id)
{
	struct backend_val *b = bpf_map_lookup_elem(&backends, &id);
	__u32 len = skb->len - ETH_HLEN, outer = 0;
	struct nexthop_val *hop;
	struct svc_val *service;
	__u8 macs[2 * ETH_ALEN];
	__u64 word;

	if (!b || !(b->flags & BACKEND_KNOWN))
		return drop(skb, REASON_DROP_NO_BACKEND);
	service = bpf_map_lookup_elem(&svc, &b->svc);
	hop = bpf_map_lookup_elem(&nexthops, &b->nexthop);
	if (!service || !hop || (service->mode != MODE_DSR_IPIP && service->mode != MODE_DSR_L2))
		return drop(skb, REASON_DROP_BAD_TABLE);
	/* MAC and MTU change together, so they are read together. Little-endian. */
	word = *(volatile __u64 *)hop;
	if (!(word << 16))
		return drop(skb, REASON_DROP_NO_NEXTHOP);
	if (service->mode == MODE_DSR_IPIP)
		outer = b->flags & BACKEND_IPV6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr);
	if (!skb->gso_size && len + outer > word >> 48)
		return drop(skb, REASON_DROP_TOO_BIG);
	if (outer && (b->flags & BACKEND_IPV6 ? wrap6(skb, b, len) : wrap4(skb, b, len)))
		return drop(skb, REASON_DROP_NO_HEADROOM);
	__builtin_memcpy(macs, &word, ETH_ALEN);
	__builtin_memcpy(macs + ETH_ALEN, hop->smac, ETH_ALEN);
	if (bpf_skb_store_bytes(skb, 0, macs, sizeof(macs), 0) ||
	    push_tag(skb, hop->tags & 0xffff) || push_tag(skb, hop->tags >> TAG_BITS))
		return drop(skb, REASON_DROP_NO_HEADROOM);
	skb->mark = 0;
	return (int)bpf_redirect(hop->ifindex, 0);
}

SEC("tc")
int shunt_check(struct __sk_buff *skb)
{
	__u32 mark = skb->mark;

	if ((mark & ~SLOT_BACKEND_MASK) != config.mark)
		return TC_ACT_UNSPEC;
	return send(skb, mark & SLOT_BACKEND_MASK);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
