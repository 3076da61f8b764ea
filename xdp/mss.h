/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* The MSS that a SYN-ACK announces, made small enough. */
#ifndef SHUNT_MSS_H
#define SHUNT_MSS_H

#include "inner.h"

#define TCP_OPTIONS_MAX 40 /* bytes */
#define OPTION_END	0
#define OPTION_NOP	1
#define OPTION_MSS	2
#define MSS_BYTES	4
#define MSS_MIN		48 /* Linux takes a smaller one for this */

struct walk {
	__u8 options[64];
	__u32 at;
	__u32 len;
};

/* One option on; 1: there it is, or nothing is. */
static long next_option(__u32 turn, void *context)
{
	struct walk *w = context;
	__u32 here = w->at;
	__u8 kind, size;

	(void)turn;
	if (here + MSS_BYTES > w->len)
		return 1;
	kind = w->options[here & 63];
	size = w->options[(here + 1) & 63];
	if (kind == OPTION_END)
		w->len = 0;
	if (kind == OPTION_END || kind == OPTION_MSS)
		return 1;
	w->at = here + (kind == OPTION_NOP ? 1 : size < 2 ? 2 : size);
	return 0;
}

/* Where in the frame the MSS stands; 0: nowhere. */
static __noinline __u32 find_mss(struct __sk_buff *ctx, const struct inner *in, __u16 *mss)
{
	struct tcphdr *tcp = at_most(ctx, in->l4, MAX_L4_OFFSET);
	__u32 offset = in->l4 + sizeof(*tcp), len, here;
	struct walk w = {};

	if (!tcp || (void *)(tcp + 1) > end(ctx))
		return 0;
	len = tcp->doff * 4 - sizeof(*tcp);
	barrier_var(len);
	if (len < MSS_BYTES || len > TCP_OPTIONS_MAX ||
	    bpf_skb_load_bytes(ctx, offset, w.options, len))
		return 0;
	w.len = len;
	bpf_loop(TCP_OPTIONS_MAX, next_option, &w, 0);
	here = w.at;
	if (here + MSS_BYTES > w.len)
		return 0;
	*mss = w.options[(here + 2) & 63] << 8 | w.options[(here + 3) & 63];
	return offset + here + 2;
}

/* As words have it: the sum is of those, and an option may begin in the middle of one. */
static __always_inline __be16 summed(__u16 mss, __u32 offset)
{
	return offset & 1 ? mss : bpf_htons(mss);
}

/* Room for what the client's packets get around them, on the link that they come in by. */
static __noinline bool clamp(struct __sk_buff *ctx, const struct inner *in, __u32 outer_bytes)
{
	__u32 headers = (in->ipv6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr)) +
			sizeof(struct tcphdr) + outer_bytes;
	__u32 check = in->l4 + offsetof(struct tcphdr, check), mtu = 0, offset;
	__u16 mss = 0, may;
	__be16 on_wire;

	offset = find_mss(ctx, in, &mss);
	bpf_check_mtu(ctx, 0, &mtu, 0, 0);
	if (!offset || mtu < headers + MSS_MIN || mss <= mtu - headers)
		return false;
	may = mtu - headers;
	on_wire = bpf_htons(may);
	return !bpf_l4_csum_replace(ctx, check, summed(mss, offset), summed(may, offset),
				    sizeof(may)) &&
	       !bpf_skb_store_bytes(ctx, offset, &on_wire, sizeof(on_wire), 0);
}

#endif
