/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A program that runs for long, and says while it does. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "memory.h"

__u32 running;
__u32 turns; /* thousands of them; at most 2^23 in all */

static long turn(__u32 n, void *ctx)
{
	(void)n;
	(void)ctx;
	return 0;
}

SEC("xdp")
int shunt_long_run(struct xdp_md *ctx)
{
	(void)ctx;
	WRITE_ONCE(running, 1);
	bpf_loop(READ_ONCE(turns) * 1000, turn, (void *)0, 0);
	WRITE_ONCE(running, 0);
	return XDP_PASS;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
