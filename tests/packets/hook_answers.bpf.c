/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A hook whose answer depends on the port that the packet is for; it keeps what it has seen. */
#include "shunt_hook.h"
#include <bpf/bpf_endian.h>

HOOK_ARRAY(seen, __u32, struct hook_view, 2); /* by position */

int hook(struct hook_view *view)
{
	__u32 position = view->post_lb, port = bpf_ntohs(view->dport);

	bpf_map_update_elem(&seen, &position, view, 0);
	/* None of this may have an effect. */
	view->action = 0;
	view->reason = 0;
	view->backend = 77;
	view->mark = 5;
	view->len = 1;
	view->data[0] = 0xff;
	view->result = SHUNT_DROP;
	switch (port) {
	case 81:
		return SHUNT_DROP;
	case 82:
		return SHUNT_MARK(7);
	case 83:
		return 99;
	case 84:
		return SHUNT_MARK(HOOK_MARK_MAX + 1);
	case 85:
		return view->post_lb ? SHUNT_DROP : SHUNT_MARK(1);
	default:
		return SHUNT_PASS;
	}
}
