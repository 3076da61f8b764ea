/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A frame's bytes and the fields of IP headers: what any program needs, whatever its maps. */
#ifndef SHUNT_PACKET_H
#define SHUNT_PACKET_H

#include <stdbool.h>
#include <stddef.h>
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#include "likely.h"

#define IP_MF	  0x2000
#define IP_DF	  0x4000
#define IP_OFFSET 0x1fff

#define IPV6_MF	    0x0001
#define IPV6_OFFSET 0xfff8

/* What every link carries (RFC 791, RFC 8200). */
#define IPV4_MTU_MIN 68
#define IPV6_MTU_MIN 1280

#define NEXTHDR_HOP	 0
#define NEXTHDR_ROUTING	 43
#define NEXTHDR_FRAGMENT 44
#define NEXTHDR_DEST	 60

#define AF_INET	 2
#define AF_INET6 10

/* What the programs of an object are given. One for TC says __sk_buff before it includes anything. */
#ifndef CONTEXT
#define CONTEXT xdp_md
#endif

#define AT_TC _Generic((struct CONTEXT *)NULL, struct xdp_md *: false, struct __sk_buff *: true)

/* In a large function clang computes the address of a field once, which the verifier does not take
 * ("dereference of modified ctx ptr"). */
#define keep_whole(ctx)                   \
	do {                              \
		if (AT_TC)                \
			barrier_var(ctx); \
	} while (0)

static __always_inline void *at(struct CONTEXT *ctx, __u32 offset)
{
	keep_whole(ctx);
	return (void *)(long)ctx->data + offset;
}

static __always_inline void *end(struct CONTEXT *ctx)
{
	keep_whole(ctx);
	return (void *)(long)ctx->data_end;
}

/* The same for an offset that has to have a bound: NULL beyond `most`. 6.1 forgets the bound of a copied
 * register ("R1 offset is outside of the packet"): the barriers keep the compared one in use. */
static __always_inline void *at_most(struct CONTEXT *ctx, __u32 offset, __u32 most)
{
	barrier_var(offset);
	if (offset > most)
		return NULL;
	barrier_var(offset);
	return at(ctx, offset);
}

/* TC: so many bytes of a frame, or all it has, are put into its first piece, where they can be read. */
static __always_inline void pull(struct __sk_buff *ctx, __u32 bytes)
{
	__u32 seen = ctx->data_end - ctx->data, want = ctx->len;

	if (want > bytes)
		want = bytes;
	if (seen < want)
		bpf_skb_pull_data(ctx, want);
}

/* EtherType of a frame whose header is there: one load, where the header's declaration would be
 * read byte by byte. */
static __always_inline __be16 eth_type(const void *frame)
{
	return *(const __be16 *)(frame + 2 * ETH_ALEN);
}

/* A frame's length; `seen` is what lies between data and data_end, for XDP all of it. */
#define frame_len(ctx, seen) \
	_Generic((ctx), struct xdp_md *: xdp_len, struct __sk_buff *: skb_len)(ctx, seen)
#define load_frame(ctx, offset, to, bytes)           \
	_Generic((ctx),                              \
		struct xdp_md *: bpf_xdp_load_bytes, \
		struct __sk_buff *: bpf_skb_load_bytes)(ctx, offset, to, bytes)

static __always_inline __u32 xdp_len(struct xdp_md *ctx, __u32 seen)
{
	(void)ctx;
	return seen;
}

static __always_inline __u32 skb_len(struct __sk_buff *ctx, __u32 seen)
{
	(void)seen;
	return ctx->len;
}

/* In words of eight bytes, as the address is read later: a load that spans two fresh stores waits
 * for both. Little-endian. */
static __always_inline void map_ipv4(__u8 *to, __be32 addr)
{
	__u64 *half = (__u64 *)to;

	half[0] = 0;
	half[1] = (__u64)addr << 32 | 0xffff0000;
}

static __always_inline bool is_mapped(const __u8 *addr)
{
	const __u64 *half = (const __u64 *)addr;

	return !half[0] && (__u32)half[1] == 0xffff0000; /* little-endian */
}

static __always_inline __be32 ipv4_of(const __u8 *mapped)
{
	return *(const __be32 *)(mapped + 12);
}

#endif
