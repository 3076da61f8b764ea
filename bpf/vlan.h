/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * VLAN tags in frames (802.1Q, 802.1ad; one or two). They are taken off before anything looks at the
 * frame, and put back if it is passed or answered. What is sent on gets the tags of its next hop.
 *
 * Tags in tables are 16 bits each, the outer one of two in the upper half; 0 is no tag:
 *   bits  0..11  the VLAN's number
 *   bit  12      802.1ad
 *   bits 13..15  the priority, which no table holds
 */
#ifndef SHUNT_VLAN_H
#define SHUNT_VLAN_H

#include "parse.h"

#define TAGS_MAX       2
#define TAG_BYTES      4
#define TAG_PROVIDER   0x1000
#define TAG_NUMBER     0x0fff
#define TAG_PRIORITY   0xe000
#define ETH_P_8021Q_N  bpf_htons(ETH_P_8021Q)
#define ETH_P_8021AD_N bpf_htons(ETH_P_8021AD)

static __always_inline bool is_tag(__be16 type)
{
	return type == ETH_P_8021Q_N || type == ETH_P_8021AD_N;
}

/* IP is asked for first: most frames are neither tagged nor anything else. */
static __always_inline bool is_tagged(void *from, void *to)
{
	return from + ETH_HLEN <= to && eth_type(from) != bpf_htons(ETH_P_IP) &&
	       is_tag(eth_type(from));
}

/* A tag as tables hold it, from one as it stands in a frame. Little-endian. */
static __always_inline __u32 tag_of(__u32 raw)
{
	__u16 tci = bpf_ntohs(raw >> 16);

	return (tci & (TAG_NUMBER | TAG_PRIORITY)) |
	       ((__be16)raw == ETH_P_8021AD_N ? TAG_PROVIDER : 0);
}

static __always_inline __u32 raw_of(__u32 tag)
{
	__u16 tci = tag & (TAG_NUMBER | TAG_PRIORITY);

	return (tag & TAG_PROVIDER ? ETH_P_8021AD_N : ETH_P_8021Q_N) | (__u32)bpf_htons(tci) << 16;
}

/* Takes the tags off. */
__noinline int untag(struct xdp_md *ctx, struct packet *pkt)
{
	__u32 *words = at(ctx, 0);
	__u32 bytes = TAG_BYTES, low, mid, high;

	if (!pkt || (void *)(words + 5) + 2 > end(ctx) || !is_tag(words[3]))
		return 0;
	pkt->tag[0] = words[3];
	if (is_tag(words[4])) {
		pkt->tag[1] = words[4];
		bytes = 2 * TAG_BYTES;
	}
	low = words[0];
	mid = words[1];
	high = words[2];
	if (bytes == TAG_BYTES) {
		words[1] = low;
		words[2] = mid;
		words[3] = high;
	} else {
		words[2] = low;
		words[3] = mid;
		words[4] = high;
	}
	return !bpf_xdp_adjust_head(ctx, (int)bytes);
}

/* Puts one or two tags on, as they stand in a frame; the second may be 0. */
static __always_inline bool put_tags(struct xdp_md *ctx, __u32 first, __u32 second)
{
	__u32 low, mid, high, *words;

	if (bpf_xdp_adjust_head(ctx, second ? -2 * TAG_BYTES : -TAG_BYTES))
		return false;
	words = at(ctx, 0);
	if ((void *)(words + 5) > end(ctx))
		return false;
	if (second) {
		low = words[2];
		mid = words[3];
		high = words[4];
		words[4] = second;
	} else {
		low = words[1];
		mid = words[2];
		high = words[3];
	}
	words[0] = low;
	words[1] = mid;
	words[2] = high;
	words[3] = first;
	return true;
}

/* What a packet came with, as tables hold it. */
static __always_inline __u32 tags_of(const struct packet *pkt)
{
	__u32 first = tag_of(pkt->tag[0]) & ~TAG_PRIORITY;

	if (!pkt->tag[0])
		return 0;
	return pkt->tag[1] ? first << 16 | (tag_of(pkt->tag[1]) & ~TAG_PRIORITY) : first;
}

/* Tags of a next hop, with the priority the packet came with. */
__noinline int tag(struct xdp_md *ctx, const struct packet *pkt, __u32 tags)
{
	__u32 priority, outer = tags >> 16, inner = tags & 0xffff;

	if (!pkt)
		return 0;
	priority = tag_of(pkt->tag[0]) & TAG_PRIORITY;
	if (outer)
		return put_tags(ctx, raw_of(outer | priority), raw_of(inner | priority));
	return put_tags(ctx, raw_of(inner | priority), 0);
}

/* A frame that goes to this host's stack, or back where it came from, has the tags it came with. */
__noinline int tag_again(struct xdp_md *ctx, const struct packet *pkt)
{
	return pkt && put_tags(ctx, pkt->tag[0], pkt->tag[1]);
}

static __always_inline struct verdict retag(struct xdp_md *ctx, const struct packet *pkt,
					    struct verdict v)
{
	/* What was taken off fits in again, unless an outer header or an answer has taken its
	 * place. */
	if (v.action != XDP_DROP && !sent_on(v.reason) && !tag_again(ctx, pkt)) {
		v.action = XDP_DROP;
		v.reason = REASON_DROP_NO_HEADROOM;
	}
	return v;
}

#endif
