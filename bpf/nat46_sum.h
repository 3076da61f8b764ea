/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* XDP, from IPv4 to IPv6: a checksum for a UDP datagram that had none, as IPv6 wants one. */
#ifndef SHUNT_NAT46_SUM_H
#define SHUNT_NAT46_SUM_H

#include "nat_pair.h"
#include "send.h"

#define CHUNKS_MAX 40

static __always_inline __u32 payload_of(const struct packet *pkt)
{
	return ETH_HLEN + pkt->ip_len - pkt->l4;
}

/* What is left of a datagram to sum up. */
struct summing {
	struct xdp_md *ctx;
	struct nat_scratch *scratch;
	__u64 sum;
	__u32 offset, left;
};

/* One piece, for bpf_loop(): a loop of the program's own would be verified turn by turn, and was four fifths of
 * all that the verifier had to do. 1 ends it. */
static long sum_piece(__u32 turn, struct summing *w)
{
	__u8 *bytes = w->scratch->bytes;
	__u32 some = w->left - 1;

	(void)turn;
	if (!w->left)
		return 1;
	if (some < SCRATCH_BYTES - 1)
		__builtin_memset(bytes, 0, SCRATCH_BYTES);
	else
		some = SCRATCH_BYTES - 1;
	/* 6.1 learns nothing from a comparison with 0. */
	barrier_var(some);
	some = (some & (SCRATCH_BYTES - 1)) + 1;
	if (bpf_xdp_load_bytes(w->ctx, w->offset, bytes, some))
		return 1;
	w->sum += (__u32)bpf_csum_diff(NULL, 0, (__be32 *)bytes, SCRATCH_BYTES, 0);
	w->offset += some;
	w->left -= some;
	return 0;
}

/* The checksum of a UDP datagram that has none, with the tuple that it has by now. */
__noinline int fill_checksum(struct xdp_md *ctx, const struct packet *pkt)
{
	struct nat_scratch *s = own_scratch();
	struct summing w = {.ctx = ctx, .scratch = s};
	struct udphdr *udp;
	__u32 len;

	if (!pkt || !s)
		return 0;
	udp = transport(ctx, pkt);
	if (!udp || (void *)(udp + 1) > end(ctx))
		return 0;
	len = bpf_ntohs(udp->len);
	if (len < sizeof(*udp) || len > payload_of(pkt))
		return 0;
	w.sum = pseudo_header(&s->to, IPPROTO_UDP, len);
	w.offset = pkt->l4;
	w.left = len;
	bpf_loop(CHUNKS_MAX, sum_piece, &w, 0);
	udp = transport(ctx, pkt);
	if (w.left || !udp || (void *)(udp + 1) > end(ctx))
		return 0;
	udp->check = csum_fold(w.sum) ?: 0xffff;
	return 1;
}

#endif
