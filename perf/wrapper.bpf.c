/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Traffic for a program under test. BPF_PROG_TEST_RUN repeats a program on what the last
 * repetition left of the packet; so each repetition begins here: the frame gets its length and all
 * its headers back, those of the next flow, and then the program is tail-called.
 *
 * What this costs is measured by tail-calling a program that does nothing. It does the same work
 * whatever the program did to the frame before, adjusting the head by nothing included. Fields are
 * stored in the widths in which programs load them: a load that spans two fresh stores would stall,
 * which no packet from a network card does.
 */
#include <stdbool.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "checksum.h"
#include "packet.h"

#define PAYLOAD	   10 /* of zeros: a 64-byte frame over IPv4 */
#define FIRST_PORT 0x8000

struct traffic {
	__u64 state;	   /* of the generator; in order: the next flow */
	__u32 last_flow;   /* number of flows less one; they are a power of two */
	__u32 services;	   /* each flow belongs to one */
	__u32 source4;	   /* the first client, host order; a /8 of them */
	__u32 vip4;	   /* the first service, host order; a /16 of them */
	__be32 source6[3]; /* the last four bytes are as above, less the prefix */
	__be32 vip6[3];
	__be16 port;
	__u8 tcp_flags;
	__u8 in_order; /* flow after flow, not at random */
};

struct traffic traffic;

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} target SEC(".maps");

struct tuple {
	__u32 host;    /* 24 bits */
	__u32 service; /* 16 bits */
	__be16 sport;
};

/* Marsaglia's xorshift64: the same flows in the same order for all that start alike. */
static __always_inline __u32 next_flow(void)
{
	__u64 x = traffic.state;

	if (traffic.in_order) {
		traffic.state = x + 1;
	} else {
		x ^= x << 13;
		x ^= x >> 7;
		x ^= x << 17;
		traffic.state = x;
	}
	return (__u32)x & traffic.last_flow;
}

/* Odd multiplications are bijections: no two flows share a tuple. */
static __always_inline struct tuple next_tuple(void)
{
	__u32 flow = next_flow(), mixed = flow * 0x9e3779b1;

	return (struct tuple){
		.host = mixed >> 8,
		.service = (__u64)(__u32)(flow * 0x85ebca6b) * traffic.services >> 32,
		.sport = bpf_htons(FIRST_PORT | (mixed & 0xff) << 6),
	};
}

static __always_inline void write_eth(struct ethhdr *eth, __be16 protocol)
{
	*eth = (struct ethhdr){
		.h_dest = {2, 0, 0, 0, 0, 1},
		.h_source = {2, 0, 0, 0, 0, 2},
		.h_proto = protocol,
	};
}

/* `sum` is that of the addresses. */
static __always_inline void write_tcp(struct tcphdr *tcp, const struct tuple *t, __u64 sum)
{
	*tcp = (struct tcphdr){
		.source = t->sport,
		.dest = traffic.port,
		.seq = bpf_htonl(1),
		.window = bpf_htons(1024),
	};
	((__be16 *)tcp)[6] = bpf_htons(5 << 12 | traffic.tcp_flags);
	sum += bpf_htons(IPPROTO_TCP) + bpf_htons(sizeof(*tcp) + PAYLOAD) + t->sport +
	       traffic.port + bpf_htons(1) + bpf_htons(1024) +
	       bpf_htons(5 << 12 | traffic.tcp_flags);
	tcp->check = csum_fold(sum);
}

/* From words in registers: the checksum of a header that was just stored in parts would wait
 * for the stores. */
static __always_inline void write_ipv4(struct iphdr *ip, __u16 bytes, __be32 saddr, __be32 daddr)
{
	const __u32 first = 0x45 | (__u32)bpf_htons(bytes) << 16;
	const __u32 second = bpf_htonl(0x4000); /* don't fragment */
	const __u32 third = 64 | IPPROTO_TCP << 8;
	__be32 *word = (__be32 *)ip;

	word[0] = first;
	word[1] = second;
	word[2] = third | (__u32)csum_fold((__u64)first + second + third + saddr + daddr) << 16;
	word[3] = saddr;
	word[4] = daddr;
}

SEC("xdp")
int wrap_ipv4(struct xdp_md *ctx)
{
	const int bytes = ETH_HLEN + sizeof(struct iphdr) + sizeof(struct tcphdr) + PAYLOAD;
	struct tuple t = next_tuple();
	struct ethhdr *eth;
	struct iphdr *ip;

	if (bpf_xdp_adjust_head(ctx, (int)(ctx->data_end - ctx->data) - bytes))
		return XDP_ABORTED;
	eth = at(ctx, 0);
	if ((void *)eth + bytes > end(ctx))
		return XDP_ABORTED;
	write_eth(eth, bpf_htons(ETH_P_IP));
	ip = (void *)(eth + 1);
	write_ipv4(ip, bytes - ETH_HLEN, bpf_htonl(traffic.source4 + t.host),
		   bpf_htonl(traffic.vip4 + t.service));
	write_tcp((void *)(ip + 1), &t, (__u64)ip->saddr + ip->daddr);
	bpf_tail_call(ctx, &target, 0);
	return XDP_ABORTED;
}

SEC("xdp")
int wrap_ipv6(struct xdp_md *ctx)
{
	const int bytes = ETH_HLEN + sizeof(struct ipv6hdr) + sizeof(struct tcphdr) + PAYLOAD;
	struct tuple t = next_tuple();
	struct ethhdr *eth;
	struct ipv6hdr *ip;
	__be32 *word;

	if (bpf_xdp_adjust_head(ctx, (int)(ctx->data_end - ctx->data) - bytes))
		return XDP_ABORTED;
	eth = at(ctx, 0);
	if ((void *)eth + bytes > end(ctx))
		return XDP_ABORTED;
	write_eth(eth, bpf_htons(ETH_P_IPV6));
	ip = (void *)(eth + 1);
	word = (__be32 *)ip;
	word[0] = bpf_htonl(6U << 28);
	ip->payload_len = bpf_htons(sizeof(struct tcphdr) + PAYLOAD);
	ip->nexthdr = IPPROTO_TCP;
	ip->hop_limit = 64;
	for (int i = 0; i < 3; i++) {
		ip->saddr.in6_u.u6_addr32[i] = traffic.source6[i];
		ip->daddr.in6_u.u6_addr32[i] = traffic.vip6[i];
	}
	ip->saddr.in6_u.u6_addr32[3] = bpf_htonl(t.host);
	ip->daddr.in6_u.u6_addr32[3] = bpf_htonl(t.service);
	write_tcp((void *)(ip + 1), &t, csum_add(0, &ip->saddr, 8));
	bpf_tail_call(ctx, &target, 0);
	return XDP_ABORTED;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
