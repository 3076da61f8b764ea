/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * A flood for a program under test: one frame, each time of another client. BPF_PROG_TEST_RUN repeats
 * a program on what it left of the packet, so each repetition begins here and writes the frame anew.
 * Checksums are not those of the frame: no balancer looks at them.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "packet.h"

#define FRAME	   96
#define FIRST_PORT 0x8000

struct flood {
	__u32 number; /* of the next packet */
	/* Where the frame has what differs; 0 = nowhere. All of network order. */
	__u32 host_at;	 /* the low 24 bits of its source */
	__u32 port_at;	 /* its source port */
	__u32 id_at;	 /* 16 bits of its datagram's identifier */
	__u8 frame[128]; /* FRAME of them, and what offsets can't go beyond */
};

struct flood flood;

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(__u32));
} target SEC(".maps");

static __always_inline void put(__u32 at, __u32 value, int bytes)
{
	for (int i = 0; at && i < bytes; i++)
		flood.frame[(at + i) & 127] = value >> 8 * (bytes - 1 - i);
}

SEC("xdp")
int shunt_flood(struct xdp_md *ctx)
{
	/* Odd multiplications are bijections: no two packets share a tuple. */
	__u32 number = flood.number++, mixed = number * 0x9e3779b1;
	int more = FRAME - (int)(ctx->data_end - ctx->data);
	__u64 *words, *from = (__u64 *)flood.frame;

	/* What it was wrapped in comes off in front; what an answer left out is added behind. */
	if (more > 0 ? bpf_xdp_adjust_tail(ctx, more) : bpf_xdp_adjust_head(ctx, -more))
		return XDP_ABORTED;
	put(flood.host_at, mixed >> 8, 3);
	put(flood.port_at, FIRST_PORT | (mixed & 0xff) << 6, 2);
	put(flood.id_at, number, 2);
	words = at(ctx, 0);
	if ((void *)words + FRAME > end(ctx))
		return XDP_ABORTED;
	for (int i = 0; i < FRAME / 8; i++)
		words[i] = from[i];
	bpf_tail_call(ctx, &target, 0);
	return XDP_ABORTED;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
