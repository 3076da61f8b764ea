/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A driver that leaves little room before the frame: uses the room up, then calls the program
 * under test. For frames of exactly FRAME bytes. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#define FRAME 128
/* Of the 256 bytes that a test run gives, struct xdp_frame takes 40 (6.1 and 6.18). */
#define TAKEN 204

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} next SEC(".maps");

SEC("xdp")
int shunt_headroom(struct xdp_md *ctx)
{
	__u8 frame[FRAME];

	if (bpf_xdp_load_bytes(ctx, 0, frame, FRAME) || bpf_xdp_adjust_head(ctx, -TAKEN) ||
	    bpf_xdp_store_bytes(ctx, 0, frame, FRAME) || bpf_xdp_adjust_tail(ctx, -TAKEN))
		return XDP_ABORTED;
	bpf_tail_call(ctx, &next, 0);
	return XDP_ABORTED;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
