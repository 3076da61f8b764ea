/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * Around a user's hook: linked with the user's object when that is loaded (xdp/hook.py), so that
 * the hook gets a view and no packet, and answers and does nothing else. It has no licence of its
 * own, since the linked object has the user's.
 */
#include "hook_maps.h"

static __always_inline void ask(void)
{
	__u32 zero = 0;
	struct hook_view *view = bpf_map_lookup_elem(&hook_view, &zero);

	if (view)
		view->result = hook(view);
}

SEC("xdp")
int shunt_hook_pre(struct xdp_md *ctx)
{
	ask();
	bpf_tail_call_static(ctx, &hooks, HOOK_PRE_LB + 1);
	return XDP_ABORTED; /* the slot after a hook's is never empty */
}

SEC("xdp")
int shunt_hook_post(struct xdp_md *ctx)
{
	ask();
	bpf_tail_call_static(ctx, &hooks, HOOK_POST_LB + 1);
	return XDP_ABORTED;
}
