/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* Not a hook but an XDP program, which would have the packet itself. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

SEC("xdp")
int hook(struct xdp_md *ctx)
{
	__u8 *frame = (void *)(long)ctx->data;

	if ((void *)(frame + 1) <= (void *)(long)ctx->data_end)
		frame[0] = 1;
	return XDP_TX;
}
