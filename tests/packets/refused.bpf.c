/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A program that every verifier refuses: it uses what a look-up returned without a check. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} unchecked SEC(".maps");

SEC("xdp")
int refused(struct xdp_md *ctx)
{
	__u32 index = ctx->ingress_ifindex;
	__u64 *value = bpf_map_lookup_elem(&unchecked, &index);

	return *value;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
