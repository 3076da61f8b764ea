/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A frame's bytes and the fields of IP headers: what any program needs, whatever its maps. */
#ifndef SHUNT_PACKET_H
#define SHUNT_PACKET_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>

#define IP_MF	  0x2000
#define IP_DF	  0x4000
#define IP_OFFSET 0x1fff

#define IPV6_MF	    0x0001
#define IPV6_OFFSET 0xfff8

#define NEXTHDR_HOP	 0
#define NEXTHDR_ROUTING	 43
#define NEXTHDR_FRAGMENT 44
#define NEXTHDR_DEST	 60

#define AF_INET	 2
#define AF_INET6 10

static __always_inline void *at(struct xdp_md *ctx, __u32 offset)
{
	return (void *)(long)ctx->data + offset;
}

static __always_inline void *end(struct xdp_md *ctx)
{
	return (void *)(long)ctx->data_end;
}

/* In words of eight bytes, as the address is read later: a load that spans two fresh stores waits
 * for both. Little-endian. */
static __always_inline void map_ipv4(__u8 *to, __be32 addr)
{
	__u64 *half = (__u64 *)to;

	half[0] = 0;
	half[1] = (__u64)addr << 32 | 0xffff0000;
}

static __always_inline __be32 ipv4_of(const __u8 *mapped)
{
	return *(const __be32 *)(mapped + 12);
}

#endif
