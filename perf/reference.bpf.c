/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What shunt_lb is measured beside, over IPv4 and TCP:
 *
 *   ref_nothing  sends the packet back as it is: the wrapper's own cost
 *   ref_rewrite  parses, rewrites MACs, TTL and checksum: about the least a forwarder can do
 *   ref_lru      the same, and a balancer's least: one look-up of the flow in an LRU hash, which
 *                holds the backend; a miss inserts; encapsulation in IPv4. No services, no backend
 *                records, no counters, and the shortest key there can be.
 *   ref_lru_full what such balancers do for a packet in practice: a look-up of the service, one of
 *                the flow (under a key for both families, as shunt_lb's), the backend's record, and
 *                a counter of the service and of the backend
 */
#include <stdbool.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/tcp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "checksum.h"
#include "packet.h"

#define BACKENDS 10 /* a service */

struct short_key {
	__be32 saddr;
	__be32 daddr;
	__be16 sport;
	__be16 dport;
	__u32 proto;
};

struct long_key {
	__u8 saddr[16];
	__u8 daddr[16];
	__be16 sport;
	__be16 dport;
	__u32 proto;
};

struct ref_svc_key {
	__u8 vip[16];
	__be16 port;
	__u16 proto;
};

struct ref_backend {
	__be32 addr;
	__u8 macs[12];
};

struct ref_count {
	__u64 packets;
	__u64 bytes;
};

#define LRU_MAP(NAME, KEY)                           \
	struct {                                     \
		__uint(type, BPF_MAP_TYPE_LRU_HASH); \
		__uint(max_entries, 1024);           \
		__type(key, KEY);                    \
		__type(value, __u32);                \
	} NAME SEC(".maps")

#define REF_ARRAY(NAME, TYPE, VALUE)       \
	struct {                           \
		__uint(type, TYPE);        \
		__uint(max_entries, 1024); \
		__type(key, __u32);        \
		__type(value, VALUE);      \
	} NAME SEC(".maps")

LRU_MAP(ref_flows, struct short_key);
LRU_MAP(ref_flows_long, struct long_key);
REF_ARRAY(ref_backends, BPF_MAP_TYPE_ARRAY, struct ref_backend);
REF_ARRAY(ref_svc_count, BPF_MAP_TYPE_PERCPU_ARRAY, struct ref_count);
REF_ARRAY(ref_bck_count, BPF_MAP_TYPE_PERCPU_ARRAY, struct ref_count);

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, struct ref_svc_key);
	__type(value, __u32);
} ref_services SEC(".maps");

static __always_inline struct iphdr *ipv4_tcp(struct xdp_md *ctx)
{
	struct ethhdr *eth = at(ctx, 0);
	struct iphdr *ip = (void *)(eth + 1);

	if ((void *)(ip + 1) + sizeof(struct tcphdr) > end(ctx) ||
	    eth->h_proto != bpf_htons(ETH_P_IP) || ip->ihl != 5 || ip->protocol != IPPROTO_TCP ||
	    ip->frag_off & bpf_htons(0x3fff))
		return NULL;
	return ip;
}

/* A stand-in for a consistent hash; runs only on a miss. */
static __always_inline __u32 choose(__be32 addr, __be16 port)
{
	return (addr * 0x9e3779b1U ^ port * 0x85ebca6bU) % BACKENDS;
}

static __always_inline int encapsulate(struct xdp_md *ctx, __be32 addr, const __u8 *macs)
{
	struct iphdr *inner = at(ctx, ETH_HLEN), *outer;
	const __u32 second = bpf_htonl(0x4000), third = 64 | IPPROTO_IPIP << 8;
	const __be32 saddr = bpf_htonl(0xc6120001);
	struct ethhdr *eth;
	__be32 *word;
	__u32 first;

	if ((void *)(inner + 1) > end(ctx))
		return XDP_ABORTED;
	first = 0x45 | (__u32)inner->tos << 8 |
		(__u32)bpf_htons(bpf_ntohs(inner->tot_len) + sizeof(*outer)) << 16;
	if (bpf_xdp_adjust_head(ctx, -(int)sizeof(*outer)))
		return XDP_ABORTED;
	eth = at(ctx, 0);
	outer = (void *)(eth + 1);
	if ((void *)(outer + 1) > end(ctx))
		return XDP_ABORTED;
	__builtin_memcpy(eth, macs, 12);
	eth->h_proto = bpf_htons(ETH_P_IP);
	/* From words in registers, as the wrapper's. */
	word = (__be32 *)outer;
	word[0] = first;
	word[1] = second;
	word[2] = third | (__u32)csum_fold((__u64)first + second + third + saddr + addr) << 16;
	word[3] = saddr;
	word[4] = addr;
	return XDP_TX;
}

SEC("xdp")
int ref_nothing(struct xdp_md *ctx)
{
	(void)ctx;
	return XDP_TX;
}

SEC("xdp")
int ref_rewrite(struct xdp_md *ctx)
{
	static const __u8 macs[12] = {2, 0, 0, 0, 0, 3, 2, 0, 0, 0, 0, 1};
	struct iphdr *ip = ipv4_tcp(ctx);

	if (!ip)
		return XDP_PASS;
	ip->ttl--;
	ip->check = csum_fold((__u64)(__u16)~ip->check + (__u16)~bpf_htons(0x0100));
	__builtin_memcpy((void *)ip - ETH_HLEN, macs, sizeof(macs));
	return XDP_TX;
}

SEC("xdp")
int ref_lru(struct xdp_md *ctx)
{
	static const __u8 macs[12] = {2, 0, 0, 0, 0, 3, 2, 0, 0, 0, 0, 1};
	struct iphdr *ip = ipv4_tcp(ctx);
	struct tcphdr *tcp = (void *)(ip + 1);
	struct short_key key;
	__be32 *found, addr;

	if (!ip)
		return XDP_PASS;
	key = (struct short_key){ip->saddr, ip->daddr, tcp->source, tcp->dest, IPPROTO_TCP};
	found = bpf_map_lookup_elem(&ref_flows, &key);
	if (found) {
		addr = *found;
	} else {
		addr = bpf_htonl(0xac100000 | choose(key.saddr, key.sport));
		bpf_map_update_elem(&ref_flows, &key, &addr, BPF_ANY);
	}
	return encapsulate(ctx, addr, macs);
}

static __always_inline void add(void *map, __u32 index, __u32 bytes)
{
	struct ref_count *n = bpf_map_lookup_elem(map, &index);

	if (n) {
		n->packets++;
		n->bytes += bytes;
	}
}

SEC("xdp")
int ref_lru_full(struct xdp_md *ctx)
{
	struct iphdr *ip = ipv4_tcp(ctx);
	struct tcphdr *tcp = (void *)(ip + 1);
	struct ref_svc_key svc_key = {};
	struct long_key key = {};
	__u32 *svc, *found, id, bytes = ctx->data_end - ctx->data;
	struct ref_backend *b;

	if (!ip)
		return XDP_PASS;
	__builtin_memcpy(key.saddr + 12, &ip->saddr, 4);
	__builtin_memcpy(key.daddr + 12, &ip->daddr, 4);
	key.sport = tcp->source;
	key.dport = tcp->dest;
	key.proto = IPPROTO_TCP;
	__builtin_memcpy(svc_key.vip, key.daddr, 16);
	svc_key.port = key.dport;
	svc_key.proto = IPPROTO_TCP;
	svc = bpf_map_lookup_elem(&ref_services, &svc_key);
	if (!svc)
		return XDP_PASS;
	found = bpf_map_lookup_elem(&ref_flows_long, &key);
	if (found) {
		id = *found;
	} else {
		id = *svc * BACKENDS + choose(ip->saddr, key.sport);
		bpf_map_update_elem(&ref_flows_long, &key, &id, BPF_ANY);
	}
	b = bpf_map_lookup_elem(&ref_backends, &id);
	if (!b)
		return XDP_DROP;
	add(&ref_svc_count, *svc, bytes);
	add(&ref_bck_count, id, bytes);
	return encapsulate(ctx, b->addr, b->macs);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
