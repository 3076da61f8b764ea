/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * A verdict is not a delivery: what the kernel and its drivers did not send after a program had
 * said so. They tell it by tracepoints; each loss is counted by interface, kind and error.
 *
 * Two of the tracepoints also tell of success, once for up to 16 frames: those leave at once.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include "abi.h"
#include "kernel_types.h"

struct net_device {
	int ifindex;
	possible_net_t nd_net;
} KERNEL_TYPE;

const volatile struct trace_config config;

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, LOSSES_MAX);
	__type(key, struct loss_key);
	__type(value, struct loss_val);
} losses SEC(".maps");

static __always_inline void lost(const struct net_device *dev, enum loss kind, int error,
				 __u64 frames)
{
	struct loss_key key = {.kind = kind, .error = error < 0 ? -error : error};
	struct loss_val none = {}, *seen;

	/* Indexes repeat from namespace to namespace. */
	if (dev->nd_net.net->ns.inum != config.netns_inum)
		return;
	key.ifindex = dev->ifindex;
	seen = bpf_map_lookup_elem(&losses, &key);
	if (!seen) {
		/* Another processor may have been first, or the map is full: then it is seen, or not. */
		bpf_map_update_elem(&losses, &key, &none, BPF_NOEXIST);
		seen = bpf_map_lookup_elem(&losses, &key);
	}
	if (seen)
		__sync_fetch_and_add(&seen->frames, frames);
}

/* (dev, prog, act). A redirect that failed is told of by xdp_redirect_err already. */
SEC("tp_btf/xdp_exception")
int on_exception(__u64 *ctx)
{
	__u32 act = (__u32)ctx[2];

	if (act == XDP_TX)
		lost((void *)ctx[0], LOSS_TX, 0, 1);
	else if (act != XDP_REDIRECT)
		lost((void *)ctx[0], LOSS_ABORTED, 0, 1);
	return 0;
}

/* (dev, sent, drops, err) */
SEC("tp_btf/xdp_bulk_tx")
int on_bulk_tx(__u64 *ctx)
{
	int drops = (int)ctx[2];

	if (drops > 0)
		lost((void *)ctx[0], LOSS_TX, (int)ctx[3], drops);
	return 0;
}

/* (dev, prog, tgt, err, ...): dev is where the frame came in. */
SEC("tp_btf/xdp_redirect_err")
int on_redirect_err(__u64 *ctx)
{
	lost((void *)ctx[0], LOSS_REDIRECT, (int)ctx[3], 1);
	return 0;
}

/* (from_dev, to_dev, sent, drops, err) */
SEC("tp_btf/xdp_devmap_xmit")
int on_devmap_xmit(__u64 *ctx)
{
	int drops = (int)ctx[3];

	if (drops > 0)
		lost((void *)ctx[1], LOSS_XMIT, (int)ctx[4], drops);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
