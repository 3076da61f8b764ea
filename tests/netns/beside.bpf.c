/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* TC programs that count, for tests of attaching: ours by their names, and somebody else's. */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#define TC_ACT_UNSPEC (-1)

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 5);
	__type(key, __u32);
	__type(value, __u64);
} seen SEC(".maps");

static __always_inline int count(__u32 who)
{
	__u64 *n = bpf_map_lookup_elem(&seen, &who);

	if (n)
		__sync_fetch_and_add(n, 1);
	return TC_ACT_UNSPEC;
}

SEC("tc")
int shunt_ingress(void)
{
	return count(0);
}

SEC("tc")
int shunt_egress(void)
{
	return count(1);
}

SEC("tc")
int foreign_before(void)
{
	return count(2);
}

SEC("tc")
int foreign_after(void)
{
	return count(3);
}

/* Another version of shunt_ingress. */
SEC("tc")
int shunt_next(void)
{
	return count(4);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
