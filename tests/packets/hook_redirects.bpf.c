/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/* A hook that does more than it may. */
#include "shunt_hook.h"

int hook(struct hook_view *view)
{
	return bpf_redirect(view->ifindex, 0) ? SHUNT_DROP : SHUNT_PASS;
}
