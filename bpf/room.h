/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A frame made into its answer: as long as that, or with its headers before what it quotes. */
#ifndef SHUNT_ROOM_H
#define SHUNT_ROOM_H

#include "parse.h"

#define renew(ctx, len) \
	_Generic((ctx), struct xdp_md *: renew_xdp, struct __sk_buff *: renew_skb)(ctx, len)
#define make_room(ctx, headers, quote)                                                      \
	_Generic((ctx), struct xdp_md *: make_room_xdp, struct __sk_buff *: make_room_skb)( \
		ctx, headers, quote)

/* Of the frame's length; what follows its Ethernet header is to be written. */
static __always_inline bool renew_xdp(struct xdp_md *ctx, __u32 len)
{
	__u64 is = (__u64)ctx->data_end - ctx->data;

	/* clang 14 would subtract the halves of pointers (6.18: "32-bit pointer arithmetic"). */
	barrier_var(is);
	return !bpf_xdp_adjust_tail(ctx, (int)len - (int)is);
}

/* A checksum that was the device's to fill in would be filled into the answer. The kernel forgets
 * about it once so much is taken from the front that it would begin before the frame. */
#define FORGOTTEN_BYTES (MAX_L4_OFFSET + 8)

static __always_inline bool renew_skb(struct __sk_buff *ctx, __u32 len)
{
	return !bpf_skb_change_tail(ctx, len + FORGOTTEN_BYTES, 0) &&
	       !bpf_skb_adjust_room(ctx, -(int)FORGOTTEN_BYTES, BPF_ADJ_ROOM_MAC, 0);
}

/* Room for `headers` bytes before the IP header, of which, with what follows, `quote` bytes stay. */
static __always_inline bool make_room_xdp(struct xdp_md *ctx, __u32 headers, __u32 quote)
{
	struct ethhdr *from, *to;

	if (bpf_xdp_adjust_head(ctx, -(int)headers) || !renew_xdp(ctx, ETH_HLEN + headers + quote))
		return false;
	from = at((void *)ctx, headers);
	to = at((void *)ctx, 0);
	if ((void *)(from + 1) > end((void *)ctx))
		return false;
	*to = *from; /* never overlapping: `headers` is larger */
	return true;
}

static __always_inline bool make_room_skb(struct __sk_buff *ctx, __u32 headers, __u32 quote)
{
	struct nat_scratch *s = own_scratch();

	return s && quote <= QUOTE_BYTES && !bpf_skb_load_bytes(ctx, ETH_HLEN, s->quoted, quote) &&
	       renew_skb(ctx, ETH_HLEN + headers + quote) &&
	       !bpf_skb_store_bytes(ctx, ETH_HLEN + headers, s->quoted, quote, 0);
}

#endif
